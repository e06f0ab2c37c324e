"""A second shuffle, over all parts of a snapshot: deal the rows of every part to buckets, then put each bucket together
from its pieces, mix it and write it as a part of the remixed set.

One task deals one part, another gathers one bucket, and neither holds more than that in memory. The dealt parts are
work in progress: a part set like any other while it is needed, removed when the remixed one is finished.
"""

import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from sae.errors import StoreError
from sae.extract.config import DealtPartsSpec, RemixSpec
from sae.extract.deal import Deal, count_buckets
from sae.extract.write import write_rows
from sae.philox import philox
from sae.progress import Progress, silent
from sae.store.artefacts.records import Record, commit, require_record
from sae.store.part.encoding import Encoding, choose_encoding, decode, encode_as, stored_dtype
from sae.store.part.writer import write_part
from sae.store.reading.reader import RowGroupReader
from sae.store.snapshots.snapshot import PART_FILE, Snapshot, SnapshotSpec, commit_snapshot, read_snapshot
from sae.store.storage.filesystem import Storage
from sae.store.threads import in_order

SUM_ROWS = 1 << 16
"""Rows whose identities are hashed at once."""
READ_BYTES = 64 << 20
"""Vectors read at once, so that many requests are on their way where they take time."""
N_REQUESTS = 16
"""Records read at once, or files deleted."""

Group = tuple[int, int]
"""A row group: the part's index in a snapshot, and its own in the part."""


def dealt_snapshot(spec: RemixSpec) -> SnapshotSpec:
    """What the buckets of a remix are read from."""
    return SnapshotSpec(parts=(DealtPartsSpec(remix=spec).ref,), n_tokens=None)


def count_parts(storage: Storage, spec: RemixSpec) -> tuple[int, int]:
    """How many parts there are to deal, and how many the remixed set gets. Raises: ConfigError as count_buckets."""
    metrics = require_record(storage, spec.source).metrics
    n_buckets = count_buckets(metrics["n_rows"], _row_bytes(metrics["d_in"], metrics["dtype"]), spec.part_bytes)
    return metrics["n_parts"], n_buckets


def deal_part(storage: Storage, spec: DealtPartsSpec, part: int, *, progress: Progress = silent) -> Record:
    """Write one part of the source with its rows grouped by bucket, bit for bit as they are stored.

    Memory: the rows of the part, 20 bytes each beside the vector; READ_BYTES or a row group; blocks of constant size.

    Args:
        part: its index in the source.

    Raises: DamagedError as RowGroupReader.read_into.
    """
    started = time.perf_counter()
    source = read_snapshot(storage, spec.remix.source)
    entry = source.parts[part]
    deal = _deal(source, spec.remix)
    random = philox("remix: deal", spec.remix.seed, entry.ref, entry.part)
    places = deal.destination(part, random.permutation(entry.n_rows))
    groups = [(part, group) for group in range(len(source.group_rows(part)))]
    act, identity = _read(storage, source, groups, places, progress)
    with storage.staging() as folder:
        layout = write_part(
            folder / PART_FILE,
            act,
            *identity,
            row_group_rows=deal.row_groups(part),
            encoding=entry.encoding,
            durable=storage.is_local,
        )
        # Sums over the rows are those of the source's part: they are the same rows.
        metrics = require_record(storage, entry.ref, entry.part).metrics | {
            "layout": layout.model_dump(mode="json"),
            "identity_sum": _hex(identity_sum(identity)),
        }
        return commit(storage, spec, folder, metrics, seconds=time.perf_counter() - started, part=part)


def finish_dealing(storage: Storage, spec: DealtPartsSpec) -> list[Record]:
    """Commit the dealt parts as a set, and as the snapshot that buckets are read from.

    Raises: StoreError when one of them is not there.
    """
    n_parts, _ = count_parts(storage, spec.remix)
    with storage.staging() as folder:
        record = commit(storage, spec, folder, {"n_parts": n_parts}, seconds=0.0)
    return [record, commit_snapshot(storage, dealt_snapshot(spec.remix))]


