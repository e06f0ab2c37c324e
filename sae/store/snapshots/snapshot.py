"""Snapshots: an ordered list of finished parts with their layouts inlined; what training and statistics pin."""

import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, overload

import numpy as np

from sae.config import Ref, Spec
from sae.errors import InputError, StoreError
from sae.store.artefacts.records import Record, commit, local_files, require_record
from sae.store.part.encoding import Encoding
from sae.store.part.writer import PartLayout, RowGroup
from sae.store.snapshots.moments import Sums, decode_vector, encode_vector
from sae.store.snapshots.part_sets import require_parts
from sae.store.snapshots.part_table import PART_FILE, PartTable
from sae.store.snapshots.part_table_file import read_table, write_tables
from sae.store.storage.filesystem import Storage

__all__ = ["PART_FILE", "Snapshot", "SnapshotPart", "SnapshotSpec", "commit_snapshot", "encode_vector", "read_snapshot"]

HEAD_FILE, TABLE_FILE = "snapshot.json", "snapshot.parquet"
KEPT_PARTS = 1024
"""Parts whose layouts are kept as objects: more than an order of rows mixes at a time."""


class SnapshotSpec(Spec):
    """A list of parts, named by the part sets they come from."""

    stage: ClassVar[str] = "activations"
    code_version: ClassVar[int] = 3

    parts: tuple[Ref, ...]
    """Part sets, one per segment."""
    n_tokens: int | None
    """At least this many tokens, in whole parts, taken from the part sets in order. None: all."""


@dataclass(frozen=True, eq=False)
class SnapshotPart:
    """One part of a snapshot."""

    ref: str
    part: int
    path: str
    """Of the Parquet file, relative to the root."""
    n_bytes: int
    n_rows: int
    row_group: Callable[[int], RowGroup]
    """Where one of its row groups lies: alone, where the layout would be thousands of them."""
    _make_encoding: Callable[[], Encoding]
    _make_layout: Callable[[Encoding], PartLayout]

    @functools.cached_property
    def encoding(self) -> Encoding:
        """What its stored values mean. For int8 the part's record is read: a scale and an offset for every dimension.

        Raises: as `require_record`; StoreError when the part was made anew and is another one now.
        """
        return self._make_encoding()

    @functools.cached_property
    def layout(self) -> PartLayout:
        """Where its row groups lie, and what its stored values mean. Raises: as `encoding`."""
        return self._make_layout(self.encoding)


