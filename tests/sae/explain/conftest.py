"""A stub endpoint per test."""

from collections.abc import Iterator

import pytest

from sae.explain.config import ChatEndpoint
from tests.sae.explain.stub import KEY, Stub, serve


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serve() as server:
        yield server


@pytest.fixture
def endpoint(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> ChatEndpoint:
    """The stub as it is configured, with a key in the environment."""
    monkeypatch.setenv("STUB_API_KEY", KEY)
    return ChatEndpoint(
        base_url=stub.base_url, model="stub", api_key_env="STUB_API_KEY", retry_delay_seconds=0.01, timeout_seconds=1
    )
