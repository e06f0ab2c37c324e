"""Our own page writer beside pyarrow's: the same tables in every tool, raw pages where they are said to be."""

import errno
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae.errors import StoreError
from sae.store.part import pages, writer
from sae.store.part.encoding import Dtype, Encoding, decode, encode, stored_dtype
from sae.store.part.locate import read_layout
from sae.store.part.writer import PartLayout, write_part
from sae.store.storage.filesystem import Storage
from tests.sae.store import golden
from tests.sae.store.part.oracle import write_with_pyarrow

DTYPES: tuple[Dtype, ...] = ("float16", "float32", "bfloat16", "int8")


def random_part(dtype: Dtype, n_rows: int, d_in: int) -> tuple[np.ndarray, dict[str, np.ndarray], Encoding]:
    rng = np.random.default_rng(n_rows * 1000 + d_in)
    stored, encoding = encode(torch.from_numpy(rng.standard_normal((n_rows, d_in)).astype(np.float32) * 1e5), dtype)
    ids = {name: rng.integers(-(2**31), 2**31, n_rows, dtype=np.int32) for name in ("seq", "pos", "token")}
    return stored, ids, encoding


def rows_of(column: pa.ChunkedArray | pa.Array, dtype: Dtype, d_in: int) -> np.ndarray:
    """The stored values that a tool sees in column act."""
    rows = column.to_pylist()
    if dtype in ("float16", "float32"):
        return np.array(rows, stored_dtype(dtype)).reshape(-1, d_in)
    return np.frombuffer(b"".join(rows), stored_dtype(dtype)).reshape(-1, d_in)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit for bit."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


