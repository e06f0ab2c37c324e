"""What nothing in a root needs: found by listing, dated by the storage's own clock, deleted one thing at a time.

Garbage is what killed work leaves: files whose record was never created, checkpoints of finished artefacts, staging
folders, torn uploads. Only names that the layout gives are looked at; whatever else lies in a root is left alone. What
has changed within the grace period is never garbage, and files that a running writer has put and not yet recorded stay
his for as long as he lives (claims.py).
"""

import re
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from sae.config import FrozenConfig
from sae.errors import StoreError
from sae.progress import Progress, silent
from sae.store import layout
from sae.store.artefacts import claims
from sae.store.artefacts.records import read_record
from sae.store.storage.filesystem import Storage
from sae.store.threads import in_order

GRACE_SECONDS = 24 * 3600.0
TEMPORARY_SECONDS = 3600.0
"""The least age of a temporary file, whatever the grace period: probes, and notes of collectors at work, are some."""
DELETES_IN_FLIGHT = 16

Kind = Literal["unrecorded files", "checkpoints", "staging", "temporary file", "damaged record", "torn upload"]

_STAGE, _FINGERPRINT = re.compile(r"[a-z]+"), re.compile(r"[0-9a-f]{16}")
_RECORD = r"(?:record|part-(?P<part>\d{5,}))\.json"
_IN_ARTEFACT = re.compile(
    rf"(?P<record>{_RECORD})"
    rf"|(?P<aside>{_RECORD.replace('part>', 'aside_part>')})\.damaged-[0-9a-f]+"
    rf"|(?P<temporary>(?:.*/)?(?:\.[^/]+\.[0-9a-f]{{8}}|{re.escape(layout.COLLECTED)}[0-9a-f]{{32}}))"
    r"|(?P<content>(?:part-(?P<content_part>\d{5,})/)?[0-9a-f]{16})/.+"
    r"|(?P<attempt>checkpoints/[0-9a-f]+)/.+",
    re.DOTALL,
)
"""What the layout puts into an artefact's folder, relative to it."""
_PROBE = re.compile(rf"{re.escape(layout.STAGING)}/probe-[0-9a-f]{{32}}")


class Garbage(FrozenConfig):
    """One thing to delete."""

    kind: Kind
    path: str
    """Of a file, or of a folder that goes with all its files; relative to the root."""
    n_files: int
    n_bytes: int
    """0 for a torn upload: nobody tells its size."""
    changed: float
    """When anything in it last did, in seconds since 1970 by the storage's clock."""
    age_seconds: float
    upload: str | None = None
    """The id of a torn upload."""


class Sum(NamedTuple):
    """Files of one folder, taken together."""

    n_files: int = 0
    n_bytes: int = 0
    newest: float = 0.0


def iter_refs(storage: Storage) -> Iterator[str]:
    """Addresses of everything that has a folder in the root, finished or not, in order."""
    for stage in filter(_STAGE.fullmatch, storage.list("")):
        for fingerprint in filter(_FINGERPRINT.fullmatch, storage.list(stage)):
            yield f"{stage}/{fingerprint}"


class Contents:
    """One artefact's folder by what is in it, from one listing."""

    def __init__(self, storage: Storage, ref: str) -> None:
        self.ref = ref
        self.records: set[int | None] = set()
        """Parts that have a commit record; None: the artefact itself."""
        self.set_aside: dict[str, tuple[int | None, Sum]] = {}
        """Damaged records by path, and whose they were."""
        self.contents: dict[str, tuple[int | None, Sum]] = {}
        """Folders of files by path, and of which part they are."""
        self.checkpoints: dict[str, Sum] = {}
        self.temporary: dict[str, Sum] = {}
        self.n_bytes = 0
        for file in storage.walk(ref):
            self.n_bytes += file.n_bytes
            found = _IN_ARTEFACT.fullmatch(file.path.removeprefix(f"{ref}/"))
            one = Sum(1, file.n_bytes, file.modified)
            if found is None:
                continue
            if found["record"]:
                self.records.add(_number(found["part"]))
            elif found["aside"]:
                self.set_aside[file.path] = _number(found["aside_part"]), one
            elif found["temporary"]:
                self.temporary[file.path] = one
            elif found["content"]:
                path, part = f"{ref}/{found['content']}", _number(found["content_part"])
                self.contents[path] = part, _plus(self.contents.get(path, (part, Sum()))[1], one)
            else:
                path = f"{ref}/{found['attempt']}"
                self.checkpoints[path] = _plus(self.checkpoints.get(path, Sum()), one)


