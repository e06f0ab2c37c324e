"""Roots of every kind that we support."""

import pytest

from sae.store.filesystem import Storage


@pytest.fixture(params=["disk", "memory", "s3"])
def any_storage(request: pytest.FixtureRequest) -> Storage:
    """A fresh root on disk, in memory and on S3."""
    if request.param == "s3":
        return Storage(request.getfixturevalue("s3_root"))
    return request.getfixturevalue("storage" if request.param == "disk" else "memory_storage")
