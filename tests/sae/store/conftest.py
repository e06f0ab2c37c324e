"""A network between the tests and S3."""

from collections.abc import Iterator

import pytest

from sae.store.storage import http_ranges, s3, signed_get
from tests.sae.store.network import Network, network


@pytest.fixture
def hop(s3_root: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    """The network between this test and S3. It works until it gets a fault; nobody waits long for it."""
    monkeypatch.setattr(signed_get, "STALL_SECONDS", 2)  # a busy machine's endpoint takes a while
    monkeypatch.setattr(http_ranges, "PAUSE_SECONDS", 0.01)
    with network(s3_server) as hop:
        monkeypatch.setenv("AWS_ENDPOINT_URL", hop.url)
        s3.FileSystem.clear_instance_cache()
        yield hop
