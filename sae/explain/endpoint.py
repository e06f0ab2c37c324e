"""A model behind OpenAI's chat completions over HTTP.

The key is read from the environment when a client is made, is sent in one header, and is cut out of whatever comes
back before anything else sees it: servers repeat keys in their errors.
"""

import contextlib
import email.utils
import json
import logging
import os
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx

from sae.errors import InputError, TransientError
from sae.explain.config import ChatEndpoint
from sae.explain.explainer import Answer, Messages, NoAnswer

logger = logging.getLogger(__name__)

MAX_BYTES = 4 << 20
"""Of a response. A longer one is none that was asked for."""
MAX_WAIT_SECONDS = 300.0
"""The longest wait that a Retry-After is granted, and between retries."""
CONNECT_SECONDS = 10.0
CLOSE_SECONDS = 2.0
"""For running requests when nothing more is to be asked."""
MIN_KEY_CHARS = 4
"""Shorter ones are not cut out of texts, where they would stand by chance."""
_MAY_PASS = frozenset((408, 409, 425, 429, *range(500, 600)))
_SHOWN_CHARS = 200


def read_key(config: ChatEndpoint) -> str | None:
    """The key from the environment. Raises: InputError, without the key, when it is missing or fits no header."""
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise InputError(
            f"labels.explainer.api_key_env: the environment variable {config.api_key_env} is not set. Set it to the "
            f"key, or leave the setting out for a server that needs none."
        )
    if not all("!" <= char <= "~" for char in key):
        raise InputError(
            f"labels.explainer.api_key_env: what {config.api_key_env} holds is no key: it has blanks or characters "
            f"that a header cannot carry."
        )
    return key


