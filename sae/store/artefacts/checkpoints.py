"""Checkpoints of an artefact in the making: named tensors and a small JSON position, from which a later call goes on.

<ref>/checkpoints/<attempt>/step-00000100.safetensors   the tensors, written first
<ref>/checkpoints/<attempt>/step-00000100.json          the pointer, written after it: position and hashes

Several processes that make an artefact together (`Group`) each write a share of the tensors' rows beside it,

<ref>/checkpoints/<attempt>/step-00000100.part-00003.safetensors

the first writes what is not shared and, once all are there, the pointer with the hashes of all. Share p of P of n rows
are the rows [n p // P, n (p + 1) // P), so another number of processes reads the parts in which its own rows lie.

The files are written in a thread, from a copy of the tensors, while the work goes on. What processes must tell each
other for the pointer they tell later, between two steps (`commit`). A death before that leaves files that no pointer
names, and the checkpoint before.

Every training call is an attempt with a random id and writes only under it, so neither a predecessor that is still
dying nor a second run of the same work can harm it. All of them read the newest checkpoint that is whole, whoever
wrote it. A data file that no pointer names never happened.

Checkpoints lie under the artefact's fingerprint, a digest of spec and code version: one that belongs to another spec
or another code version lies elsewhere and is never found. What is found but does not fit is refused by `restore`.
"""

import json
import logging
import shutil
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import MappingProxyType
from typing import Generic, NamedTuple

import torch
from torch import Tensor

from sae.errors import StoreError, TransientError
from sae.store import layout
from sae.store.artefacts.checkpoint_files import CheckpointFiles, P, Pointer, Position, Saved, attempts
from sae.store.artefacts.group import ALONE, Group, Rows
from sae.store.storage.filesystem import Storage

__all__ = ["Checkpoints", "Position", "new_attempt", "remove_checkpoints"]

logger = logging.getLogger(__name__)

KEEP = 2
"""The newest, and one before it in case that is damaged."""

_NOTHING: Mapping[str, bytes] = MappingProxyType({})

Restore = Callable[[dict[str, Tensor], P], None]
"""Puts a checkpoint in place. Raises: StoreError when it does not fit, before anything is changed."""


def new_attempt() -> str:
    """A random id for one training call; a sweep shares one."""
    return uuid.uuid4().hex[:16]


class _Begun(NamedTuple):
    """A checkpoint that does not count yet."""

    saved: Saved
    position: Position
    written: "Future[dict[str, str]]"
    """Hashes of this process's files, by path."""


