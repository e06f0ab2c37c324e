"""Commit records: the only proof that an artefact exists.

Files are written first, the record last, by an exclusive create. No record, not finished; a file that no record names
never happened. The first record wins: a second writer of the same artefact keeps the winner's record. Files lie in a
folder named by the digest of their content, so writers with equal bytes write equal names and cannot harm each other.

Nothing stored is trusted before it was compared with its record, and a record holds a checksum of itself. What is
missing or differs is a DamagedError that names the artefact; computing it again and committing it puts the recorded
bytes back under the recorded names.
"""

import contextlib
import fcntl
import json
import logging
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from sae.config import Spec, digest
from sae.errors import DamagedError, StoreError, TransientError
from sae.store import layout
from sae.store.artefacts import claims
from sae.store.artefacts.files import FileEntry, entry_of, local_difference, size_difference, stored_difference
from sae.store.artefacts.provenance import provenance
from sae.store.artefacts.record import AGAIN, Record, decode, encode
from sae.store.storage.filesystem import Storage

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_PART_RECORD = re.compile(r"part-(\d+)\.json")
_SETTING_ASIDE = threading.Lock()


def read_record(storage: Storage, ref: str, part: int | None = None) -> Record | None:
    """The commit record of an artefact, or None when it was never finished.

    Raises: DamagedError when the record is not what was written; StoreError when it is of a newer format.
    """
    path = layout.record_path(ref, part)
    data = storage.read_if_there(path)
    if data is None:
        return None
    return decode(data, storage.uri(path), ref, part)


def require_record(storage: Storage, ref: str, part: int | None = None) -> Record:
    """The commit record of an input. Raises: StoreError when it is not there, and as `read_record`."""
    record = read_record(storage, ref, part)
    if record is None:
        raise StoreError(
            f"{storage.uri(layout.record_path(ref, part))}: not there, so the artefact was never finished. "
            f"Run the stage that makes it (the same command without --only)."
        )
    return record


def is_intact(storage: Storage, ref: str, part: int | None = None) -> bool:
    """Whether there is an `intact_record`. Raises: as that."""
    return intact_record(storage, ref, part) is not None


def intact_record(storage: Storage, ref: str, part: int | None = None) -> Record | None:
    """The commit record of an artefact whose files are all there in their recorded sizes; contents are not read.

    Raises: StoreError when its record is of a newer format.
    """
    try:
        record = read_record(storage, ref, part)
    except DamagedError as err:
        logger.warning("%s", err)
        return None
    if record is None:
        return None
    sizes = storage.sizes(record.folder) if record.files else {}
    for entry in record.files:
        if (difference := size_difference(sizes.get(entry.name), entry)) is not None:
            logger.warning("%s: %s", storage.uri(record.path(entry.name)), difference)
            return None
    return record


def commit(
    storage: Storage,
    spec: Spec,
    folder: Path,
    metrics: dict[str, Any],
    *,
    seconds: float,
    part: int | None = None,
    device: "torch.device | str" = "cpu",
) -> Record:
    """Put the files of `folder` in the store and commit them, or restore from them what is finished and damaged.

    Args:
        folder: a staging folder that holds exactly the artefact's files (sub-folders allowed).
        metrics: sizes and headline numbers, a function of the content.
        seconds: how long the work took.
        part: number of the part, for artefacts made of parts.
        device: what has computed.

    Returns: the record that counts: the one that was there before, when there was one.
    Raises: StoreError when a finished record of the same spec names other bytes; what is stored stays as it is.
    """
    entries = tuple(entry_of(folder, path) for path in sorted(p for p in folder.rglob("*") if p.is_file()))
    record = Record(
        ref=spec.ref,
        part=part,
        code_version=spec.code_version,
        spec=spec.model_dump(mode="json"),
        inputs=spec.inputs,
        content=digest([entry.model_dump() for entry in entries]),
        files=entries,
        metrics=metrics,
        produced=provenance(seconds, device),
    )
    existing = _standing_record(storage, record)
    if existing is not None:
        _refuse_other_content(storage, existing, record)
        _restore(storage, existing, folder)
        return existing
    with storage.holding(record.folder) if entries else contextlib.nullcontext():
        for entry in entries:
            # Whatever lies there already is a killed predecessor's, perhaps torn, or the same bytes.
            storage.put_file(folder / entry.name, f"{record.folder}/{entry.name}")
        created = storage.create_exclusive(layout.record_path(spec.ref, part), encode(record))
    if created:
        claims.keep(storage, record, folder)
        return record
    winner = require_record(storage, spec.ref, part)
    if winner.content != record.content:  # equal content: the files just put are the winner's too
        for entry in entries:
            storage.remove(f"{record.folder}/{entry.name}")
    _refuse_other_content(storage, winner, record)
    return winner


