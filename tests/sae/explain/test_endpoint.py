"""HTTP: what is tried again, what stops, what is bounded, and that the key is seen nowhere."""

import contextlib
import email.utils
import json
import logging
import time
from collections.abc import Callable, Iterator

import pytest
from pydantic import ValidationError

from sae.errors import InputError, PipelineError, TransientError
from sae.explain.config import ChatEndpoint
from sae.explain.endpoint import EndpointExplainer
from sae.explain.explainer import NoAnswer
from tests.sae.explain.stub import KEY, Fault, Stub

Changed = Callable[..., EndpointExplainer]
MESSAGES = [{"role": "user", "content": "Say OK."}]


@pytest.fixture
def changed(endpoint: ChatEndpoint) -> Iterator[Changed]:
    """The stub's client with other settings."""
    with contextlib.ExitStack() as stack:

        def make(**fields: object) -> EndpointExplainer:
            made = EndpointExplainer(ChatEndpoint.model_validate(endpoint.model_dump() | fields))
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture
def explainer(changed: Changed) -> EndpointExplainer:
    return changed()


def ask(explainer: EndpointExplainer) -> str:
    return explainer.complete(MESSAGES, max_tokens=16, seed=3).text


def test_a_request_holds_the_messages_and_settings_and_the_key_in_one_header(
    stub: Stub, explainer: EndpointExplainer
) -> None:
    stub.key = KEY
    answer = explainer.complete(MESSAGES, max_tokens=16, seed=3)
    assert answer == ("OK", "stub-2026", 100, 7)
    assert stub.requests == [{"model": "stub", "messages": MESSAGES, "max_tokens": 16, "seed": 3, "temperature": 0.0}]
    assert stub.paths == ["/v1/chat/completions"]


def test_what_a_model_does_not_take_is_not_sent(stub: Stub, changed: Changed) -> None:
    ask(changed(temperature=None, limit_field="max_completion_tokens"))
    assert stub.requests == [{"model": "stub", "messages": MESSAGES, "max_completion_tokens": 16, "seed": 3}]


@pytest.mark.parametrize(
    "fault",
    [
        Fault(429),
        Fault(500),
        Fault(503),
        Fault(200, body=b"<html>not JSON"),
        Fault(200, body=b'{"choices": []}'),
        Fault(200, body=b'{"choices": [{"message": {"content": 7}}]}'),
        Fault(200, body=b"[" * 100_000),
    ],
)
def test_what_may_pass_is_asked_again(stub: Stub, explainer: EndpointExplainer, fault: Fault) -> None:
    stub.faults = [fault, fault]
    assert ask(explainer) == "OK"
    assert len(stub.requests) == 3


def test_delays_double(stub: Stub, changed: Changed) -> None:
    stub.faults = [Fault(500)] * 3
    ask(changed(retry_delay_seconds=0.1))
    waits = [later - earlier for earlier, later in zip(stub.times, stub.times[1:], strict=False)]
    assert [low < wait < low * 2 + 0.2 for wait, low in zip(waits, (0.07, 0.15, 0.3), strict=True)] == [True] * 3


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_honoured(stub: Stub, explainer: EndpointExplainer, as_date: bool) -> None:
    when = email.utils.formatdate(time.time() + 1.9, usegmt=True) if as_date else "0.5"
    stub.faults = [Fault(429, {"Retry-After": when})]
    assert ask(explainer) == "OK"
    assert 0.45 < stub.times[1] - stub.times[0] < 2.5


def test_a_wait_of_an_hour_is_not_waited_for(stub: Stub, explainer: EndpointExplainer) -> None:
    stub.faults = [Fault(429, {"Retry-After": "3600"})]
    with pytest.raises(NoAnswer, match="asks to wait 3600 s"):
        ask(explainer)


def test_a_retry_after_that_is_no_time_is_ignored(stub: Stub, explainer: EndpointExplainer) -> None:
    stub.faults = [Fault(429, {"Retry-After": "soon"}), Fault(429, {"Retry-After": "nan"})]
    assert ask(explainer) == "OK"


def test_silence_is_a_fault_that_may_pass(stub: Stub, changed: Changed) -> None:
    stub.faults = [Fault(stall=True)]
    assert ask(changed(timeout_seconds=0.3)) == "OK"


