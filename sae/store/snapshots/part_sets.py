"""Which parts of a part set are finished, and what their records say: also where there are a million.

A finished part has a commit record, and its file lies there with the recorded size. One paged listing of the part set
tells which records and which files there are. What the records say is read from them, many at a time. In a set of more
than MAX_GROUPS parts that would be too many requests, so there parts are extracted in groups of consecutive parts, and
whoever finishes a group puts what its records say into one small file, the group's index.

An index is no proof of anything: an entry counts while the listing shows the part's record and the file that the entry
names, in its size. Its name holds a hash of its bytes, so two writers cannot harm each other, and a damaged one is
recognized and passed over. Deleting all of them costs time only.
"""

import io
import json
import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from sae.errors import DamagedError
from sae.store import layout
from sae.store.artefacts.record import AGAIN, Record
from sae.store.artefacts.records import read_record, require_record
from sae.store.snapshots.moments import merge_sums
from sae.store.snapshots.part_table import PART_FILE, PartTable, table_of
from sae.store.snapshots.part_table_file import read_table, write_tables
from sae.store.storage.filesystem import Storage
from sae.store.threads import in_order

logger = logging.getLogger(__name__)

MAX_GROUPS = 10_000
"""Groups of a part set: so many small files are read for a snapshot, and so many tasks extract the parts."""
READS_IN_FLIGHT = 32
INDEX_VERSION = "1"

_RECORD = re.compile(r"part-(\d+)\.json")
_FILE = re.compile(rf"part-(\d+)/([0-9a-f]{{16}})/{re.escape(PART_FILE)}")
_INDEX = re.compile(r"index/(\d+)-(\d+)-([0-9a-f]{16})\.parquet")


class PartGroup(NamedTuple):
    """Consecutive finished parts."""

    table: PartTable
    sums: dict[str, Any]
    """Their records' counts and sums, merged."""


