"""Every stored byte against the commit records: several files at a time, a few megabytes of memory."""

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sae.errors import DamagedError, StoreError
from sae.progress import Progress, silent
from sae.store import layout
from sae.store.artefacts.files import stored_difference
from sae.store.artefacts.records import read_record
from sae.store.snapshots.snapshot import read_snapshot
from sae.store.storage.filesystem import Storage
from sae.store.threads import in_order
from sae.store.upkeep.collect import iter_refs

THREADS = 4
"""A disk is read at its speed by one or two, and hashing is faster than that; a bucket gains by each."""
_RECORD = re.compile(r"(?:record|part-(\d+))\.json")


class Target(NamedTuple):
    """One commit record."""

    ref: str
    part: int | None

    def __str__(self) -> str:
        return self.ref if self.part is None else f"{self.ref}/part-{self.part:05d}"


class Problem(NamedTuple):
    """One difference between what is stored and what was recorded."""

    target: Target
    text: str
    """Where, and what is wrong."""


class Checked(NamedTuple):
    """What became of one commit record and its files."""

    target: Target
    n_files: int
    n_bytes: int
    problems: tuple[Problem, ...]


def targets_of(storage: Storage, ref: str) -> list[Target]:
    """The artefact and its parts, as far as they have a record; of a snapshot also the parts it lists.

    Empty when there is none. Raises: StoreError when the snapshot's record is of a newer format.
    """
    found = [Target(ref, int(m[1]) if m[1] else None) for m in map(_RECORD.fullmatch, storage.list(ref)) if m]
    if ref.startswith("activations/"):
        with contextlib.suppress(DamagedError):  # told when it is verified
            if (record := read_record(storage, ref)) is not None:
                found += [target for parts in record.inputs.values() for target in targets_of(storage, parts)]
                found += [Target(part.ref, part.part) for part in read_snapshot(storage, ref).parts]
    return list(dict.fromkeys(found))


def all_targets(storage: Storage) -> list[Target]:
    """Every commit record of a root."""
    return list(dict.fromkeys(target for ref in iter_refs(storage) for target in targets_of(storage, ref)))


def verify_targets(
    storage: Storage, targets: Sequence[Target], *, threads: int = THREADS, progress: Progress = silent
) -> Iterator[Checked]:
    """Read every file that the records name and compare it with its recorded hash, in the order of the targets.

    A record that is missing or damaged is a problem like any other; so is one of a newer format, whose files are not
    looked at.

    Raises: TransientError when storage fails in a way that may pass; StoreError when a file may not be read.
    """
    n_bytes = 0
    checked = in_order(functools.partial(_verify, storage), targets, threads, "verify")
    for done, each in enumerate(checked):
        n_bytes += each.n_bytes
        progress(done + 1, len(targets), "records", f"{n_bytes / 1e9:.2f} GB read")
        yield each


def _verify(storage: Storage, target: Target) -> Checked:
    def problem(text: str) -> Checked:
        return Checked(target, 0, 0, (Problem(target, text),))

    try:
        record = read_record(storage, target.ref, target.part)
    except StoreError as err:
        return problem(str(err))
    if record is None:
        return problem(f"{storage.uri(layout.record_path(target.ref, target.part))}: missing, so it was never finished")
    problems = []
    for entry in record.files:
        path = f"{record.folder}/{entry.name}"
        if difference := stored_difference(storage, path, entry):
            problems.append(Problem(target, f"{storage.uri(path)}: {difference}"))
    return Checked(target, len(record.files), sum(entry.n_bytes for entry in record.files), tuple(problems))
