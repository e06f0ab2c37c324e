"""Snapshots: an ordered list of finished parts with their records inlined; what training and statistics pin."""

import base64
import json
import time
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import ConfigDict

from sae.config import FrozenConfig, Ref, Spec
from sae.errors import InputError
from sae.store.filesystem import Storage
from sae.store.records import Record, commit, local_files, require_record
from sae.store.writer import PartLayout

PART_FILE = "part.parquet"


class SnapshotSpec(Spec):
    """A list of parts, named by the part sets they come from."""

    stage: ClassVar[str] = "activations"
    code_version: ClassVar[int] = 3

    parts: tuple[Ref, ...]
    """Part sets, one per segment."""
    n_tokens: int | None
    """At least this many tokens, in whole parts, taken from the part sets in order. None: all."""


class SnapshotPart(FrozenConfig):
    """One part of a snapshot."""

    ref: str
    part: int
    path: str
    """Of the Parquet file, relative to the root."""
    n_bytes: int
    layout: PartLayout


class Snapshot(FrozenConfig):
    """What a reader needs: every row group's place and hash, and the moments of the data."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    ref: str
    d_in: int
    n_rows: int
    dtype: str
    parts: tuple[SnapshotPart, ...]
    mean: np.ndarray
    """Mean vector. [d_in] float64"""
    mean_sq_norm: float
    """E ||x - mean||^2, the variance summed over dimensions."""

    @property
    def row_groups(self) -> list[list[int]]:
        """Rows of every row group, per part."""
        return [[group.n_rows for group in part.layout.row_groups] for part in self.parts]


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
    """Freeze the list of parts. Raises: StoreError when a part is not finished; InputError when they hold no row."""
    started = time.perf_counter()
    plans = [require_record(storage, ref) for ref in spec.parts]
    counts = parts_wanted(plans, spec.n_tokens)
    records = [
        require_record(storage, ref, part)
        for ref, n_parts in zip(spec.parts, counts, strict=True)
        for part in range(n_parts)
    ]
    parts = [_part(record) for record in records]
    n_rows = sum(part.layout.n_rows for part in parts)
    if n_rows == 0:
        raise InputError(
            f"{spec.ref}: no rows in {len(parts)} parts: the corpus has no context in this split. Add text, or lower "
            f"corpus.context_tokens."
        )
    sums = np.sum([_vector(record.metrics["sum"]) for record in records], axis=0)
    mean = sums / n_rows
    total_sq = sum(float(record.metrics["sum_sq"]) for record in records)
    mean_sq_norm = max(total_sq / n_rows - float(mean @ mean), 0.0)
    content = {
        "d_in": parts[0].layout.d_in,
        "n_rows": n_rows,
        "dtype": parts[0].layout.dtype,
        "mean": encode_vector(mean),
        "mean_sq_norm": mean_sq_norm,
        "parts": [part.model_dump(mode="json") for part in parts],
    }
    metrics = {
        "n_rows": n_rows,
        "n_parts": len(parts),
        "n_bytes": sum(part.n_bytes for part in parts),
        "d_in": content["d_in"],
        "dtype": content["dtype"],
        "n_special": sum(int(record.metrics.get("n_special", 0)) for record in records),
        "n_padding": sum(int(record.metrics.get("n_padding", 0)) for record in records),
        "mean_sq_norm": mean_sq_norm,
    }
    with storage.staging() as folder:
        (folder / "snapshot.json").write_text(json.dumps(content, indent=1) + "\n")
        return commit(storage, spec, folder, metrics, seconds=time.perf_counter() - started)


def read_snapshot(storage: Storage, ref: str) -> Snapshot:
    """The snapshot at an address. Raises: StoreError when it is not there."""
    record = require_record(storage, ref)
    with local_files(storage, record) as folder:
        content = json.loads((folder / "snapshot.json").read_text())
    return Snapshot(
        ref=ref,
        d_in=content["d_in"],
        n_rows=content["n_rows"],
        dtype=content["dtype"],
        parts=tuple(SnapshotPart.model_validate(part) for part in content["parts"]),
        mean=_vector(content["mean"]),
        mean_sq_norm=content["mean_sq_norm"],
    )


def encode_vector(values: np.ndarray) -> str:
    """A float64 vector as base64 of its little-endian bytes: exact and short in JSON."""
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f8").tobytes()).decode()


def _vector(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype="<f8")


def _part(record: Record) -> SnapshotPart:
    (entry,) = (entry for entry in record.files if entry.name == PART_FILE)
    return SnapshotPart(
        ref=record.ref,
        part=int(record.part or 0),
        path=record.path(PART_FILE),
        n_bytes=entry.n_bytes,
        layout=PartLayout.model_validate(record.metrics["layout"]),
    )
