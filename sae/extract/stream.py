"""The parts of one hook point, one after the other: each is filled while the one before it is written."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator, MutableMapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.extract.config import PartsSpec
from sae.extract.filling import BUFFERS, Filling, PartRows, rows_of_part
from sae.extract.write import write_rows
from sae.store.artefacts.records import Record, commit, intact_record
from sae.store.snapshots.snapshot import PART_FILE
from sae.store.storage.filesystem import Storage
from sae.store.text.contexts import Contexts

SharedRows = MutableMapping[tuple[Any, ...], PartRows]
"""The rows of parts that streams have open, for those whose parts are on the same contexts."""


WRITERS = 2
"""Parts that are written at a time: while one waits for the disk, the other is summed and hashed."""
NICENESS = 10
"""Of the helpers, over the model's: on a busy machine the forward pass then waits half as long for a core."""


@contextlib.contextmanager
def helper_threads() -> Iterator[tuple[Executor, Executor]]:
    """A thread that holds activations and those that write parts, while the block runs.

    Torch uses one thread in each: the model has the others, and sums do not depend on how many there are. Where the
    model leaves a core, they let it go before them; where it has all, that would starve them.
    """
    threads = torch.get_num_threads()
    niceness = NICENESS if threads < _count_cores() else 0
    with (
        ThreadPoolExecutor(1, "hold-activations", initializer=_set_up, initargs=(niceness,)) as putting,
        ThreadPoolExecutor(WRITERS, "write-part", initializer=_set_up, initargs=(niceness,)) as writing,
    ):
        yield putting, writing
    torch.set_num_threads(threads)  # for threads that are started later; the caller's own never had another number


def _count_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _set_up(niceness: int) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":  # where a thread has a niceness of its own
        os.nice(niceness)


class PartStream:
    """The parts of one spec that are computed in a call.

    Two parts at most are in memory: the one that is filled, and the one before it, which is written.

    Args:
        plan: the metrics of the part set's record.
        numbers: the parts to compute.
        writing: where parts are written.
        recompute: finished parts too.
        device: that the activations come from. For a GPU the parts are held in page-locked memory, which it writes by
            itself.
    """

    def __init__(
        self,
        storage: Storage,
        spec: PartsSpec,
        plan: dict[str, Any],
        numbers: Sequence[int],
        writing: Executor,
        recompute: bool,
        device: torch.device,
    ) -> None:
        self.hook_point = spec.hook_point
        self._storage, self._spec, self._plan, self._writing = storage, spec, plan, writing
        self._numbers, self._size, self._recompute = set(numbers), int(plan["contexts_per_part"]), recompute
        self._found: dict[int, Record] = {}
        self._buffers: list[Tensor | None] = [None, None]
        self._writes: dict[int, Future[Record]] = {}
        self._filling: Filling | None = None
        self._device = device
        self._started = 0.0

    def batch_starts(self, batch_contexts: int) -> Iterator[int]:
        """The first context of every batch that these parts are made from."""
        for part in self._numbers:
            yield from range(part * self._size, self._end(part), batch_contexts)

    def wants(self, start: int) -> bool:
        """Whether a batch of contexts belongs to one of these parts; one that begins there may be finished by now."""
        part = start // self._size
        if part not in self._numbers:
            return False
        begins = start == part * self._size and not self._recompute
        if begins and (record := intact_record(self._storage, self._spec.ref, part)) is not None:
            self._found[part] = record
            self._numbers.remove(part)
        return part in self._numbers

    def stop_at(self, context: int) -> int:
        """Where the part ends that holds a context; the context itself when that part is not computed."""
        part = context // self._size
        return self._end(part) if part in self._numbers else context

    def put(self, start: int, contexts: Contexts, acts: dict[str, Tensor], shared: SharedRows) -> None:
        """Take the activations of a batch of contexts, if they belong to one of these parts.

        Args:
            start: number of the first context of the batch.
            contexts: those from `start` on; where a part begins there, all of the part's.
            acts: hook point -> activations. [contexts, T, d_in]

        Raises: InputError as Filling.put and rows_of_part, and whatever the write of an earlier part raised.
        """
        part = start // self._size
        if part not in self._numbers:
            return
        if self._filling is None:
            self._filling = self._open(part, contexts, shared)
        act = acts[self.hook_point]
        self._filling.put(act, start - part * self._size)
        if start + len(act) >= self._end(part):
            self._writes[part] = self._writing.submit(self._write, self._filling, self._started)
            self._filling = None

    def records(self) -> dict[int, Record]:
        """Wait for the parts. Returns: part -> record. Raises: what their writes raised."""
        return self._found | {part: written.result() for part, written in self._writes.items()}

    def _end(self, part: int) -> int:
        return min((part + 1) * self._size, int(self._plan["n_contexts"]))

    def _open(self, part: int, contexts: Contexts, shared: SharedRows) -> Filling:
        self._started = time.perf_counter()
        ids = self._plan["dropped_ids"]
        n_contexts = self._end(part) - part * self._size
        key = (part, n_contexts, self._spec.seed, *ids)
        if (rows := shared.get(key)) is None:
            rows = shared[key] = rows_of_part(self._spec, part, contexts[:n_contexts], ids)
        slot, before = len(self._writes) % 2, list(self._writes.values())[-2:]
        if len(before) == 2:
            before[0].result()  # it is what has this memory
        buffer = self._buffers[slot]
        if buffer is None or len(buffer) < rows.keep.size:
            shape, dtype = (rows.keep.size, self._plan["d_in"]), BUFFERS[self._spec.dtype]
            buffer = self._buffers[slot] = _buffer(shape, dtype, pinned=self._device.type == "cuda")
        return Filling(self._spec, part, rows, buffer)

    def _write(self, filling: Filling, started: float) -> Record:
        finished = filling.finish()
        with self._storage.staging() as folder:
            path, row_group_rows = folder / PART_FILE, int(self._plan["row_group_rows"])
            act, identity, encoding, counts = finished
            durable = self._storage.is_local
            metrics = write_rows(path, act, identity, row_group_rows, encoding, durable=durable) | counts
            seconds = time.perf_counter() - started
            part, device = filling.part, self._device
            return commit(self._storage, self._spec, folder, metrics, seconds=seconds, part=part, device=device)


def _buffer(shape: tuple[int, int], dtype: torch.dtype, pinned: bool) -> Tensor:
    """Memory for a part. numpy asks the system for large pages, torch does not: a quarter of the time to touch it all
    once, a tenth to give it back, and rows are picked from anywhere in it faster.
    """
    if pinned:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    return torch.from_numpy(np.empty(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