@contextlib.contextmanager
def local_files(storage: Storage, record: Record, *names: str) -> Iterator[Path]:
    """A local folder that holds the artefact's files, compared with their hashes: in place, or a download.

    Args:
        names: the files wanted; all by default. On a local root others may be there too.

    Raises: DamagedError when a file is missing or is not what the record says; StoreError for a name that the record
        does not have.
    """
    for name in names:
        record.path(name)
    wanted = [entry for entry in record.files if not names or entry.name in names]
    if storage.is_local:
        folder = Path(storage.full(record.folder))
        for entry in wanted:
            _check_file(storage, record, entry, folder)
        yield folder
        return
    with storage.staging() as folder:
        for entry in wanted:
            target = folder / entry.name
            target.parent.mkdir(parents=True, exist_ok=True)
            path = f"{record.folder}/{entry.name}"
            try:
                storage.fetch(path, target.parent)
            except StoreError:
                if storage.exists(path):
                    raise
            _check_file(storage, record, entry, folder)
        yield folder


def verify(storage: Storage, record: Record) -> list[str]:
    """Every difference between what is stored and an artefact's record, its parts' included; read in full.

    Returns: one line for each file or record; empty when all is well.
    """
    problems = []
    numbers: list[int | None] = [record.part]
    if record.part is None:
        matches = map(_PART_RECORD.fullmatch, storage.list(layout.artefact_folder(record.ref)))
        numbers += [int(match[1]) for match in matches if match]
    for number in numbers:
        try:
            stored = read_record(storage, record.ref, number)
        except DamagedError as err:
            problems.append(str(err))
            continue
        if stored is None:
            problems.append(f"{storage.uri(layout.record_path(record.ref, number))}: missing")
            continue
        for entry in stored.files:
            path = f"{stored.folder}/{entry.name}"
            if difference := stored_difference(storage, path, entry):
                problems.append(f"{storage.uri(path)}: {difference}")
    return problems


def _standing_record(storage: Storage, record: Record) -> Record | None:
    """The record in whose place `record` would be written; a damaged one is set aside first.

    Raises: StoreError when a damaged record still says that it named other content.
    """
    ref, part = record.ref, record.part
    try:
        return read_record(storage, ref, part)
    except DamagedError:
        pass
    # Two writers must not both set aside: the second would take away the first one's new record. A bucket has no
    # such lock; there a moment remains between the second look and the removal.
    with _SETTING_ASIDE, _locked(storage, layout.artefact_folder(ref)):
        try:
            return read_record(storage, ref, part)
        except DamagedError as err:
            path = layout.record_path(ref, part)
            data = storage.read_bytes(path)
            _refuse_other_claim(err, data, record)
            aside = layout.damaged_path(path, xxhash.xxh3_64_hexdigest(data)[:8])
            if storage.is_local:
                os.replace(storage.full(path), storage.full(aside))
            else:
                storage.create_exclusive(aside, data)  # equal bytes were set aside before where there is one
                storage.remove(path)
            logger.warning("%s: damaged; set aside as %s", storage.uri(path), aside.rpartition("/")[2])
            return None


@contextlib.contextmanager
def _locked(storage: Storage, folder: str) -> Iterator[None]:
    """Hold the lock of a local folder; it ends with the process."""
    if not storage.is_local:
        yield
        return
    descriptor = os.open(storage.full(folder), os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # network file systems that cannot lock a folder
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _refuse_other_claim(err: DamagedError, data: bytes, record: Record) -> None:
    """Refuse to replace a damaged record of other content. One flipped bit cannot change both content and files."""
    try:
        fields = json.loads(data.decode())
    except ValueError:
        return
    if not isinstance(fields, dict) or not {"content", "files"} <= fields.keys():
        return
    if fields["content"] != record.content and fields["files"] != [entry.model_dump() for entry in record.files]:
        raise StoreError(
            f"{err} But the same work gave other bytes now (content {record.content}; the damaged record names "
            f"{fields['content']}). Both are kept apart: nothing was changed. To replace it, delete its folder and "
            f"what was built on it."
        ) from err


def _refuse_other_content(storage: Storage, existing: Record, record: Record) -> None:
    if existing.content == record.content:
        return
    differing = sorted({entry.name for entry in {*existing.files} ^ {*record.files}})
    raise StoreError(
        f"{storage.uri(layout.record_path(record.ref, record.part))}: the same work gave other bytes in "
        f"{', '.join(differing[:3])}{', …' if len(differing) > 3 else ''} "
        f"(recorded: {existing.produced.environment}; now: {record.produced.environment}). The recorded artefact is "
        f"kept. To replace it, delete its folder and what was built on it."
    )


def _restore(storage: Storage, record: Record, folder: Path) -> None:
    """Put back, from equal files in `folder`, what is missing or differs."""
    for entry in record.files:
        path = f"{record.folder}/{entry.name}"
        try:
            difference = stored_difference(storage, path, entry)
        except TransientError as err:  # a bad sector is damage too, and equal bytes harm nobody
            difference = str(err)
        if difference:
            storage.put_file(folder / entry.name, path)
            logger.warning("%s: restored (%s)", storage.uri(path), difference)


def _check_file(storage: Storage, record: Record, entry: FileEntry, folder: Path) -> None:
    if difference := local_difference(folder / entry.name, entry):
        uri = storage.uri(f"{record.folder}/{entry.name}")
        raise DamagedError(f"{uri}: {difference}. {AGAIN}", record.ref, record.part)
