"""The shuffled order to batches of float32, on the device that trains."""

import contextlib
import math
import weakref
from collections import deque
from collections.abc import Generator, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.errors import ConfigError
from sae.store.part.encoding import stored_dtype
from sae.store.reading.order import Cursor, Epoch, Lanes, Run
from sae.store.reading.shuffle import RowGroups, ShuffleConfig
from sae.store.reading.windows import Drawing, HeldWindow, ReadAhead, Share
from sae.store.snapshots.snapshot import Snapshot
from sae.store.storage.filesystem import Storage

BATCHES_KEPT = 2
"""Memory of batches that is kept for the next ones: of the one in use, and of the one before."""


class Loader:
    """Iterates the batches of a snapshot, epoch after epoch, from any cursor, or one rank's rows of every batch.

    Rank r of W has the lanes c of the order with c % W == r. A global batch holds the same rows for any W, so the
    cursor of one rank is that of all, and any other number of ranks goes on from it. Ranks need not know each other.

    Memory of a rank, with C streams and K = window_row_groups: (1/W + 2/C) K row groups of the largest size, as stored
    (where the root is not local 16 more, or two windows if they are smaller), and two float32 batches beside those that
    the caller keeps. By default 2.5 GiB and little more, or what a smaller store takes. For a GPU the row groups lie in
    page-locked memory of the host, and the batches on the GPU.

    A batch belongs to the caller: its memory is used again only when no tensor refers to it any more.

    Args:
        batch_rows: rows of a global batch, over all ranks.
        seed: of the order.
        cursor: the next batch to yield; the first by default.
        rank, world: whose rows of every batch to yield.
        device: where the batches are to be.

    Raises: ConfigError when a batch is larger than the snapshot, or the ranks cannot share it evenly.
    """

    def __init__(
        self,
        storage: Storage,
        snapshot: Snapshot,
        batch_rows: int,
        seed: int,
        cursor: Cursor | None = None,
        shuffle: ShuffleConfig | None = None,
        *,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self._groups = RowGroups(snapshot.group_rows_flat, snapshot.group_starts)
        row_bytes = snapshot.d_in * stored_dtype(snapshot.dtype).itemsize
        self._shuffle = (shuffle or ShuffleConfig()).sizes(self._groups, row_bytes)
        n_lanes = self._shuffle.streams(batch_rows)
        _check(snapshot, batch_rows, n_lanes, rank, world)
        self.cursor = cursor or Cursor()
        """The next batch: store it, and other loaders continue from it."""
        self.n_rows = 0
        """Rows of the batch that was handed out last, those of all ranks."""
        self.rows_per_epoch = snapshot.n_rows
        self._d_in, self._seed = snapshot.d_in, seed
        self._lanes = Lanes(snapshot.n_rows, batch_rows, n_lanes)
        self._own = [_Lane(lane) for lane in range(rank, n_lanes, world)]
        self._device = torch.device(device)
        self._copies = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._memory: deque[np.ndarray] = deque(maxlen=BATCHES_KEPT)
        self._ahead = ReadAhead(
            storage,
            snapshot,
            self._runs(),
            window_groups=min(self._shuffle.groups_per_window(batch_rows), math.ceil(len(self._groups.rows) / n_lanes)),
            group_rows=int(self._groups.rows.max()),
            run_rows=self._shuffle.rows_per_run(batch_rows),
            device=self._device,
        )
        self._batches = self._hand_out()

    @property
    def batches_per_epoch(self) -> int:
        """Batches in an epoch; the last may be short, and empty on some ranks."""
        return self._lanes.n_batches

    @property
    def waited_seconds(self) -> float:
        """How long the caller has waited for rows to be read."""
        return self._ahead.waited_seconds

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        """The rows of the next batch, or this rank's of them. [at most batch_rows / world, d_in] float32

        Raises: DamagedError as RowGroupReader.read_into, also for what was read ahead; the cursor stays before it.
        """
        return next(self._batches)

    def close(self) -> None:
        """Stop reading ahead, close the files and let go of the memory, but for batches in use."""
        self._batches.close()
        for lane in self._own:
            lane.held, lane.shares = None, iter(())
        self._memory.clear()
        self._ahead.close()

    def _runs(self) -> Iterator[tuple[Epoch, Run]]:
        """What the own lanes read from the cursor on, epoch after epoch."""
        number, batch = self.cursor.epoch, self.cursor.batch
        while True:
            epoch = Epoch(self._groups, self._lanes.batch_rows, self._seed, number, self._shuffle)
            for run in epoch.runs(batch, [lane.number for lane in self._own]):
                yield epoch, run
            number, batch = number + 1, 0

    def _hand_out(self) -> Generator[Tensor, None, None]:
        # A GPU copies the next batch while it computes with this one.
        for batch in _one_ahead(self._draw_all()) if self._copies else self._draw_all():
            if batch.copied is not None:
                used_on = torch.cuda.current_stream(self._device)
                used_on.wait_event(batch.copied)
                batch.x.record_stream(used_on)
            self.cursor, self.n_rows = batch.after, self._lanes.batch_size(batch.after.batch - 1)
            yield batch.x

    def _draw_all(self) -> Generator["_Batch", None, None]:
        number, first = self.cursor.epoch, self.cursor.batch
        while True:
            for batch in range(first, self._lanes.n_batches):
                with torch.cuda.stream(self._copies) if self._copies else contextlib.nullcontext():
                    x = self._draw(batch)
                    copied = self._copies.record_event() if self._copies else None
                yield _Batch(x, Cursor(epoch=number, batch=batch + 1), copied)
            number, first = number + 1, 0

    def _draw(self, batch: int) -> Tensor:
        counts = [self._lanes.rows_in_batch(lane.number, batch) for lane in self._own]
        x, drawing = self._new_batch(sum(counts)), Drawing()
        for lane, out in zip(self._own, x.split(counts), strict=True):
            self._draw_lane(lane, out, drawing)
        drawing.finish()
        return x

    def _draw_lane(self, lane: "_Lane", out: Tensor, drawing: Drawing) -> None:
        """The next rows of a lane: side by side in one window, or the end of one and the beginning of another."""
        done, n_rows = 0, out.shape[0]
        while done < n_rows:
            if lane.held is None:
                run, window = lane.held = self._ahead.take()
                assert run.lane == lane.number
                lane.left, lane.shares = run.n_rows, window.shares(run, self._lanes.batch_share)
            _, window = lane.held
            share = next(lane.shares)
            taken = share.stored.shape[0]
            drawing.add(window, share, out if taken == n_rows else out[done : done + taken])
            done += taken
            lane.left -= taken
            if lane.left == 0:
                drawing.finish()
                self._ahead.give_back(window)
                lane.held = None

    def _new_batch(self, n_rows: int) -> Tensor:
        """Memory of a batch; the kernel takes longer to clear new pages than a batch takes to copy."""
        if self._copies:
            return torch.empty((n_rows, self._d_in), device=self._device)
        memory = self._memory.pop() if self._memory else np.empty((self._largest_batch(), self._d_in), np.float32)
        rows = memory[:n_rows]
        # The tensor, and whatever shares its memory, holds `rows`.
        weakref.finalize(rows, self._memory.append, memory).atexit = False
        return torch.from_numpy(rows)

    def _largest_batch(self) -> int:
        return len(self._own) * self._lanes.batch_rows // self._lanes.n_lanes


class _Lane:
    """A lane and how far the run that it is in was taken."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.held: tuple[Run, HeldWindow] | None = None
        self.shares: Iterator[Share] = iter(())
        """What is left of the run, a batch's rows at a time."""
        self.left = 0
        """Rows that is."""


class _Batch(NamedTuple):
    x: Tensor
    after: Cursor
    copied: torch.cuda.Event | None
    """On a GPU: when x is complete."""


def _one_ahead(batches: Iterator[_Batch]) -> Iterator[_Batch]:
    """Ask for each batch before the one before it is used; an error still comes in its batch's place."""
    current = next(batches)
    while True:
        try:
            following = next(batches)
        except Exception:
            yield current
            raise
        yield current
        current = following


def _check(snapshot: Snapshot, batch_rows: int, n_lanes: int, rank: int, world: int) -> None:
    if batch_rows > snapshot.n_rows:
        raise ConfigError(
            f"batch_rows = {batch_rows} but the snapshot {snapshot.ref} has {snapshot.n_rows} rows. "
            f"Lower batch_rows, or extract more (activations.n_tokens)."
        )
    if not 0 <= rank < world:
        raise ConfigError(f"rank = {rank} of world = {world}: ranks are numbered 0 to world - 1.")
    if n_lanes % world:
        fitting = ", ".join(str(n) for n in range(1, n_lanes + 1) if n_lanes % n == 0)
        raise ConfigError(
            f"world = {world} ranks cannot share the {n_lanes} streams of batches of {batch_rows} rows evenly. "
            f"Use {fitting} ranks, or more streams (a multiple of {world} that divides batch_rows)."
        )