def groups_of(n_parts: int, wanted: int | None = None) -> list[range]:
    """How a set of `n_parts` parts is divided: each part by itself, or groups of equal size in a large set.

    Args:
        wanted: so many of its parts, the first ones; all by default. The division is that of the whole set.
    """
    size = max(1, -(-n_parts // MAX_GROUPS))
    stop = n_parts if wanted is None else min(wanted, n_parts)
    return [range(start, min(start + size, stop)) for start in range(0, stop, size)]


def finished_parts(storage: Storage, ref: str, n_parts: int) -> np.ndarray:
    """Which of a set's parts are finished, their files there in their recorded sizes. [n_parts] bool

    What is damaged is logged, and not finished. Raises: StoreError when a record is of a newer format.
    """
    stored = _list(storage, ref, n_parts)
    finished = np.zeros(n_parts, bool)

    def look(group: range) -> np.ndarray:
        index = _read_index(storage, ref, group, stored)
        held = index.table.part[stored.holds(index.table)] if index else np.zeros(0, np.int32)
        others = np.setdiff1d(np.flatnonzero(stored.has_record[group.start : group.stop]) + group.start, held)
        records = []
        for part in others.tolist():
            try:
                record = read_record(storage, ref, part)
            except DamagedError as err:
                logger.warning("%s", err)
            else:
                records += [record] if record else []
        if not records:
            return held
        table = table_of(records)
        there = stored.holds(table)
        for missing in np.flatnonzero(~there).tolist():
            logger.warning("%s: missing, or not of its recorded size", storage.uri(table.path(missing)))
        return np.concatenate([held, table.part[there]])

    for parts in in_order(look, groups_of(n_parts), READS_IN_FLIGHT, "records"):
        finished[parts] = True
    return finished


def require_parts(storage: Storage, ref: str, n_parts: int, wanted: int) -> Iterator[PartGroup]:
    """The first `wanted` parts of a set, in order, in groups.

    Raises: StoreError when one was never finished; DamagedError when its record is damaged, or its file is missing or
        of another size.
    """
    stored = _list(storage, ref, n_parts)

    def read(group: range) -> PartGroup:
        index = _read_index(storage, ref, group, stored)
        if index is not None and stored.holds(index.table).all():
            return index
        records = [require_record(storage, ref, part) for part in group]
        found = _group(records)
        for missing in np.flatnonzero(~stored.holds(found.table)):
            path = found.table.path(int(missing))
            raise DamagedError(
                f"{storage.uri(path)}: missing, or not of its recorded size. {AGAIN}", ref, group[int(missing)]
            )
        return found

    yield from in_order(read, groups_of(n_parts, wanted), READS_IN_FLIGHT, "records")


def write_index(storage: Storage, ref: str, n_parts: int, parts: range) -> None:
    """Repeat in one file what the records of finished parts say, when they are one of the set's groups.

    A group of one part needs no index. Raises: StoreError when a part was never finished.
    """
    if len(parts) < 2 or parts not in groups_of(n_parts):
        return
    records = list(in_order(lambda part: require_record(storage, ref, part), parts, READS_IN_FLIGHT, "records"))
    path, data = index_file(_group(records))
    storage.replace(path, data)


def index_file(group: PartGroup) -> tuple[str, bytes]:
    """The path and the bytes of a group's index."""
    table, buffer = group.table, io.BytesIO()
    sums = json.dumps(group.sums, sort_keys=True)
    write_tables(buffer, [table], {"sae.index": INDEX_VERSION, "sae.sums": sums})
    data = buffer.getvalue()
    first, last = int(table.part[0]), int(table.part[-1])
    return layout.index_path(table.refs[0], first, last, xxhash.xxh3_64_hexdigest(data)), data


class _Stored:
    """What a listing shows of a part set."""

    def __init__(self, n_parts: int) -> None:
        self.has_record = np.zeros(n_parts, bool)
        self.indexes: dict[tuple[int, int], list[str]] = {}
        """First and last part -> the hashes that files are named by."""
        self._content = np.zeros(n_parts, np.uint64)
        self._n_bytes = np.full(n_parts, -1, np.int64)
        self._others: dict[tuple[int, int], int] = {}
        """(part, content) -> bytes, of second files: whoever came second was killed before it removed its own."""

    def note(self, name: str, n_bytes: int) -> None:
        """One file of the part set's folder."""
        if (match := _RECORD.fullmatch(name)) and (part := int(match[1])) < len(self.has_record):
            self.has_record[part] = True
        elif (match := _FILE.fullmatch(name)) and (part := int(match[1])) < len(self.has_record):
            if self._n_bytes[part] >= 0:
                self._others[part, int(match[2], 16)] = n_bytes
            else:
                self._content[part], self._n_bytes[part] = int(match[2], 16), n_bytes
        elif match := _INDEX.fullmatch(name):
            self.indexes.setdefault((int(match[1]), int(match[2])), []).append(match[3])

    def holds(self, table: PartTable) -> np.ndarray:
        """Which parts of a table have a record and the file that the table names, in its size. [parts] bool"""
        part = table.part
        same = (self._content[part] == table.content) & (self._n_bytes[part] == table.n_bytes)
        for index in np.flatnonzero(~same) if self._others else ():
            key = int(part[index]), int(table.content[index])
            same[index] = self._others.get(key) == table.n_bytes[index]
        return same & self.has_record[part]


def _list(storage: Storage, ref: str, n_parts: int) -> _Stored:
    stored = _Stored(n_parts)
    folder = layout.artefact_folder(ref)
    for file in storage.walk(folder):
        stored.note(file.path.removeprefix(f"{folder}/"), file.n_bytes)
    return stored


def _read_index(storage: Storage, ref: str, group: range, stored: _Stored) -> PartGroup | None:
    """What an index says of exactly this group; None when there is none that can be read."""
    for xxh3 in sorted(stored.indexes.get((group[0], group[-1]), ())):
        path = layout.index_path(ref, group[0], group[-1], xxh3)
        data = storage.read_if_there(path)
        if data is None or xxhash.xxh3_64_hexdigest(data) != xxh3:
            logger.warning("%s: damaged; the parts' own records are read", storage.uri(path))
            continue
        try:
            table, metadata = read_table(io.BytesIO(data))
        except (pa.ArrowException, KeyError) as err:  # its hash is right: another version's
            logger.warning("%s: cannot be read (%s); the parts' own records are", storage.uri(path), err)
            continue
        if metadata.get("sae.index") == INDEX_VERSION and np.array_equal(table.part, group) and table.refs == (ref,):
            return PartGroup(table, json.loads(metadata["sae.sums"]))
    return None


def _group(records: Sequence[Record]) -> PartGroup:
    return PartGroup(table_of(records), merge_sums(record.metrics for record in records))