def gather_part(storage: Storage, spec: RemixSpec, part: int, *, progress: Progress = silent) -> Record:
    """Read what one bucket got of every part, mix it and write it as a part.

    Rows keep their bits where the parts they come from have one encoding. Where those differ, values are brought to an
    encoding of their own, chosen from them as for a part that is extracted.

    Memory: the rows of the bucket, 20 bytes each beside the vector; READ_BYTES or a row group; blocks of constant size.

    Raises: StoreError when rows have not been dealt; DamagedError as RowGroupReader.read_into.
    """
    started = time.perf_counter()
    dealt = read_snapshot(storage, dealt_snapshot(spec).ref)
    deal = _deal(dealt, spec)
    groups = [(source, group) for source in range(len(dealt.parts)) for group in deal.groups_of(source, part)]
    places = philox("remix: gather", spec.seed, spec.source, part).permutation(deal.bucket_rows(part))
    act, identity = _read(storage, dealt, groups, places, progress)
    encoding = _bring_to_one_encoding(act, dealt, groups, places)
    with storage.staging() as folder:
        path, group_rows = folder / PART_FILE, _row_group_rows(dealt, spec)
        metrics = write_rows(path, act, identity, group_rows, encoding, durable=storage.is_local)
        metrics["identity_sum"] = _hex(identity_sum(identity))
        return commit(storage, spec, folder, metrics, seconds=time.perf_counter() - started, part=part)


def finish_remix(storage: Storage, spec: RemixSpec) -> Record:
    """Commit the remixed parts as a set, once they are known to hold the rows that were dealt, each once.

    Raises: StoreError when they do not, or one of them is not there.
    """
    started = time.perf_counter()
    n_dealt, n_parts = count_parts(storage, spec)
    dealt = _count_rows(storage, DealtPartsSpec(remix=spec).ref, n_dealt)
    gathered = _count_rows(storage, spec.ref, n_parts)
    if dealt != gathered:
        raise StoreError(
            f"{storage.uri(spec.ref)}: its parts hold {gathered[0]} rows (sum of hashes {_hex(gathered[1])}), but "
            f"{dealt[0]} rows ({_hex(dealt[1])}) were dealt. Delete the folder and run extract again."
        )
    metrics = {
        "n_parts": n_parts,
        "n_rows": gathered[0],
        "identity_sum": _hex(gathered[1]),
        "n_source_parts": n_dealt,
    }
    with storage.staging() as folder:
        return commit(storage, spec, folder, metrics, seconds=time.perf_counter() - started)


def remove_dealt(storage: Storage, spec: RemixSpec) -> None:
    """Delete the work in progress of a finished remix."""
    for ref in (dealt_snapshot(spec).ref, DealtPartsSpec(remix=spec).ref):
        files = storage.sizes(ref)
        # Records first: a file that no record names harms nobody, a record without its files is damage.
        for names in ([name for name in files if "/" not in name], [name for name in files if "/" in name]):
            for _ in in_order(storage.remove, [f"{ref}/{name}" for name in names], N_REQUESTS, "removals"):
                pass
        storage.remove_empty_folders(ref)


def identity_sum(identity: np.ndarray) -> int:
    """The sum of a hash of every row's seq, pos and token, modulo 2**64.

    It is the same in any order, and another one when a row is lost, repeated or altered.

    Args:
        identity: [3, rows] int32
    """
    total = 0
    for start in range(0, identity.shape[1], SUM_ROWS):
        seq, pos, token = identity[:, start : start + SUM_ROWS].view(np.uint32).astype(np.uint64)
        total += int(_mixed(_mixed(seq << np.uint64(32) | pos) + token).sum(dtype=np.uint64))
    return total % 2**64