def find_garbage(
    storage: Storage,
    grace_seconds: float = GRACE_SECONDS,
    *,
    damaged_records: bool = False,
    progress: Progress = silent,
) -> Iterator[Garbage]:
    """Everything that no record names and nothing has touched within the grace period; nothing is deleted.

    Args:
        damaged_records: also damaged records that were set aside. Without, the files that only they name stay too.

    Raises: StoreError, TransientError as Storage.
    """
    now = storage.now()
    for path in storage.abandoned_staging():
        total = Sum()
        for file in storage.walk(path):
            total = _plus(total, Sum(1, file.n_bytes, file.modified))
        yield _garbage("staging", path, total, now)
    for file in storage.walk(layout.STAGING):
        if _PROBE.fullmatch(file.path) and now - file.modified >= max(grace_seconds, TEMPORARY_SECONDS):
            yield _garbage("temporary file", file.path, Sum(1, file.n_bytes, file.modified), now)
    refs = list(iter_refs(storage))
    for done, ref in enumerate(refs):
        for each in _find_in_artefact(storage, Contents(storage, ref), now, damaged_records):
            least = max(grace_seconds, TEMPORARY_SECONDS) if each.kind == "temporary file" else grace_seconds
            if each.age_seconds >= least:
                yield each
        progress(done + 1, len(refs), "artefacts")
    for file, upload in storage.torn_uploads():
        if now - file.modified >= grace_seconds:
            found = _garbage("torn upload", file.path, Sum(1, 0, file.modified), now)
            yield found.model_copy(update={"upload": upload})


def delete_all(storage: Storage, found: Iterable[Garbage]) -> Iterator[tuple[Garbage, bool]]:
    """Delete many things, several at a time.

    Yields: each, in order, and whether it is gone. Raises: as delete_garbage.
    """
    yield from in_order(lambda each: (each, delete_garbage(storage, each)), found, DELETES_IN_FLIGHT, "gc")


def delete_garbage(storage: Storage, found: Garbage) -> bool:
    """Delete one thing, unless it has changed since it was found.

    Returns: False when somebody owns it now; what was deleted until that turned out, its owner puts back.
    Raises: StoreError, TransientError as Storage.
    """
    if found.kind == "staging":
        return storage.remove_abandoned_staging(found.path)
    if found.kind == "torn upload":
        assert found.upload
        storage.abort_upload(found.path, found.upload)
        return True
    if found.kind in ("temporary file", "damaged record"):
        storage.remove(found.path)
        return True
    ref = "/".join(found.path.split("/")[:2])
    deleted = _delete_folder(storage, ref, found)
    storage.remove_empty_folders(ref)
    return deleted


def _delete_folder(storage: Storage, ref: str, found: Garbage) -> bool:
    """Delete the files of a content folder, or of an attempt's checkpoints, while nobody owns them."""

    def is_dead() -> bool:
        if any(file.modified > found.changed for file in storage.walk(found.path) if not _is_note(file.path)):
            return False
        if found.kind == "checkpoints":
            return _is_finished(storage, ref)
        part = _number(m[1]) if (m := re.search(r"/part-(\d+)/", found.path)) else None
        return not _is_named(storage, ref, part, found.path)

    with claims.collecting(storage, found.path, is_dead) as may_delete:
        for file in list(storage.walk(found.path)):
            if _is_note(file.path):
                continue
            if not may_delete():
                return False
            storage.remove(file.path)
        return may_delete()


def _find_in_artefact(storage: Storage, there: Contents, now: float, damaged_records: bool) -> Iterator[Garbage]:
    n_contents: dict[int | None, int] = {}
    for part, _ in there.contents.values():
        n_contents[part] = n_contents.get(part, 0) + 1
    kept = set() if damaged_records else {part for part, _ in there.set_aside.values()}
    for path, (part, total) in sorted(there.contents.items()):
        if part in there.records:
            # The only content of a finished part is the one its record names; no need to read a million of them.
            if n_contents[part] > 1 and not _is_named(storage, there.ref, part, path):
                yield _garbage("unrecorded files", path, total, now)
        elif part not in kept:
            yield _garbage("unrecorded files", path, total, now)
    if there.checkpoints and _is_finished(storage, there.ref):
        for path, total in sorted(there.checkpoints.items()):
            yield _garbage("checkpoints", path, total, now)
    for path, total in sorted(there.temporary.items()):
        yield _garbage("temporary file", path, total, now)
    if damaged_records:
        for path, (_, total) in sorted(there.set_aside.items()):
            yield _garbage("damaged record", path, total, now)


def _is_named(storage: Storage, ref: str, part: int | None, folder: str) -> bool:
    """Whether the record names the files of a content folder, or cannot be read: then it might."""
    try:
        record = read_record(storage, ref, part)
    except StoreError:
        return True
    return record is not None and record.folder == folder


def _is_finished(storage: Storage, ref: str) -> bool:
    try:
        return read_record(storage, ref) is not None
    except StoreError:
        return False


def _is_note(path: str) -> bool:
    return path.rpartition("/")[2].startswith(layout.COLLECTED)


def _garbage(kind: Kind, path: str, total: Sum, now: float) -> Garbage:
    return Garbage(
        kind=kind,
        path=path,
        n_files=total.n_files,
        n_bytes=total.n_bytes,
        changed=total.newest,
        age_seconds=max(now - total.newest, 0.0),
    )


def _plus(total: Sum, one: Sum) -> Sum:
    return Sum(total.n_files + one.n_files, total.n_bytes + one.n_bytes, max(total.newest, one.newest))


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)
