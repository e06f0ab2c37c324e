"""One GET of a range of an S3 object, from the socket into a buffer, on a signed address.

s3fs signs the addresses, so credentials, token, region and endpoint are those of everything else. It is also asked for
what an endpoint refuses (a missing object, no permission, another region), so that what comes out is what it says.
"""

import contextlib
import http.client
import logging
import os
import re
import select
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from botocore.httpsession import get_cert_path
from botocore.utils import get_environ_proxies

from sae.errors import StoreError
from sae.store.storage.filesystem import Storage
from sae.store.storage.ranges import Range, copy_range
from sae.store.storage.s3 import OPTIONS, PASSING_STATUS

logger = logging.getLogger(__name__)

CONNECT_SECONDS = OPTIONS["config_kwargs"]["connect_timeout"]
STALL_SECONDS = 10
"""An endpoint that sends nothing for so long is given up. s3fs waits longer: its requests may be whole uploads."""
BLOCK_BYTES = 1 << 20
"""Read at once, and lost when a connection breaks: what came before stays."""
URL_SECONDS, RENEW_SECONDS = 3600, 300
"""How long an address is valid, and the age from which another is signed: credentials of a role have ten minutes left
when they are renewed."""
MAX_ADDRESSES = 4096
MAX_ERROR_BYTES = 1 << 16
"""The text of an error is read up to this length, so that its connection can be used again."""
MAX_RETRY_AFTER_SECONDS = 60

_EXPIRED_STATUS = {400, 401, 403}
"""Answers to an address or a token that is no longer valid; to what is forbidden, too."""
_ELSEWHERE_STATUS = {301, 307, 400}
"""Answers to an address of another region, among others."""
_CODE = re.compile(rb"<Code>(\w+)</Code>")
_REGION = re.compile(rb"<Region>([\w-]+)</Region>")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class AgainError(Exception):
    """A request failed in a way that may pass. `after`: seconds that the endpoint asks to wait."""

    def __init__(self, reason: str, after: float = 0) -> None:
        super().__init__(reason)
        self.after = after


@dataclass
class Piece:
    """Bytes of one file on their way into a buffer."""

    path: str
    offset: int
    buffer: memoryview
    n_done: int = 0
    """Bytes that have come."""
    is_renewed: bool = False
    """Whether its address was signed anew because the endpoint refused it."""

    @property
    def end(self) -> int:
        """Of the bytes in the file."""
        return self.offset + len(self.buffer)

    @property
    def rest(self) -> Range:
        """What has not come yet."""
        return Range(self.path, self.offset + self.n_done, self.buffer[self.n_done :])


@dataclass(frozen=True)
class _Address:
    is_tls: bool
    host: str
    port: int | None
    target: str
    signed_at: float
    is_proxied: bool

    @property
    def place(self) -> tuple[bool, str, int | None]:
        """What a connection leads to."""
        return self.is_tls, self.host, self.port