def _mixed(x: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit numbers that looks random: the finalizer of splitmix64 (Steele et al. 2014). [n] uint64"""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hex(number: int) -> str:
    return f"{number:016x}"


def _count_rows(storage: Storage, ref: str, n_parts: int) -> tuple[int, int]:
    """Rows of a part set, and the sum of their hashes."""
    n_rows = total = 0
    for record in in_order(lambda part: require_record(storage, ref, part), range(n_parts), N_REQUESTS, "records"):
        n_rows += record.metrics["n_rows"]
        total += int(record.metrics["identity_sum"], 16)
    return n_rows, total % 2**64


def _deal(snapshot: Snapshot, spec: RemixSpec) -> Deal:
    """How the rows of a snapshot, the source or its dealt parts, are dealt."""
    n_buckets = count_buckets(snapshot.n_rows, _row_bytes(snapshot.d_in, snapshot.dtype), spec.part_bytes)
    first_bucket = int(philox("remix: first bucket", spec.seed, spec.source).integers(n_buckets))
    return Deal(snapshot.part_rows, n_buckets, _row_group_rows(snapshot, spec), first_bucket)


def _row_group_rows(snapshot: Snapshot, spec: RemixSpec) -> int:
    return max(1, spec.row_group_bytes // _row_bytes(snapshot.d_in, snapshot.dtype))


def _row_bytes(d_in: int, dtype: str) -> int:
    return d_in * stored_dtype(dtype).itemsize


def _read(
    storage: Storage, snapshot: Snapshot, groups: Sequence[Group], places: np.ndarray, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """Row groups of a snapshot, every row at its place.

    Args:
        places: where each row goes, in the order in which they are read. [rows] int64

    Returns: stored values [rows, d_in], and seq, pos and token [3, rows].
    """
    dtype, row_bytes = stored_dtype(snapshot.dtype), _row_bytes(snapshot.d_in, snapshot.dtype)
    act, identity = np.empty((len(places), snapshot.d_in), dtype), np.empty((3, len(places)), np.int32)
    reader = RowGroupReader(storage, snapshot)
    try:
        for batch in _batches(_each(snapshot, groups, places), row_bytes):
            blocks = [(*group, np.empty((len(rows), snapshot.d_in), dtype)) for group, rows in batch]
            reader.read_many(blocks)
            identities = reader.read_identities([group for group, _ in batch])
            for (part, _, block), (_, rows), columns in zip(blocks, batch, identities, strict=True):
                act[rows] = block
                identity[:, rows] = columns
                progress(part + 1, len(snapshot.parts), "parts")
    finally:
        reader.close()
    return act, identity


def _batches(groups: Iterable[tuple[Group, np.ndarray]], row_bytes: int) -> Iterator[list[tuple[Group, np.ndarray]]]:
    """Row groups that are read at once: of READ_BYTES together, or a single one."""
    batch: list[tuple[Group, np.ndarray]] = []
    n_rows = 0
    for group, rows in groups:
        if batch and (n_rows + len(rows)) * row_bytes > READ_BYTES:
            yield batch
            batch, n_rows = [], 0
        batch.append((group, rows))
        n_rows += len(rows)
    if batch:
        yield batch


def _each(snapshot: Snapshot, groups: Sequence[Group], places: np.ndarray) -> Iterator[tuple[Group, np.ndarray]]:
    """Row groups with the places of their rows."""
    start = 0
    for part, group in groups:
        stop = start + int(snapshot.group_rows(part)[group])
        yield (part, group), places[start:stop]
        start = stop


def _bring_to_one_encoding(
    act: np.ndarray, snapshot: Snapshot, groups: Sequence[Group], places: np.ndarray
) -> Encoding:
    """Encode rows of several parts, in place, as those of one part.

    Returns: their encoding; where all parts have the same one, that, and no value is touched.
    """
    encodings = {part: snapshot.parts[part].encoding for part, _ in groups}
    first, *others = dict.fromkeys(encodings.values())
    if not others:
        return first

    def decoded() -> Iterator[tuple[np.ndarray, Tensor]]:
        for (part, _), rows in _each(snapshot, groups, places):
            yield rows, decode(torch.from_numpy(act[rows]), encodings[part])

    low, high = torch.full((snapshot.d_in,), torch.inf), torch.full((snapshot.d_in,), -torch.inf)
    for _, values in decoded():
        low, high = torch.minimum(low, values.amin(0)), torch.maximum(high, values.amax(0))
    encoding = choose_encoding(first.dtype, low, high)
    for rows, values in decoded():
        act[rows] = encode_as(values, encoding)
    return encoding
