"""Rows that a run looks at beside its batches: a function of seed and purpose, so that a resumed run sees the same."""

from collections.abc import Iterator
from functools import partial
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from sae.config import Ref, digest
from sae.philox import philox
from sae.store.reading.loader import Loader
from sae.store.reading.shuffle import ShuffleConfig
from sae.store.snapshots.snapshot import Snapshot, read_snapshot
from sae.store.storage.filesystem import Storage
from sae.train.collectives import ALONE, Collectives
from sae.train.reading import SharedLoader

FEW_WINDOWS = ShuffleConfig(window_row_groups=8)
"""A row group of each of eight places at a time: a sample needs no better mixing, and training has its own windows."""


class Sample(NamedTuple):
    """Some rows in the data's own units."""

    batches: Iterator[Tensor]
    """Each [rows, d_in] float32"""
    n_rows: int
    """In all batches together: as many as asked for, or all that there are."""
    split: Literal["train", "heldout"]


class RowSource(Protocol):
    """Where such rows come from. The same arguments give the same rows."""

    def training(self, n_rows: int, purpose: str) -> Sample:
        """Rows of the training data, other ones for another purpose."""

    def heldout(self, n_rows: int, purpose: str) -> Sample:
        """Rows that training does not see; where there are none, rows of the training data."""


class SnapshotRows:
    """Rows of snapshots.

    Args:
        training: what the run is trained on.
        heldout: address of a snapshot of the rows held out; None: there is none.
        batch_rows: of the batches, at most.
        shared: one device of every host reads them, for all there; all of them ask for the same.
    """

    def __init__(
        self,
        storage: Storage,
        training: Snapshot,
        heldout: Ref | None,
        batch_rows: int,
        seed: int,
        device: torch.device | str = "cpu",
        shared: Collectives = ALONE,
    ) -> None:
        self._storage, self._training, self._heldout = storage, training, heldout
        self._batch_rows, self._seed, self._device, self._shared = batch_rows, seed, device, shared

    def training(self, n_rows: int, purpose: str) -> Sample:
        """In an order that is keyed by the purpose. Raises: DamagedError as Loader, when iterated."""
        n_rows = min(n_rows, self._training.n_rows)
        return Sample(self._read(self._training, n_rows, purpose), n_rows, "train")

    def heldout(self, n_rows: int, purpose: str) -> Sample:
        """As `training`. Raises: StoreError when that snapshot is not there."""
        if self._heldout is None:
            return self.training(n_rows, purpose)
        snapshot = read_snapshot(self._storage, self._heldout)
        n_rows = min(n_rows, snapshot.n_rows)
        return Sample(self._read(snapshot, n_rows, purpose), n_rows, "heldout")

    def _read(self, snapshot: Snapshot, n_rows: int, purpose: str) -> Iterator[Tensor]:
        batch_rows = min(self._batch_rows, snapshot.n_rows)
        seed = int(digest([purpose, self._seed]), 16)
        open_loader = partial(
            Loader, self._storage, snapshot, batch_rows, seed, shuffle=FEW_WINDOWS, device=self._device
        )
        loader = SharedLoader(open_loader, self._shared.same_host, self._device)
        try:
            while n_rows > 0:
                batch = next(loader)[:n_rows]
                n_rows -= len(batch)
                yield batch
        finally:
            loader.close()


class RowsInMemory:
    """Rows of a tensor [rows, d_in]; nothing is held out of it."""

    def __init__(self, x: Tensor, batch_rows: int, seed: int) -> None:
        self._x, self._batch_rows, self._seed = x, batch_rows, seed

    def training(self, n_rows: int, purpose: str) -> Sample:
        """In an order that is keyed by the purpose."""
        order = philox(purpose, self._seed).permutation(len(self._x))[:n_rows]
        rows = torch.from_numpy(order).to(self._x.device).split(self._batch_rows)
        return Sample((self._x[some] for some in rows), len(order), "train")

    def heldout(self, n_rows: int, purpose: str) -> Sample:
        """The same as `training`."""
        return self.training(n_rows, purpose)
