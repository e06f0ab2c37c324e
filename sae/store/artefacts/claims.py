"""Files that are put and not yet recorded: how a writer keeps them, and how a collector may still take dead ones.

A commit puts files, then creates the record that names them. In between no record speaks for the files, and their age
says little: a writer may have been suspended with its machine for days.

On a local root the writer holds a shared lock of the content folder until the record is there, and the collector takes
an exclusive one or leaves the folder alone. The kernel gives a dead writer's lock up, so neither clocks nor process ids
matter. (Where a network file system cannot lock folders, the collector's grace period is what there is.)

A bucket has no locks. There both leave a note before they look for the other's, as in Dekker's algorithm: the
collector's is an object in the content folder, the writer's is the record itself.

    collector:  write note     -> is there a record?  yes: leave all; no: delete files -> delete note
    writer:     create record  -> is there a note?    wait until it is gone -> put back what is missing

Reads after writes are consistent, so at least one of them sees the other. Deletes that come late (a collector stopped
in the middle) are covered by a lease: a collector that has worked for LEASE_SECONDS asks for the record again before it
goes on, and a writer waits twice as long before it takes a collector for dead.
"""

import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from sae.store.artefacts.record import Record
from sae.store.layout import COLLECTED
from sae.store.storage.filesystem import Storage

logger = logging.getLogger(__name__)

LEASE_SECONDS = 30.0
POLL_SECONDS = 0.2


@contextlib.contextmanager
def collecting(storage: Storage, folder: str, is_dead: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
    """Keep writers and collector of one content folder apart while the block deletes its files.

    Args:
        is_dead: looks at the store anew: whether no record names the folder's files and none of them is young.

    Yields: `may_delete()`, to be asked before every file: False once somebody owns the folder.
    """
    with storage.taking(folder) as taken:
        if not taken:
            yield lambda: False
            return
        note = f"{folder}/{COLLECTED}{uuid.uuid4().hex}"
        if not storage.is_local:
            storage.replace(note, b"")
        try:
            yield _Lease(is_dead)
        finally:
            if not storage.is_local:
                storage.remove(note)


class _Lease:
    """Asks again when the last answer is old."""

    def __init__(self, is_dead: Callable[[], bool]) -> None:
        self._is_dead, self._answer, self._asked = is_dead, False, float("-inf")

    def __call__(self) -> bool:
        now = time.monotonic()
        if now - self._asked > LEASE_SECONDS:
            self._asked, self._answer = now, self._is_dead()
        return self._answer


def keep(storage: Storage, record: Record, staged: Path) -> None:
    """Put back what a collector deleted of a record's files before it could see the record; on a bucket, else nothing.

    Args:
        record: just created.
        staged: the folder that its files were uploaded from.
    """
    if storage.is_local or not record.files:
        return
    deadline = time.monotonic() + 2 * LEASE_SECONDS
    while True:
        found = {file.path.removeprefix(f"{record.folder}/"): file.n_bytes for file in storage.walk(record.folder)}
        notes = [name for name in found if name.startswith(COLLECTED)]
        if not notes or time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    for entry in record.files:
        if found.get(entry.name) != entry.n_bytes:
            storage.put_file(staged / entry.name, record.path(entry.name))
            logger.warning("%s: put again; it was taken for abandoned", storage.uri(record.path(entry.name)))
    for name in notes:  # of a collector that died
        storage.remove(f"{record.folder}/{name}")
