"""Parts as the store reads them: exact round trips, damage found and never taken for data."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae.errors import DamagedError, StoreError, TransientError
from sae.store.part.encoding import Dtype, decode, encode, stored_dtype
from sae.store.reading.blocks import iter_rows
from sae.store.reading.reader import RowGroupReader
from sae.store.storage.filesystem import Storage
from tests.conftest import MakeSnapshot

duckdb = pytest.importorskip("duckdb")
pl = pytest.importorskip("polars")


def rewrite_with_pyarrow(path: Path) -> None:
    pq.write_table(pq.read_table(path), path, compression="snappy", row_group_size=17)


def rewrite_with_duckdb(path: Path) -> None:
    new = path.with_suffix(".new")
    duckdb.sql(f"copy (select * from '{path}') to '{new}' (format parquet, compression zstd)")
    new.replace(path)


def rewrite_with_polars(path: Path) -> None:
    pl.read_parquet(path).write_parquet(path, compression="zstd", row_group_size=17)


REWRITE = {"pyarrow": rewrite_with_pyarrow, "duckdb": rewrite_with_duckdb, "polars": rewrite_with_polars}
DTYPES: tuple[Dtype, ...] = ("float16", "float32", "bfloat16", "int8")


def test_rows_come_back_in_order_from_disk_and_memory(
    storage: Storage, memory_storage: Storage, make_snapshot: MakeSnapshot
) -> None:
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((n, 16)).astype(np.float16) for n in (100, 64, 1)]
    for place in (storage, memory_storage):
        snapshot = make_snapshot(place, parts, row_group_rows=32)
        blocks = [(block.act.copy(), block.seq.copy()) for block in iter_rows(place, snapshot)]
        assert np.array_equal(np.concatenate([b[0] for b in blocks]), np.concatenate(parts))
        assert np.array_equal(np.concatenate([b[1] for b in blocks]), np.arange(165))
        only = [block.act.copy() for block in iter_rows(place, snapshot, parts=[1])]
        assert np.array_equal(np.concatenate(only), parts[1])


def test_moments_of_a_snapshot_are_those_of_its_rows(storage: Storage, make_snapshot: MakeSnapshot) -> None:
    rng = np.random.default_rng(0)
    parts = [(rng.standard_normal((n, 5)) + 3).astype(np.float16) for n in (40, 17)]
    snapshot = make_snapshot(storage, parts)
    rows = np.concatenate(parts).astype(np.float64)
    assert np.allclose(snapshot.mean, rows.mean(0), rtol=1e-12)
    assert np.isclose(snapshot.mean_sq_norm, ((rows - rows.mean(0)) ** 2).sum(1).mean(), rtol=1e-9)


def damaged_part(storage: Storage, make_snapshot: MakeSnapshot) -> tuple:
    act = np.random.default_rng(0).standard_normal((100, 8)).astype(np.float16)
    snapshot = make_snapshot(storage, [act], row_group_rows=50)
    return act, snapshot, Path(storage.full(snapshot.parts[0].path))


def test_a_flipped_bit_is_found_and_named(storage: Storage, make_snapshot: MakeSnapshot) -> None:
    _, snapshot, path = damaged_part(storage, make_snapshot)
    offset = snapshot.parts[0].layout.row_groups[1].offset
    data = bytearray(path.read_bytes())
    data[offset + 17] ^= 4
    path.write_bytes(bytes(data))
    reader = RowGroupReader(storage, snapshot)
    out = np.empty((50, 8), np.float16)
    reader.read_into(0, 0, out)
    with pytest.raises(
        DamagedError, match=rf"part\.parquet: row group 1: vectors .* offset {offset}\).*damaged"
    ) as error:
        reader.read_into(0, 1, out)
    assert (error.value.ref, error.value.part) == (snapshot.parts[0].ref, 0)
    reader.close()


def test_a_truncated_part_is_found(storage: Storage, make_snapshot: MakeSnapshot) -> None:
    _, snapshot, path = damaged_part(storage, make_snapshot)
    path.write_bytes(path.read_bytes()[:600])
    reader = RowGroupReader(storage, snapshot)
    with pytest.raises(StoreError, match="row group 1"):
        reader.read_into(0, 1, np.empty((50, 8), np.float16))
    reader.close()


def test_a_missing_part_is_named(storage: Storage, make_snapshot: MakeSnapshot) -> None:
    _, snapshot, path = damaged_part(storage, make_snapshot)
    path.unlink()
    with pytest.raises(DamagedError, match="missing, though the snapshot") as error:
        RowGroupReader(storage, snapshot).read_into(0, 0, np.empty((50, 8), np.float16))
    assert (error.value.ref, error.value.part) == (snapshot.parts[0].ref, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_every_dtype_come_back_as_what_was_encoded(
    storage: Storage, make_snapshot: MakeSnapshot, dtype: Dtype
) -> None:
    rng = np.random.default_rng(0)
    parts = [(rng.standard_normal((100, 6)) * scale).astype(np.float32) for scale in (1, 1e5)]  # the second is scaled
    snapshot = make_snapshot(storage, parts, row_group_rows=32, dtype=dtype)
    stored, encodings = zip(*[encode(torch.from_numpy(part), dtype) for part in parts], strict=True)
    assert tuple(part.layout.encoding for part in snapshot.parts) == encodings
    kinds = (np.float16, np.float32) if dtype == "float16" else (np.float32, np.float32)
    reader = RowGroupReader(storage, snapshot)
    for index, (part, kind) in enumerate(zip(stored, kinds, strict=True)):
        expected = decode(torch.from_numpy(part), encodings[index]).numpy()
        blocks = [block.act.copy() for block in iter_rows(storage, snapshot, [index])]
        assert {block.dtype for block in blocks} == {np.dtype(kind)}
        assert np.array_equal(np.concatenate(blocks), expected)
        raw = np.empty((4, 6), stored_dtype(dtype))
        reader.read_into(index, 3, raw)
        assert np.array_equal(raw, part[96:])
        assert np.array_equal(reader.read_act(index, 3), expected[96:])
    reader.close()


@pytest.mark.parametrize("row_group_size", [50, 7, 30, 100])
def test_a_part_rewritten_by_another_tool_still_reads(
    storage: Storage, make_snapshot: MakeSnapshot, row_group_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    act, snapshot, path = damaged_part(storage, make_snapshot)
    pq.write_table(pq.read_table(path), path, compression="zstd", row_group_size=row_group_size)
    blocks = [(block.act.copy(), block.seq) for block in iter_rows(storage, snapshot)]
    assert np.array_equal(np.concatenate([block[0] for block in blocks]), act)
    assert np.array_equal(np.concatenate([block[1] for block in blocks]), np.arange(100))
    assert caplog.text.count("re-written by another tool") == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tool", list(REWRITE))
def test_a_part_of_any_dtype_rewritten_by_any_tool_still_reads(
    storage: Storage, make_snapshot: MakeSnapshot, dtype: Dtype, tool: str, caplog: pytest.LogCaptureFixture
) -> None:
    act = (np.random.default_rng(0).standard_normal((100, 8)) * 1e5).astype(np.float32)
    snapshot = make_snapshot(storage, [act], row_group_rows=30, dtype=dtype)
    before = [(block.act.copy(), *block[1:]) for block in iter_rows(storage, snapshot)]
    path = Path(storage.full(snapshot.parts[0].path))
    REWRITE[tool](path)
    after = [(block.act.copy(), *block[1:]) for block in iter_rows(storage, snapshot)]
    for ours, theirs in zip(before, after, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert "re-written by another tool" in caplog.text


def test_a_file_with_other_values_is_never_trusted(storage: Storage, make_snapshot: MakeSnapshot) -> None:
    act, snapshot, path = damaged_part(storage, make_snapshot)
    table = pq.read_table(path)
    values = pa.ListArray.from_arrays(np.arange(0, 801, 8, dtype=np.int32), pa.array((act + 1).reshape(-1)))
    pq.write_table(table.set_column(0, "act", values), path, row_group_size=50)
    with pytest.raises(DamagedError, match="is damaged"):
        RowGroupReader(storage, snapshot).read_into(0, 0, np.empty((50, 8), np.float16))


@pytest.mark.parametrize("column", ["seq", "pos", "token"])
def test_rows_that_claim_another_token_are_found(storage: Storage, make_snapshot: MakeSnapshot, column: str) -> None:
    _, snapshot, path = damaged_part(storage, make_snapshot)
    place = snapshot.parts[0].layout.row_groups[1]
    data = bytearray(path.read_bytes())
    data[place.identity[("seq", "pos", "token").index(column)] + 4 * 49] ^= 1  # the last row's
    path.write_bytes(bytes(data))
    rows = iter_rows(storage, snapshot)
    next(rows)
    with pytest.raises(DamagedError, match=rf"row group 1: seq, pos, token .* offset {place.identity[0]}\)") as error:
        next(rows)
    assert (error.value.ref, error.value.part) == (snapshot.parts[0].ref, 0)


@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_bytes_change_rows_are_as_written_or_refused(
    memory_storage: Storage, make_snapshot: MakeSnapshot, data: st.DataObject
) -> None:
    rng = np.random.default_rng(0)
    act = rng.standard_normal((50, 6)).astype(np.float16)
    token = rng.integers(0, 99, 50, dtype=np.int32)
    memory_storage.fs.store.clear()
    snapshot = make_snapshot(memory_storage, [act], row_group_rows=20, token=[token])
    path = snapshot.parts[0].path
    intact = memory_storage.read_bytes(path)
    changed = bytearray(intact)
    # Most of so small a file is padding, where nothing is harmed.
    used = [place for place, value in enumerate(intact) if value]
    flips = st.tuples(st.one_of(st.integers(0, len(intact) - 1), st.sampled_from(used)), st.integers(1, 255))
    # One flipped byte; or several, so that the way through pyarrow's decoder meets damage too; and a lost end.
    for place, value in data.draw(st.lists(flips, min_size=0, max_size=4)):
        changed[place] ^= value
    del changed[data.draw(st.one_of(st.just(len(intact)), st.integers(0, len(intact)))) :]
    memory_storage.fs.pipe_file(memory_storage.full(path), bytes(changed))
    damage = None
    try:
        blocks = [(block.act.copy(), *block[1:]) for block in iter_rows(memory_storage, snapshot)]
    except DamagedError as err:
        damage = err
    if damage is None:
        found = [np.concatenate(column) for column in zip(*blocks, strict=True)]
        expected = [act, np.arange(50), np.zeros(50), token]
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    else:
        assert (damage.ref, damage.part) == (snapshot.parts[0].ref, 0)
        assert bytes(changed) != intact


def test_a_read_that_fails_is_worth_a_retry_and_no_damage(storage: Storage, make_snapshot: MakeSnapshot) -> None:
    _, snapshot, path = damaged_part(storage, make_snapshot)
    path.unlink()
    path.symlink_to("/proc/self/mem")  # reading its first page is EIO, as from a bad sector
    with pytest.raises(TransientError, match="Input/output error"):
        RowGroupReader(storage, snapshot).read_into(0, 0, np.empty((50, 8), np.float16))


def test_a_part_on_a_bucket_is_read_in_ranges(memory_storage: Storage, make_snapshot: MakeSnapshot) -> None:
    act = np.random.default_rng(0).standard_normal((4000, 64)).astype(np.float16)
    snapshot = make_snapshot(memory_storage, [act], row_group_rows=400)
    path = snapshot.parts[0].path
    whole = memory_storage.read_bytes(path)
    reads: list[int] = []

    class Counting(Storage):
        def read_bytes(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
            data = super().read_bytes(path, start, end)
            reads.append(len(data))
            return data

    counting = Counting("memory://root")
    assert len(list(iter_rows(counting, snapshot))) == 10
    assert len(reads) == 20
    assert sum(reads) < len(whole)  # no footer
    reads.clear()
    pq.write_table(pq.read_table(io.BytesIO(whole)), table := io.BytesIO(), row_group_size=400)
    memory_storage.fs.pipe_file(memory_storage.full(path), table.getvalue())
    next(iter_rows(counting, snapshot))
    assert max(reads) <= 1 << 16  # pyarrow's look at the end, and a column of a row group
    assert sum(reads) < len(whole) * 2 / 3  # the raw bytes twice before the file is decoded