class EndpointExplainer:
    """Asks over HTTP. Thread-safe.

    Raises: InputError when the key is missing or the address is none.
    """

    def __init__(self, config: ChatEndpoint) -> None:
        self.n_at_once = config.n_at_once
        self._config, self._key = config, read_key(config)
        try:
            self._url = httpx.URL(f"{config.base_url.rstrip('/')}/chat/completions")
        except httpx.InvalidURL as err:
            raise InputError(f"labels.explainer.base_url: {config.base_url!r} is no address ({err})") from err
        self._closed, self._idle, self._n_running = threading.Event(), threading.Condition(), 0
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        seconds = config.timeout_seconds
        self._client = httpx.Client(
            headers=headers,
            timeout=httpx.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS)),
            limits=httpx.Limits(max_connections=config.n_at_once),
        )

    def complete(self, messages: Messages, *, max_tokens: int, seed: int) -> Answer:
        """Ask, and again after what may pass. Raises: as Explainer.complete."""
        config = self._config
        body: dict[str, Any] = {"model": config.model, "messages": messages, config.limit_field: max_tokens}
        body |= {"seed": seed} | ({} if config.temperature is None else {"temperature": config.temperature})
        for attempt in range(config.n_retries + 1):
            unreachable = False
            wait: float | None = None
            try:
                with self._running():
                    status, headers, text = self._post(body)
                if status == 200:
                    return _read_answer(text)
                self._raise_if_final(status, text)
                problem = f"status {status}: {_shown(text)}"
                wait = _retry_after(headers.get("retry-after"))
            except (httpx.ConnectError, httpx.ConnectTimeout) as err:
                problem, unreachable = self._clean(str(err)) or type(err).__name__, True
            except httpx.TimeoutException:
                problem = f"no whole answer in {config.timeout_seconds:g} s"
            except (httpx.HTTPError, httpx.StreamError, _BadResponse) as err:
                problem = self._clean(str(err)) or type(err).__name__
            if wait is not None and wait > MAX_WAIT_SECONDS:
                raise NoAnswer(f"{problem}; it asks to wait {wait:.0f} s", outage=True)
            if attempt < config.n_retries:
                wait = self._delay(attempt) if wait is None else wait
                logger.warning("%s: %s; asking again in %.1f s", config.base_url, problem, wait)
                self._closed.wait(wait)
        tried = f"tried {config.n_retries + 1} times" if config.n_retries else "tried once"
        if unreachable:
            raise TransientError(
                f"labels.explainer.base_url: {config.base_url} cannot be reached ({problem}; {tried}). Check the "
                f"address, and that the server is up."
            )
        raise NoAnswer(f"{problem} ({tried})", outage=True)

    def close(self) -> None:
        """Close the connections; calls that wait for a retry end with NoAnswer, and running requests get a moment."""
        self._closed.set()
        with self._idle:
            self._idle.wait_for(lambda: self._n_running == 0, timeout=CLOSE_SECONDS)
        self._client.close()

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """One request, which `close` waits for. Raises: NoAnswer when nothing is to be asked any more."""
        with self._idle:
            if self._closed.is_set():
                raise NoAnswer("stopped", outage=True)
            self._n_running += 1
        try:
            yield
        finally:
            with self._idle:
                self._n_running -= 1
                self._idle.notify_all()

    def _post(self, body: dict[str, Any]) -> tuple[int, httpx.Headers, str]:
        """Status, headers and text, bounded in bytes and in time: a server may send a byte a minute for ever."""
        deadline = time.monotonic() + self._config.timeout_seconds
        data = bytearray()
        with self._client.stream("POST", self._url, json=body) as response:
            for block in response.iter_bytes():
                data += block
                if len(data) > MAX_BYTES:
                    raise _BadResponse(f"an answer of more than {MAX_BYTES >> 20} MiB")
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("too slow")
        return response.status_code, response.headers, self._clean(data.decode(errors="replace"))

    def _raise_if_final(self, status: int, text: str) -> None:
        """Raise for an answer that will be the same the next time."""
        config = self._config
        if status in (401, 403):
            key = f"the key in {config.api_key_env}" if config.api_key_env else "a request without a key"
            raise InputError(
                f"labels.explainer.api_key_env: {config.base_url} refused {key} (status {status}). Check the key and "
                f"what it may use."
            )
        if status == 404:
            raise InputError(
                f"labels.explainer.model: {config.base_url} knows no model {config.model!r}, or base_url is not its "
                f"whole address, which mostly ends in /v1 (status 404: {_shown(text)})"
            )
        if status < 400:
            raise InputError(
                f"labels.explainer.base_url: {config.base_url} answers with status {status} and sends elsewhere. "
                f"Give the address that answers itself."
            )
        if status not in _MAY_PASS:
            raise NoAnswer(f"refused with status {status}: {_shown(text)}", outage=False)

    def _delay(self, attempt: int) -> float:
        # Many clients that were refused at once must not come back at once.
        delay = self._config.retry_delay_seconds * 2**attempt * random.uniform(0.75, 1.25)
        return min(MAX_WAIT_SECONDS, delay)

    def _clean(self, text: str) -> str:
        if self._key is None or len(self._key) < MIN_KEY_CHARS:
            return text
        return text.replace(self._key, "[key]")


class _BadResponse(Exception):
    """A response that is not what the protocol says."""


def _read_answer(text: str) -> Answer:
    """Raises: _BadResponse."""
    try:
        response = json.loads(text)
        content = response["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError) as err:
        raise _BadResponse(f"an answer that is no chat completion: {_shown(text)}") from err
    if not isinstance(content, str | None):
        raise _BadResponse(f"an answer without text: {_shown(text)}")
    usage = response.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    prompt, completion = (count if isinstance(count, int) and 0 <= count < 2**31 else None for count in counts)
    name = response.get("model")
    return Answer(content or "", name[:_SHOWN_CHARS] if isinstance(name, str) else None, prompt, completion)


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number or a date. None: not said, or not understood."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if seconds == seconds else None


def _shown(text: str) -> str:
    """The beginning of a server's text, on one line and printable."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text[: 2 * _SHOWN_CHARS]).split())
    return line[:_SHOWN_CHARS] or "no text"