def test_what_does_not_pass_is_this_request_s_fate(stub: Stub, changed: Changed) -> None:
    stub.faults = [Fault(500, body=b"overloaded\nsecond line")] * 3
    with pytest.raises(NoAnswer, match=r"status 500: overloaded second line \(tried 3 times\)") as caught:
        ask(changed(n_retries=2))
    assert caught.value.outage
    assert len(stub.requests) == 3


def test_a_refused_request_is_not_asked_again(stub: Stub, explainer: EndpointExplainer) -> None:
    stub.faults = [Fault(400, body=b"prompt too long")]
    with pytest.raises(NoAnswer, match="status 400: prompt too long") as caught:
        ask(explainer)
    assert not caught.value.outage
    assert len(stub.requests) == 1


@pytest.mark.parametrize(
    ("fault", "setting"),
    [
        (Fault(401, body=f"wrong: {KEY}".encode()), r"labels\.explainer\.api_key_env: .* refused the key in STUB_API"),
        (Fault(403), r"labels\.explainer\.api_key_env"),
        (Fault(404, body=b"no such model"), r"labels\.explainer\.model: .* knows no model 'stub'"),
        (Fault(302, {"Location": "http://elsewhere.invalid"}), r"labels\.explainer\.base_url: .* sends elsewhere"),
    ],
)
def test_what_no_request_can_survive_stops_and_names_the_setting(
    stub: Stub, explainer: EndpointExplainer, fault: Fault, setting: str
) -> None:
    stub.faults = [fault]
    with pytest.raises(InputError, match=setting) as caught:
        ask(explainer)
    assert KEY not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(stub.requests) == 1


def test_an_unreachable_server_is_named_after_some_tries(changed: Changed) -> None:
    explainer = changed(base_url="http://127.0.0.1:9/v1", n_retries=2)
    with pytest.raises(TransientError, match=r"labels\.explainer\.base_url: \S+:9/v1 cannot be reached"):
        ask(explainer)


def test_an_endless_answer_is_cut_off(stub: Stub, changed: Changed) -> None:
    stub.faults = [Fault(body=b"x" * (5 << 20))]
    with pytest.raises(NoAnswer, match="more than 4 MiB"):
        ask(changed(n_retries=0))


def test_a_missing_key_is_found_before_anything_is_sent(
    stub: Stub, endpoint: ChatEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STUB_API_KEY")
    with pytest.raises(InputError, match="STUB_API_KEY is not set"):
        EndpointExplainer(endpoint)
    monkeypatch.setenv("STUB_API_KEY", "two\nlines-of-secret")
    with pytest.raises(InputError) as caught:
        EndpointExplainer(endpoint)
    assert "lines-of-secret" not in str(caught.value)
    assert stub.requests == []


def test_a_key_that_the_server_repeats_is_seen_nowhere(
    stub: Stub, changed: Changed, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    echo = f"you sent Bearer {KEY}".encode()
    for fault in (Fault(500, body=echo), Fault(400, body=echo), Fault(404, body=echo), Fault(body=echo)):
        stub.faults = [fault]
        with pytest.raises(PipelineError) as caught:
            ask(changed(n_retries=0))
        assert KEY not in str(caught.value)
    stub.faults = [Fault(500, body=echo), Fault(content=json.dumps({"explanation": KEY}))]
    assert ask(changed()) == '{"explanation": "[key]"}'
    assert "asking again" in caplog.text
    assert KEY not in caplog.text


@pytest.mark.parametrize(
    "fields",
    [
        {"api_key_env": KEY},
        {"base_url": f"https://user:{KEY}@host/v1"},
        {"base_url": f"https://host/v1?key={KEY}"},
        {"base_url": "ftp://host/v1"},
        {"base_url": "host/v1"},
        {"base_url": "http://host:port/v1"},
    ],
)
def test_addresses_and_names_that_hold_or_could_hold_a_secret_are_refused(fields: dict[str, str]) -> None:
    with pytest.raises(ValidationError) as caught:
        ChatEndpoint.model_validate({"base_url": "https://host/v1", "model": "m"} | fields)
    assert KEY not in "".join(error["msg"] for error in caught.value.errors())
