"""One thread: small matrices are fastest so, and equal bits need an equal number. And the snapshot of sweeps.py."""

from collections.abc import Iterator

import pytest
import torch

from sae.store.snapshots.snapshot import Snapshot
from sae.store.storage.filesystem import Storage
from tests.sae.train.sweeps import MakeSnapshot, parts_of_rows


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def snapshot(storage: Storage, make_snapshot: MakeSnapshot) -> Snapshot:
    return make_snapshot(storage, parts_of_rows(), row_group_rows=20)