class SignedGets:
    """Addresses and open connections of one root. Thread-safe."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._addresses: OrderedDict[str, _Address] = OrderedDict()
        self._idle: list[tuple[object, http.client.HTTPConnection]] = []
        self._tls: ssl.SSLContext | None = None
        self._signing, self._lending = threading.Lock(), threading.Lock()
        self._is_refused = False

    def get(self, piece: Piece, stopped: threading.Event) -> bool:
        """One attempt at what is missing of a piece; ends early, with AgainError, when `stopped` is set.

        Returns: False when the file ends before.
        Raises: AgainError; StoreError or TransientError as Storage.read_bytes.
        """
        address = self._address(piece.path)
        if address.is_proxied or self._is_refused:
            return copy_range(self._storage, piece.rest)
        with self._response(address, piece) as response:
            if response.status == 206:
                return self._receive(response, piece, stopped)
            answer, after = self._answer(response, piece.path)
        if response.status == 416:
            return False
        if response.status >= 500 or response.status in PASSING_STATUS:
            raise AgainError(answer, after)
        if response.status == 200:
            raise StoreError(
                f"{self._storage.uri(piece.path)}: the endpoint answers a request for a range with all of the file. "
                f"Use one that serves ranges."
            )
        self._forget(piece.path, address)
        if response.status in _EXPIRED_STATUS and not piece.is_renewed:
            piece.is_renewed = True
            raise AgainError(answer)
        filled = copy_range(self._storage, piece.rest)
        if not self._is_refused:
            self._is_refused = True
            logger.warning("%s: %s to a signed address; read through s3fs, slower", self._storage.uri(), answer)
        return filled

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop()[1].close()

    def _receive(self, response: http.client.HTTPResponse, piece: Piece, stopped: threading.Event) -> bool:
        start, stop = piece.offset + piece.n_done, piece.end
        given = response.headers.get("Content-Range", "")
        found = _CONTENT_RANGE.fullmatch(given)
        first, last, n_bytes = map(int, found.groups()) if found else (-1, -1, -1)
        if (first, last + 1) != (start, min(stop, n_bytes)):
            raise AgainError(f"Content-Range {given!r} came for bytes {start} to {stop - 1}")
        if n_bytes < stop:
            return False
        while piece.n_done < len(piece.buffer):
            if stopped.is_set():
                raise AgainError("no longer wanted")
            with _failures(self._storage.uri(piece.path)):
                n_bytes = response.readinto(piece.buffer[piece.n_done : piece.n_done + BLOCK_BYTES])
            if n_bytes == 0:
                raise AgainError(f"the answer broke off at byte {piece.offset + piece.n_done}")
            piece.n_done += n_bytes
        return True

    def _answer(self, response: http.client.HTTPResponse, path: str) -> tuple[str, float]:
        """What the endpoint says instead of sending bytes, and how many seconds it asks to wait."""
        text = b""
        if response.length is not None and response.length <= MAX_ERROR_BYTES:
            with _failures(self._storage.uri(path)):
                text = response.read()
        code = b"".join(_CODE.findall(text)[:1]).decode() or response.reason
        after = response.headers.get("Retry-After", "")
        seconds = min(int(after), MAX_RETRY_AFTER_SECONDS) if after.isdecimal() else 0
        answer = f"S3 answered {response.status} {code}"
        # botocore signs for the region it was told, wherever s3fs has found the bucket since.
        region = response.headers.get("x-amz-bucket-region") or b"".join(_REGION.findall(text)[:1]).decode()
        if region and response.status in _ELSEWHERE_STATUS:
            answer += f" (the bucket is in {region}: set AWS_DEFAULT_REGION)"
        return answer, seconds

    def _address(self, path: str) -> _Address:
        with self._signing:
            address = self._addresses.get(path)
            if address is None or time.monotonic() - address.signed_at > RENEW_SECONDS:
                signed_at = time.monotonic()
                url = self._storage.signed_url(path, URL_SECONDS)
                parts = urlsplit(url)
                address = self._addresses[path] = _Address(
                    is_tls=parts.scheme == "https",
                    host=str(parts.hostname),
                    port=parts.port,
                    target=f"{parts.path}?{parts.query}",
                    signed_at=signed_at,
                    is_proxied=parts.scheme in get_environ_proxies(url),
                )
                if len(self._addresses) > MAX_ADDRESSES:
                    self._addresses.popitem(last=False)
            return address

    def _forget(self, path: str, address: _Address) -> None:
        with self._signing:
            if self._addresses.get(path) is address:
                del self._addresses[path]

    @contextlib.contextmanager
    def _response(self, address: _Address, piece: Piece) -> Iterator[http.client.HTTPResponse]:
        """The answer to a request for what is missing. Read to the end by the block, its connection is used again."""
        fields = {"Range": f"bytes={piece.offset + piece.n_done}-{piece.end - 1}"}
        with _failures(self._storage.uri(piece.path)):
            connection = self._idle_connection(address.place) or self._connect(address)
        is_kept = False
        try:
            with _failures(self._storage.uri(piece.path)):
                connection.request("GET", address.target, headers=fields)
                response = connection.getresponse()
            with response:
                yield response
                is_kept = response.isclosed() and connection.sock is not None
        finally:
            if is_kept:
                with self._lending:
                    self._idle.append((address.place, connection))
            else:
                connection.close()

    def _idle_connection(self, place: tuple[bool, str, int | None]) -> http.client.HTTPConnection | None:
        while True:
            with self._lending:
                if not self._idle:
                    return None
                led_to, connection = self._idle.pop()
            if led_to == place and not _has_ended(connection):
                return connection
            connection.close()

    def _connect(self, address: _Address) -> http.client.HTTPConnection:
        if address.is_tls:
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                address.host, address.port, timeout=CONNECT_SECONDS, context=self._tls_context()
            )
        else:
            connection = http.client.HTTPConnection(address.host, address.port, timeout=CONNECT_SECONDS)
        try:
            connection.connect()
            connection.sock.settimeout(STALL_SECONDS)
        except BaseException:
            connection.close()
            raise
        return connection

    def _tls_context(self) -> ssl.SSLContext:
        """Trust in the authorities that s3fs trusts."""
        with self._lending:
            if self._tls is None:
                bundle = self._storage.fs.session.get_config_variable("ca_bundle")
                bundle = bundle or os.environ.get("REQUESTS_CA_BUNDLE") or get_cert_path(True)
                self._tls = ssl.create_default_context(cafile=bundle)
            return self._tls


def _has_ended(connection: http.client.HTTPConnection) -> bool:
    """Whether the endpoint has closed an idle connection, which then has an end to be read."""
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    return bool(poll.poll(0))


@contextlib.contextmanager
def _failures(uri: str) -> Iterator[None]:
    """What goes wrong between us and the endpoint is worth another attempt, unless it is not whom it claims to be."""
    try:
        yield
    except ssl.SSLCertVerificationError as err:
        raise StoreError(
            f"{uri}: the endpoint's certificate is not trusted ({err.verify_message}). Name the file of its authority "
            f"in AWS_CA_BUNDLE."
        ) from err
    except TimeoutError as err:
        raise AgainError("nothing came in time") from err
    except (OSError, http.client.HTTPException) as err:
        raise AgainError(str(err) or type(err).__name__) from err
