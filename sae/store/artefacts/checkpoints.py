"""Checkpoints of an artefact in the making: named tensors and a small JSON position, from which a later call goes on.

<ref>/checkpoints/<attempt>/step-00000100.safetensors   the tensors, written first
<ref>/checkpoints/<attempt>/step-00000100.json          the pointer, written after it: position and hashes

Several processes that make an artefact together (`Group`) each write a share of the tensors' rows beside it,

<ref>/checkpoints/<attempt>/step-00000100.part-00003.safetensors

the first writes what is not shared and, once all are there, the pointer with the hashes of all. Share p of P of n rows
are the rows [n p // P, n (p + 1) // P), so another number of processes reads the parts in which its own rows lie.

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
from typing import Generic

import torch
from torch import Tensor

from sae.errors import StoreError
from sae.store import layout
from sae.store.artefacts.checkpoint_files import CheckpointFiles, P, Pointer, Position, Saved, attempts
from sae.store.artefacts.group import ALONE, Group, Rows
from sae.store.storage.filesystem import Storage

__all__ = ["Checkpoints", "Position", "new_attempt", "remove_checkpoints"]

logger = logging.getLogger(__name__)

KEEP = 2
"""The newest, and one before it in case that is damaged."""

Restore = Callable[[dict[str, Tensor], P], None]
"""Puts a checkpoint in place. Raises: StoreError when it does not fit, before anything is changed."""


def new_attempt() -> str:
    """A random id for one training call; a sweep shares one."""
    return uuid.uuid4().hex[:16]


class Checkpoints(Generic[P]):
    """The checkpoints of one artefact as one attempt sees them: it reads everybody's and writes its own.

    Args:
        ref: the artefact, `stage/fingerprint`.
        position: the type of position that is read back.
        attempt: from `new_attempt`, the same in all processes of the group.
        group: the processes that make the artefact together; all of them save and load at the same time.
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

    def save(self, tensors: Mapping[str, Tensor], position: P) -> None:
        """Write a checkpoint, then delete those that it makes superfluous.

        Of its own and the one it resumed from, the newest two stay. Others that lay there when this attempt began go
        once it has come as far; what was written since belongs to an attempt that is alive.
        """
        saved = Saved(position.step, self.attempt)
        if saved in self._own or (self._resumed is not None and self._resumed.step == saved.step):
            return
        hashes: list[str] = []
        if self._group.world > 1 and self._rows is not None:
            shared = {name: tensors[name] for name in tensors if self._rows.has(name)}
            tensors = {name: tensor for name, tensor in tensors.items() if name not in shared}
            rows = self._rows.to_write(self._group)
            part = {name: tensor[rows] for name, tensor in shared.items()}
            xxh3 = self._files.write_tensors(self._files.part(saved, self._group.share), part)
            # The upper half of the hash and the lower: numbers that are told are below 2^63.
            halves = divmod(int(xxh3, 16), 1 << 32)
            hashes = [f"{high << 32 | low:016x}" for high, low in zip(*map(self._group.collect, halves), strict=True)]
        self._group.once(lambda: self._write_for_all(saved, tensors, position, hashes))
        self._own.append(saved)
        self._prune()

    def _write_for_all(self, saved: Saved, tensors: Mapping[str, Tensor], position: P, hashes: list[str]) -> None:
        xxh3 = self._files.write_tensors(self._files.data(saved), tensors)
        self._files.write_pointer(saved, Pointer.of(position, xxh3, hashes))

    @property
    def newest(self) -> str | None:
        """The address of the newest checkpoint that this attempt has written or gone on from."""
        candidates = [*self._own, *([self._resumed] if self._resumed else [])]
        return self._uri(max(candidates)) if candidates else None

    def save_beside(self, name: str, data: bytes) -> None:
        """Write a small file for people who watch into the attempt's folder."""
        self._files.write(f"{layout.checkpoint_folder(self.ref, self.attempt)}/{name}", data)

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


def remove_checkpoints(storage: Storage, ref: str) -> None:
    """Delete the work in progress of a finished artefact, that of all attempts."""
    for attempt in attempts(storage, ref):
        for name in storage.list(layout.checkpoint_folder(ref, attempt)):
            storage.remove(f"{layout.checkpoint_folder(ref, attempt)}/{name}")
    if storage.is_local:
        shutil.rmtree(storage.full(layout.checkpoint_folder(ref)), ignore_errors=True)