class SnapshotParts(Sequence[SnapshotPart]):
    """The parts of a snapshot, in order. Each is made when it is asked for."""

    def __init__(self, storage: Storage, table: PartTable) -> None:
        self._storage, self.table = storage, table
        self._kept = functools.lru_cache(KEPT_PARTS)(self._make)

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> SnapshotPart: ...
    @overload
    def __getitem__(self, index: slice) -> list[SnapshotPart]: ...
    def __getitem__(self, index: int | slice) -> SnapshotPart | list[SnapshotPart]:
        if isinstance(index, slice):
            return [self._kept(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"part {index} of {len(self)}")
        return self._kept(int(index) % len(self))

    def __iter__(self) -> Iterator[SnapshotPart]:
        return map(self._kept, range(len(self)))

    def _make(self, index: int) -> SnapshotPart:
        table = self.table
        return SnapshotPart(
            ref=table.refs[table.part_set[index]],
            part=int(table.part[index]),
            path=table.path(index),
            n_bytes=int(table.n_bytes[index]),
            n_rows=int(table.n_rows[index]),
            row_group=functools.partial(table.row_group, index),
            _make_encoding=functools.partial(self._encoding, index),
            _make_layout=functools.partial(table.layout, index),
        )

    def _encoding(self, index: int) -> Encoding:
        table = self.table
        encoding = table.encoding(index)
        if encoding is None:
            record = require_record(self._storage, table.refs[table.part_set[index]], int(table.part[index]))
            if record.path(PART_FILE) != table.path(index):
                raise StoreError(
                    f"{self._storage.uri(table.path(index))}: its part was made anew with other bytes "
                    f"({record.content}). Delete the snapshot and what was built on it, and run extract again."
                )
            encoding = Encoding.model_validate(record.metrics["layout"]["encoding"])
        return encoding


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What a reader needs: every row group's place and hash, and the moments of the data."""

    ref: str
    d_in: int
    n_rows: int
    dtype: str
    parts: SnapshotParts
    mean: np.ndarray
    """Mean vector. [d_in] float64"""
    mean_sq_norm: float
    """E ||x - mean||^2, the variance summed over dimensions."""
    sums: Mapping[str, Any]
    """Counts and sums over all rows, under the names that the parts' records give them. Vectors are float64 arrays."""

    @property
    def refs(self) -> tuple[str, ...]:
        """The part sets that its parts come from, in order."""
        return self.parts.table.refs

    @property
    def part_rows(self) -> np.ndarray:
        """Rows of every part. [parts] int64"""
        return self.parts.table.n_rows

    @property
    def group_rows_flat(self) -> np.ndarray:
        """Rows of every row group, part after part. [row groups] int32"""
        return self.parts.table.group_rows

    @property
    def group_starts(self) -> np.ndarray:
        """Index in `group_rows_flat` of every part's first row group, and the end. [parts + 1] int64"""
        return self.parts.table.starts

    def group_rows(self, part: int) -> np.ndarray:
        """Rows of every row group of a part. [row groups of the part] int32"""
        return self.group_rows_flat[self.group_starts[part] : self.group_starts[part + 1]]

    @functools.cached_property
    def row_groups(self) -> list[list[int]]:
        """Rows of every row group, per part."""
        return [rows.tolist() for rows in np.split(self.group_rows_flat, self.group_starts[1:-1])]


def parts_wanted(plans: Sequence[Record], n_tokens: int | None) -> list[int]:
    """How many parts of each part set a snapshot of `n_tokens` takes.

    Args:
        plans: the part sets' records; their metrics say n_parts and tokens_per_part.
    """
    wanted, remaining = [], n_tokens
    for plan in plans:
        n_parts = int(plan.metrics["n_parts"])
        if remaining is not None:
            per_part = int(plan.metrics["tokens_per_part"])
            n_parts = min(n_parts, -(-remaining // per_part))
            remaining -= min(remaining, n_parts * per_part)
        wanted.append(n_parts)
    return wanted


def commit_snapshot(storage: Storage, spec: SnapshotSpec) -> Record:
    """Freeze the list of parts.

    Raises: StoreError when a part is not finished, or parts differ in width or dtype; DamagedError when a part's
        record is damaged or its file is missing; InputError when they hold no row.
    """
    started = time.perf_counter()
    plans = [require_record(storage, ref) for ref in spec.parts]
    counts = parts_wanted(plans, spec.n_tokens)
    sums = Sums()
    seen = {"n_parts": 0, "n_row_groups": 0, "n_rows": 0, "n_bytes": 0}
    kind: dict[str, Any] = {}

    def tables() -> Iterator[PartTable]:
        for plan, wanted in zip(plans, counts, strict=True):
            for group in require_parts(storage, plan.ref, int(plan.metrics["n_parts"]), wanted):
                sums.add(group.sums)
                kind.update(d_in=group.table.d_in, dtype=group.table.dtype)
                seen["n_parts"] += len(group.table)
                seen["n_row_groups"] += len(group.table.group_rows)
                seen["n_rows"] += int(group.table.n_rows.sum())
                seen["n_bytes"] += int(group.table.n_bytes.sum())
                yield group.table

    with storage.staging() as folder:
        write_tables(folder / TABLE_FILE, tables())
        n_rows = seen["n_rows"]
        if n_rows == 0:
            raise InputError(
                f"{spec.ref}: no rows in {seen['n_parts']} parts: the corpus has no context in this split. Add text, "
                f"or lower corpus.context_tokens."
            )
        merged = {"n_special": 0, "n_padding": 0} | sums.merged()
        mean = decode_vector(merged["sum"]) / n_rows
        mean_sq_norm = max(merged["sum_sq"] / n_rows - float(mean @ mean), 0.0)
        head = kind | seen | {"parts": list(spec.parts), "mean": encode_vector(mean), "mean_sq_norm": mean_sq_norm}
        (folder / HEAD_FILE).write_text(json.dumps(head | {"sums": merged}, indent=1) + "\n")
        counted = {name: value for name, value in merged.items() if name.startswith("n_")}
        metrics = counted | seen | kind | {"mean_sq_norm": mean_sq_norm}
        return commit(storage, spec, folder, metrics, seconds=time.perf_counter() - started)


def read_snapshot(storage: Storage, ref: str) -> Snapshot:
    """The snapshot at an address. Raises: StoreError when it is not there; DamagedError when its files are."""
    record = require_record(storage, ref)
    with local_files(storage, record) as folder:
        head = json.loads((folder / HEAD_FILE).read_text())
        table, _ = read_table(folder / TABLE_FILE)
    vectors = {name: decode_vector(value) for name, value in head["sums"].items() if isinstance(value, str)}
    return Snapshot(
        ref=ref,
        d_in=head["d_in"],
        n_rows=head["n_rows"],
        dtype=head["dtype"],
        parts=SnapshotParts(storage, table),
        mean=decode_vector(head["mean"]),
        mean_sq_norm=head["mean_sq_norm"],
        sums=head["sums"] | vectors,
    )