@given(
    dtype=st.sampled_from(DTYPES),
    n_rows=st.one_of(st.integers(0, 3), st.integers(0, 300)),
    d_in=st.one_of(st.integers(1, 9), st.sampled_from([64, 127, 128, 129, 700])),
    row_group_rows=st.one_of(st.integers(1, 7), st.integers(1, 400)),
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_table_is_the_one_that_pyarrow_writes(
    tmp_path: Path, dtype: Dtype, n_rows: int, d_in: int, row_group_rows: int
) -> None:
    stored, ids, encoding = random_part(dtype, n_rows, d_in)
    ours, theirs = tmp_path / "ours.parquet", tmp_path / "theirs.parquet"
    ours.unlink(missing_ok=True)
    layout = write_part(ours, stored, **ids, row_group_rows=row_group_rows, encoding=encoding)
    write_with_pyarrow(theirs, stored, **ids, row_group_rows=row_group_rows, encoding=encoding)
    table, other = (pq.read_table(path, page_checksum_verification=True) for path in (ours, theirs))
    assert table.schema.equals(other.schema, check_metadata=True)
    # By bits: NaN does not occur, and -0.0 is not 0.0.
    assert same(rows_of(table["act"], dtype, d_in), stored)
    assert same(rows_of(other["act"], dtype, d_in), stored)
    assert table.drop(["act"]).equals(other.drop(["act"]))
    mine, yours = pq.read_metadata(ours), pq.read_metadata(theirs)
    assert str(mine.schema).splitlines()[1:] == str(yours.schema).splitlines()[1:]
    assert mine.num_rows == sum(group.n_rows for group in layout.row_groups) == n_rows
    sizes = [[m.row_group(i).num_rows for i in range(m.num_row_groups)] for m in (mine, yours)]
    assert sizes[0] == sizes[1] == [group.n_rows for group in layout.row_groups]
    assert read_layout(ours) == layout

    data, start = ours.read_bytes(), 0
    for group in layout.row_groups:
        assert group.offset % 4096 == 0
        raw = np.frombuffer(data, stored.dtype, group.n_rows * d_in, group.offset).reshape(-1, d_in)
        assert same(raw, stored[start : start + group.n_rows])
        for name, offset in zip(ids, group.identity, strict=True):
            assert same(np.frombuffer(data, np.int32, group.n_rows, offset), ids[name][start : start + group.n_rows])
        start += group.n_rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_rows", "d_in", "row_group_rows"), [(1, 1, 1), (50, 8, 20), (301, 33, 64), (9, 512, 100)])
def test_duckdb_polars_and_pandas_read_the_same_rows(
    tmp_path: Path, dtype: Dtype, n_rows: int, d_in: int, row_group_rows: int
) -> None:
    duckdb, pl, pd = (pytest.importorskip(name) for name in ("duckdb", "polars", "pandas"))
    stored, ids, encoding = random_part(dtype, n_rows, d_in)
    path = tmp_path / "part.parquet"
    write_part(path, stored, **ids, row_group_rows=row_group_rows, encoding=encoding)
    duck = duckdb.sql(f"select * from '{path}'").to_arrow_table()
    for table in (duck, pl.read_parquet(path).to_arrow(), pl.scan_parquet(path).collect().to_arrow()):
        assert table.column_names == ["act", "seq", "pos", "token"]
        assert same(rows_of(table["act"], dtype, d_in), stored)
        assert all(same(table[name].to_numpy(), values) for name, values in ids.items())
    frame = pd.read_parquet(path)
    assert same(rows_of(pa.array(frame["act"]), dtype, d_in), stored)
    assert all(same(frame[name].to_numpy(), values) for name, values in ids.items())
    # One column, and a filter on the rows, as people ask.
    chosen = duckdb.sql(f"select act from '{path}' where pos = {ids['pos'][-1]}").to_arrow_table()
    assert same(rows_of(chosen["act"], dtype, d_in), stored[-1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_column_chunk_is_one_uncompressed_page(tmp_path: Path, dtype: Dtype) -> None:
    stored = np.zeros((5000, 64), stored_dtype(dtype))  # compressible: would shrink under any codec or dictionary
    ids = {name: np.zeros(5000, np.int32) for name in ("seq", "pos", "token")}
    encoding = encode(torch.zeros(1, 64), dtype)[1]
    write_part(tmp_path / "part.parquet", stored, **ids, row_group_rows=2500, encoding=encoding)
    metadata = pq.read_metadata(tmp_path / "part.parquet")
    for index in range(metadata.num_row_groups):
        for column, size in enumerate([stored.nbytes // 2, 10_000, 10_000, 10_000]):
            chunk = metadata.row_group(index).column(column)
            assert chunk.compression == "UNCOMPRESSED"
            assert not chunk.has_dictionary_page
            assert set(chunk.encodings) <= {"PLAIN", "RLE"}
            assert chunk.statistics is None
            assert size < chunk.total_compressed_size < size * 1.1


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_page_has_a_checksum_that_pyarrow_checks(tmp_path: Path, dtype: Dtype) -> None:
    stored, ids, encoding = random_part(dtype, 100, 16)
    path = tmp_path / "part.parquet"
    layout = write_part(path, stored, **ids, row_group_rows=50, encoding=encoding)
    intact = path.read_bytes()
    group = layout.row_groups[1]
    levels = len(pages.list_levels(dtype, 50, 16))
    places = [group.offset, group.offset + 49 * layout.row_bytes, *group.identity] + [group.offset - 1] * bool(levels)
    for place in places:
        data = bytearray(intact)
        data[place] ^= 16
        path.write_bytes(bytes(data))
        with pytest.raises(OSError, match="CRC checksum verification failed"):
            pq.read_table(path, page_checksum_verification=True)
        with pytest.raises(StoreError, match=r"row group 1, column \w+: .*"):
            read_layout(path)


def test_a_file_says_how_its_values_are_decoded(tmp_path: Path) -> None:
    for dtype in DTYPES:
        stored, ids, encoding = random_part(dtype, 10, 4)
        path = tmp_path / f"{dtype}.parquet"
        write_part(path, stored, **ids, row_group_rows=4, encoding=encoding)
        said = {key.decode(): value.decode() for key, value in pq.read_metadata(path).metadata.items()}
        assert (said["sae.format"], said["sae.dtype"], said["sae.d_in"]) == ("2", dtype, "4")
        assert said.get("sae.exponent") == (str(encoding.exponent) if dtype == "float16" else None)
        assert (said.get("sae.scale"), said.get("sae.offset")) == (encoding.scale, encoding.offset)


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    stored, ids, encoding = random_part("float16", 200, 30)
    paths = [tmp_path / name for name in "abc"]
    for path, act in zip(paths, (stored, stored.copy(order="F"), stored[::-1][::-1]), strict=True):
        write_part(path, act, **ids, row_group_rows=64, encoding=encoding)
    assert len({path.read_bytes() for path in paths}) == 1


class MadeRows:
    """Rows that are made as they are sliced, in memory that is used again."""

    def __init__(self, act: np.ndarray) -> None:
        self.shape, self.dtype = act.shape, act.dtype
        self._act, self._blocks = act, [np.zeros_like(act) for _ in range(writer.BLOCKS_IN_USE)]

    def __getitem__(self, rows: slice) -> np.ndarray:
        self._blocks.append(self._blocks.pop(0))
        block = self._blocks[0][: rows.stop - rows.start]
        block[:] = self._act[rows]
        return block


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_rows_give_the_same_bytes_in_blocks_of_any_size(
    tmp_path: Path, dtype: Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, ids, encoding = random_part(dtype, 200, 30)
    layout = write_part(tmp_path / "whole", stored, **ids, row_group_rows=64, encoding=encoding)
    for block_bytes in (1, 700, 2000, 1 << 20):
        monkeypatch.setattr(writer, "BLOCK_BYTES", block_bytes)
        path, seen = tmp_path / str(block_bytes), []

        def note(block: np.ndarray, seen: list = seen) -> None:
            time.sleep(0.0001)  # the writer would be ahead if it did not wait
            seen.append(block.copy())

        rows = MadeRows(stored)
        assert write_part(path, rows, **ids, row_group_rows=64, encoding=encoding, alongside=note) == layout
        assert path.read_bytes() == (tmp_path / "whole").read_bytes()
        assert same(np.concatenate(seen), stored)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the disk is not told")
def test_the_disk_begins_with_a_durable_part_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, ids, encoding = random_part("float16", 5000, 300)
    advise, told = os.posix_fadvise, []

    def note(descriptor: int, offset: int, n_bytes: int, advice: int) -> None:
        told.append((offset, n_bytes))
        advise(descriptor, offset, n_bytes, advice)

    monkeypatch.setattr(os, "posix_fadvise", note)
    plain = write_part(tmp_path / "plain", stored, **ids, row_group_rows=2000, encoding=encoding)
    assert not told
    assert (
        write_part(tmp_path / "durable", stored, **ids, row_group_rows=2000, encoding=encoding, durable=True) == plain
    )
    assert sum(n_bytes for _, n_bytes in told) == stored.nbytes
    for group in plain.row_groups:
        begun = [n_bytes for offset, n_bytes in told if group.offset <= offset < group.offset + group.n_rows * 600]
        assert sum(begun) == group.n_rows * 600
    # What was begun was not dropped: it is hashed again, then trained on.
    with open(tmp_path / "durable", "rb") as file:
        for group in plain.row_groups:
            try:
                assert os.preadv(file.fileno(), [bytearray(4096)], group.offset, os.RWF_NOWAIT) == 4096
            except OSError as err:  # some file systems do not say; of what is not cached, the others say EAGAIN
                if err.errno != errno.EOPNOTSUPP:
                    raise
    assert (tmp_path / "durable").read_bytes() == (tmp_path / "plain").read_bytes()


@pytest.mark.parametrize("failing", range(5))
def test_what_goes_wrong_alongside_any_block_is_raised(
    tmp_path: Path, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, ids, encoding = random_part("float16", 25, 30)
    monkeypatch.setattr(writer, "BLOCK_BYTES", 5 * 60)
    calls = iter(range(5))

    def fail(_block: np.ndarray) -> None:
        if next(calls) == failing:
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        write_part(tmp_path / "a", stored, **ids, row_group_rows=25, encoding=encoding, alongside=fail)


def test_writes_that_the_system_cuts_short_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, ids, encoding = random_part("float16", 200, 30)
    write_part(tmp_path / "whole", stored, **ids, row_group_rows=64, encoding=encoding)
    pwritev = os.pwritev

    def short(descriptor: int, buffers: list, offset: int) -> int:
        return pwritev(descriptor, [memoryview(buffer)[:700] for buffer in buffers[:1]], offset)

    monkeypatch.setattr(os, "pwritev", short)
    write_part(tmp_path / "short", stored, **ids, row_group_rows=64, encoding=encoding)
    assert (tmp_path / "short").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_full_disk_is_said_and_leaves_no_descriptor(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, ids, encoding = random_part("float16", 200, 30)
    pwritev = os.pwritev

    def full(descriptor: int, buffers: list, offset: int) -> int:
        if offset > 8000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwritev(descriptor, buffers, offset)

    monkeypatch.setattr(os, "pwritev", full)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(StoreError, match="disk full"), storage.staging() as folder:
        write_part(folder / "part.parquet", stored, **ids, row_group_rows=64, encoding=encoding)
    assert len(os.listdir("/proc/self/fd")) == before


def test_rows_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    stored, ids, encoding = random_part("float16", 10, 4)
    with pytest.raises(ValueError, match="float16 is stored as float16"):
        write_part(tmp_path / "a", stored.astype(np.float32), **ids, row_group_rows=4, encoding=encoding)
    with pytest.raises(ValueError, match="10 rows of 4 values, but seq"):
        write_part(tmp_path / "a", stored, **ids | {"seq": ids["seq"][:9]}, row_group_rows=4, encoding=encoding)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_golden_files_are_written_byte_for_byte_and_read(tmp_path: Path, dtype: Dtype) -> None:
    layouts = golden.write(tmp_path)
    for name in (f"{dtype}.parquet", f"{dtype}.json"):
        assert (tmp_path / name).read_bytes() == (golden.FOLDER / name).read_bytes()
    layout = PartLayout.model_validate(json.loads((golden.FOLDER / f"{dtype}.json").read_text()))
    assert layouts[dtype] == layout == read_layout(golden.FOLDER / f"{dtype}.parquet")
    stored, encoding = encode(torch.from_numpy(golden.ACT), dtype)
    write_with_pyarrow(
        tmp_path / "theirs", stored, **golden.IDENTITY, row_group_rows=golden.ROW_GROUP_ROWS, encoding=encoding
    )
    ours, theirs = (pq.read_table(path) for path in (golden.FOLDER / f"{dtype}.parquet", tmp_path / "theirs"))
    assert ours.equals(theirs, check_metadata=True)
    values = decode(torch.from_numpy(rows_of(ours["act"], dtype, 4).copy()), layout.encoding).numpy()
    tolerance = {"float16": 2**-11, "float32": 0, "bfloat16": 2**-8, "int8": 0}[dtype]
    step = np.ptp(golden.ACT, axis=0) / 255 if dtype == "int8" else 2.0**-24
    assert (np.abs(values - golden.ACT) <= tolerance * np.abs(golden.ACT) + step).all()


def test_a_part_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    data = (golden.FOLDER / "float16.parquet").read_bytes()
    assert data.count(b"sae.format\x18\x012") == 1
    path.write_bytes(data.replace(b"sae.format\x18\x012", b"sae.format\x18\x013"))
    with pytest.raises(StoreError, match=r"a part of format 3, this version reads up to 2\. Use a newer sae-pipeline"):
        read_layout(path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"compression": "zstd"}, "codec ZSTD"),
        ({"use_dictionary": True}, "encodings"),
        ({"data_page_size": 64, "use_dictionary": False}, "not one plain page"),
        ({"data_page_version": "2.0", "use_dictionary": False}, "not one plain page"),
    ],
)
def test_a_file_of_another_shape_is_no_raw_part(tmp_path: Path, change: dict, why: str) -> None:
    stored, ids, encoding = random_part("float16", 3000, 8)
    path = tmp_path / "part.parquet"
    write_part(path, stored, **ids, row_group_rows=3000, encoding=encoding)
    pq.write_table(pq.read_table(path), path, **{"compression": "none"} | change)
    with pytest.raises(StoreError, match=rf"not a raw part \(.*({why})"):
        read_layout(path)


def test_a_file_whose_vectors_are_not_aligned_is_no_raw_part(tmp_path: Path) -> None:
    stored, ids, encoding = random_part("int8", 30, 8)
    write_with_pyarrow(tmp_path / "part.parquet", stored, **ids, row_group_rows=20, encoding=encoding)
    with pytest.raises(StoreError, match=r"row group 0: its vectors begin at .*, no multiple of 4096"):
        read_layout(tmp_path / "part.parquet")


@pytest.mark.parametrize("codec", [8, 63])
def test_a_codec_that_nobody_knows_is_refused_and_does_not_end_the_process(tmp_path: Path, codec: int) -> None:
    intact = (golden.FOLDER / "float16.parquet").read_bytes()
    # The end of the vectors' path in the schema, then the codec, an i32 in zigzag.
    changed = intact.replace(b"\x07element\x15\x00", b"\x07element\x15" + bytes([2 * codec]))
    assert changed != intact
    path = tmp_path / "part.parquet"
    path.write_bytes(changed)
    with pytest.raises(StoreError, match=rf"row group 0, column act: codec {codec}, "):
        read_layout(path)


@given(data=st.data())
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_bytes_change_a_layout_is_the_true_one_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    intact = (golden.FOLDER / f"{dtype}.parquet").read_bytes()
    layout = read_layout(golden.FOLDER / f"{dtype}.parquet")
    # Half of the places among the page headers and the footer, where most bytes mean something.
    heads = [place for group in layout.row_groups for place in range(group.offset - 60, group.offset)]
    heads += [place for group in layout.row_groups for place in range(group.identity[0] - 20, group.identity[2])]
    heads += range(len(intact) - 600, len(intact))
    changed = bytearray(intact)
    place = data.draw(st.one_of(st.integers(0, len(intact) - 1), st.sampled_from(heads)))
    changed[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "part.parquet"
    path.write_bytes(bytes(changed))
    try:
        found = read_layout(path)
    except StoreError:
        return
    # A page's CRC covers its values, and the levels are constant; of the footer the encoding alone has no check.
    assert found.row_groups == layout.row_groups
    assert found.n_rows == layout.n_rows