class Checkpoints(Generic[P]):
    """The checkpoints of one artefact as one attempt sees them: it reads everybody's and writes its own.

    Several processes make the same calls of it, at the same time.

    Args:
        ref: the artefact, `stage/fingerprint`.
        position: the type of position that is read back.
        attempt: from `new_attempt`, the same in all processes of the group.
        group: the processes that make the artefact together.
        rows: what this process has of the tensors that are shared by rows; None: every process has all.
    """

    def __init__(
        self,
        storage: Storage,
        ref: str,
        position: type[P],
        attempt: str,
        group: Group = ALONE,
        rows: Rows | None = None,
    ) -> None:
        self.storage, self.ref, self.attempt, self._group, self._rows = storage, ref, attempt, group, rows
        self._position = position
        self._files = CheckpointFiles(storage, ref)
        self._found: set[Saved] = set()
        """What others had written when this attempt began."""
        self._resumed: Saved | None = None
        self._own: list[Saved] = []
        self._begun: _Begun | None = None

    def load(self, restore: Restore[P]) -> P | None:
        """Go on from the newest checkpoint of any attempt that is whole and that `restore` takes.

        The others are passed over with a warning. All processes of a group take the same one.

        Args:
            restore: is given this process's rows of what is shared by rows, whoever wrote them.

        Returns: its position, None when there is none.
        """
        refused: set[Saved] = set()
        vanished: set[Saved] = set()
        while True:
            self._found, pointers = self._files.list(but=self.attempt)
            for saved in self._as_first_sees(pointers - refused):
                failed: StoreError | None = None
                try:
                    position, tensors = self._read(saved)
                except StoreError as err:
                    failed = err
                if not self._group.agree(failed is not None):
                    try:
                        restore(tensors, position)
                    except StoreError as err:
                        failed = err
                    if not self._group.agree(failed is not None):
                        self._resumed = saved
                        logger.info("%s: going on from the checkpoint of step %d", self.ref, saved.step)
                        return position
                gone = saved not in vanished and not self.storage.exists(self._files.pointer(saved))
                if self._group.agree(gone):
                    # Its owner is alive and deleted it after writing newer ones: look for those.
                    vanished.add(saved)
                    break
                refused.add(saved)
                uri, reason = self._uri(saved), failed or "another process could not read it"
                logger.warning("checkpoint %s is passed over: %s", uri, " ".join(str(reason).split()))
            else:
                return None

    def begin(self, tensors: Mapping[str, Tensor], position: P, beside: Mapping[str, bytes] = _NOTHING) -> None:
        """Begin to write a checkpoint, in a thread and from a copy: the caller goes on and changes the tensors.

        It counts once it is committed, as the one before it is first: at most one is on its way. So `begin` waits when
        writing takes longer than the work between two of them.

        Args:
            beside: small files for people who watch, written into the attempt's folder by the first process.

        Raises: as `commit`.
        """
        self.commit()
        if not self._has(position.step):
            share = self._share(tensors, Saved(position.step, self.attempt))
            self._write({path: _copied(rows) for path, rows in share.items()}, position, beside)

    def save(self, tensors: Mapping[str, Tensor], position: P, beside: Mapping[str, bytes] = _NOTHING) -> None:
        """Write a checkpoint and wait until it counts. Arguments and errors: as of `begin`."""
        self.commit()
        if not self._has(position.step):
            self._write(self._share(tensors, Saved(position.step, self.attempt)), position, beside)
            self.commit()

    @property
    def writing(self) -> bool:
        """Whether this process still writes one: `commit` would wait for it."""
        return self._begun is not None and not self._begun.written.done()

    def commit(self) -> None:
        """Let the checkpoint that was begun count once all processes have written it; delete those it supersedes.

        Of its own and the one it resumed from, the newest two stay. Others that lay there when this attempt began go
        once it has come as far; what was written since belongs to an attempt that is alive.

        Raises: what writing failed with; on the processes that could write, TransientError.
        """
        if self._begun is None:
            return
        (saved, position, written), self._begun = self._begun, None
        hashes: dict[str, str] = {}
        error: Exception | None = None
        try:
            hashes = written.result()
        except Exception as err:
            error = err
        if self._group.agree(error is not None):
            raise error or TransientError(
                f"{self.ref}: another process could not write its part of the checkpoint of step {saved.step}: "
                f"its own error says why."
            )
        parts: list[str] = []
        if self._group.world > 1:
            # The upper half of the hash and the lower: numbers that are told are below 2^63.
            halves = divmod(int(hashes[self._files.part(saved, self._group.share)], 16), 1 << 32)
            parts = [f"{high << 32 | low:016x}" for high, low in zip(*map(self._group.collect, halves), strict=True)]
        self._group.once(
            lambda: self._files.write_pointer(saved, Pointer.of(position, hashes[self._files.data(saved)], parts))
        )
        self._own.append(saved)
        self._prune()

    def close(self) -> None:
        """Wait until nothing is written any more, when the work has failed.

        A process alone lets a checkpoint that was begun count. Several cannot agree on that any more.
        """
        try:
            if self._group.world == 1:
                self.commit()
            elif self._begun is not None:
                self._begun.written.result()
        except Exception as err:  # the one that ends the work is passed on
            logger.warning("%s: a checkpoint was not written: %r", self.ref, err)

    def _has(self, step: int) -> bool:
        return Saved(step, self.attempt) in self._own or (self._resumed is not None and self._resumed.step == step)

    def _share(self, tensors: Mapping[str, Tensor], saved: Saved) -> dict[str, Mapping[str, Tensor]]:
        """What this process writes of them, by file."""
        if self._group.world == 1:
            return {self._files.data(saved): tensors}
        has = self._rows.has if self._rows else lambda name: False
        rows = self._rows.to_write(self._group) if self._rows else slice(0)
        part = {name: tensor[rows] for name, tensor in tensors.items() if has(name)}
        share: dict[str, Mapping[str, Tensor]] = {self._files.part(saved, self._group.share): part}
        if self._group.rank == 0:
            share[self._files.data(saved)] = {name: tensor for name, tensor in tensors.items() if not has(name)}
        return share

    def _write(self, share: Mapping[str, Mapping[str, Tensor]], position: P, beside: Mapping[str, bytes]) -> None:
        folder = layout.checkpoint_folder(self.ref, self.attempt)

        def write() -> dict[str, str]:
            hashes = {path: self._files.write_tensors(path, tensors) for path, tensors in share.items()}
            if self._group.rank == 0:
                for name, data in beside.items():
                    self._files.write(f"{folder}/{name}", data)
            return hashes

        thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._begun = _Begun(Saved(position.step, self.attempt), position, thread.submit(write))
        thread.shutdown(wait=False)  # the thread ends when it has written

    @property
    def newest(self) -> str | None:
        """The address of the newest checkpoint that this attempt has written or gone on from."""
        candidates = [*self._own, *([self._resumed] if self._resumed else [])]
        return self._uri(max(candidates)) if candidates else None

    def _as_first_sees(self, pointers: set[Saved]) -> list[Saved]:
        """Newest first: what the first process has found, for all."""
        text = self._group.tell(json.dumps(sorted(pointers, reverse=True)))
        return [Saved(step, attempt) for step, attempt in json.loads(text)]

    def _read(self, saved: Saved) -> tuple[P, dict[str, Tensor]]:
        """Raises: StoreError when it is not whole."""
        pointer, position = self._files.read_pointer(saved, self._position)
        tensors = self._files.read_tensors(self._files.data(saved), pointer.xxh3)
        if self._rows is None:
            return position, tensors
        own = self._rows.own
        if not pointer.parts:
            return position, {name: tensors[name][own] if self._rows.has(name) else tensors[name] for name in tensors}
        found: list[dict[str, Tensor]] = []
        for part, xxh3 in enumerate(pointer.parts):
            share = self._rows.share(part, len(pointer.parts))
            first, end = max(share.start, own.start), min(share.stop, own.stop)
            if first < end:
                rows = self._files.read_tensors(self._files.part(saved, part), xxh3)
                inside = slice(first - share.start, end - share.start)
                found.append({name: tensor[inside] for name, tensor in rows.items()})
        return position, tensors | {name: torch.cat([rows[name] for rows in found]) for name in found[0]}

    def _prune(self) -> None:
        candidates = {*self._own, *([self._resumed] if self._resumed else [])}
        kept = sorted(candidates, reverse=True)[:KEEP]
        newest = self._own[-1]
        for saved in sorted(candidates | self._found):
            if saved in kept or saved.step > newest.step:
                continue
            if self._group.rank == 0:
                self._files.remove(saved)
            self._found.discard(saved)
            if saved in self._own:
                self._own.remove(saved)
            elif saved == self._resumed:
                self._resumed = None

    def _uri(self, saved: Saved) -> str:
        return self.storage.uri(self._files.pointer(saved))


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the host. From a GPU into page-locked memory, all of them in one wait."""
    copies = {}
    for name, tensor in tensors.items():
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies[name] = host.copy_(tensor.detach(), non_blocking=True)
    for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return copies


def remove_checkpoints(storage: Storage, ref: str) -> None:
    """Delete the work in progress of a finished artefact, that of all attempts."""
    for attempt in attempts(storage, ref):
        for name in storage.list(layout.checkpoint_folder(ref, attempt)):
            storage.remove(f"{layout.checkpoint_folder(ref, attempt)}/{name}")
    if storage.is_local:
        shutil.rmtree(storage.full(layout.checkpoint_folder(ref)), ignore_errors=True)
