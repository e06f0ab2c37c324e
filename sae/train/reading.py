"""Rows that are read once on a host, however many of its devices need them."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sae.store.reading.loader import Loader
from sae.store.reading.order import Cursor
from sae.train.collectives import Neighbours


class SharedLoader:
    """The batches of a loader that the first of some neighbours has, and with it the windows in memory; the others are
    told them. The rows are those that each would read, to the bit.

    Args:
        open_loader: called on the one that reads.
        cursor: as the loader is opened with.
        device: where the batches are to be.

    Attributes:
        cursor, n_rows: as of `Loader`.
    """

    def __init__(
        self,
        open_loader: Callable[[], Loader],
        neighbours: Neighbours,
        device: torch.device | str = "cpu",
        cursor: Cursor | None = None,
    ) -> None:
        self._loader = open_loader() if neighbours.reads else None
        self._neighbours, self._device = neighbours, torch.device(device)
        self.cursor, self.n_rows = cursor or Cursor(), 0

    @property
    def waited_seconds(self) -> float:
        """How long the loader of this device has waited for rows to be read."""
        return self._loader.waited_seconds if self._loader else 0.0

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        """As of `Loader`. Raises: its errors, where it is; the others lose touch with a device that ends by one."""
        x, numbers = None, [0, 0, 0]
        if self._loader:
            x = next(self._loader)
            numbers = [self._loader.cursor.epoch, self._loader.cursor.batch, self._loader.n_rows]
        x, (epoch, batch, self.n_rows) = self._neighbours.tell_rows(x, numbers, self._device)
        self.cursor = Cursor(epoch=epoch, batch=batch)
        return x

    def close(self) -> None:
        """As of `Loader`."""
        if self._loader:
            self._loader.close()
