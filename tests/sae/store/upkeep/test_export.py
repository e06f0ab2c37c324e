"""Exports against the rows themselves, read by other tools; a killed export leaves no file."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

from sae.errors import ConfigError, DamagedError, InputError
from sae.store.part.encoding import Dtype
from sae.store.reading.blocks import RowBlock, iter_rows
from sae.store.snapshots.snapshot import Snapshot
from sae.store.storage.filesystem import Storage
from sae.store.upkeep import export
from sae.store.upkeep.export import export_snapshot
from tests.conftest import MakeSnapshot

FORMATS = ("npy", "safetensors", "parquet")


@pytest.fixture
def parts() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((n, 5)).astype(np.float16) for n in (150, 64, 31)]


@pytest.fixture
def snapshot(storage: Storage, make_snapshot: MakeSnapshot, parts: list[np.ndarray]) -> Snapshot:
    pos = [np.arange(len(part), dtype=np.int32) for part in parts]
    return make_snapshot(storage, parts, pos=pos)


def read(path: Path) -> dict[str, np.ndarray]:
    """The columns of an export, as another library reads them."""
    if path.suffix == ".npy":
        return {"act": np.load(path, mmap_mode="r")}
    if path.suffix == ".safetensors":
        return safetensors.numpy.load_file(path)
    table = pq.read_table(path)
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


def rows_of(storage: Storage, snapshot: Snapshot) -> dict[str, np.ndarray]:
    blocks = [RowBlock(*(column.copy() for column in block)) for block in iter_rows(storage, snapshot)]
    return {name: np.concatenate([getattr(block, name) for block in blocks]) for name in RowBlock._fields}


@pytest.mark.parametrize("format", FORMATS)
def test_other_tools_read_the_same_rows(
    format: str, storage: Storage, snapshot: Snapshot, parts: list[np.ndarray], tmp_path: Path
) -> None:
    path = tmp_path / f"rows.{format}"
    assert export_snapshot(storage, snapshot, path, format) == 245
    found, expected = read(path), rows_of(storage, snapshot)
    assert np.array_equal(expected["act"], np.concatenate(parts))
    assert found["act"].dtype == (np.float64 if format == "parquet" else np.float16)
    for name, values in found.items():
        assert np.array_equal(values, expected[name])
    assert set(found) == ({"act"} if format == "npy" else {"act", "seq", "pos", "token"})


@pytest.mark.parametrize("format", FORMATS)
def test_the_first_rows_in_another_precision(
    format: str, storage: Storage, snapshot: Snapshot, parts: list[np.ndarray], tmp_path: Path
) -> None:
    path = tmp_path / f"rows.{format}"
    assert export_snapshot(storage, snapshot, path, format, dtype="float32", n_rows=151) == 151
    act = read(path)["act"]
    assert act.shape == (151, 5)
    assert np.array_equal(act, np.concatenate(parts)[:151].astype(np.float32))


def test_duckdb_reads_vectors_as_lists_of_floats(storage: Storage, snapshot: Snapshot, tmp_path: Path) -> None:
    export_snapshot(storage, snapshot, tmp_path / "rows.parquet", "parquet")
    query = f"SELECT typeof(act), len(act), count(*) FROM '{tmp_path}/rows.parquet' GROUP BY ALL"
    assert duckdb.sql(query).fetchall() == [("FLOAT[]", 5, 245)]


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_rows_give_the_same_bytes(
    format: str, storage: Storage, snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "PARQUET_GROUP_BYTES", 1000)  # several row groups
    for name in "ab":
        export_snapshot(storage, snapshot, tmp_path / name, format)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    if format == "parquet":
        assert pq.ParquetFile(tmp_path / "a").num_row_groups > 1


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float16"])
def test_encoded_vectors_are_written_as_their_values(
    dtype: Dtype, format: str, storage: Storage, make_snapshot: MakeSnapshot, tmp_path: Path
) -> None:
    """float16: the second part is stored divided by a power of two."""
    rng = np.random.default_rng(0)
    parts = [(scale * rng.standard_normal((70, 5))).astype(np.float32) for scale in (1, 2e4)]
    snapshot = make_snapshot(storage, parts, dtype=dtype)
    export_snapshot(storage, snapshot, tmp_path / f"rows.{format}", format, dtype="float32")
    found, stored = read(tmp_path / f"rows.{format}")["act"], rows_of(storage, snapshot)["act"]
    assert np.array_equal(found, stored)
    for start, part in ((0, parts[0]), (70, parts[1])):
        assert np.allclose(found[start : start + 70], part, atol=0.01 * np.abs(part).max())


@pytest.mark.parametrize("n_rows", [1, 2, 3])
def test_safetensors_of_odd_sizes_are_aligned(
    n_rows: int, storage: Storage, make_snapshot: MakeSnapshot, tmp_path: Path
) -> None:
    act = np.arange(9, dtype=np.float16).reshape(3, 3)
    export_snapshot(storage, make_snapshot(storage, [act]), tmp_path / "a", "safetensors", n_rows=n_rows)
    found = safetensors.numpy.load_file(tmp_path / "a")
    assert np.array_equal(found["act"], act[:n_rows])
    assert np.array_equal(found["seq"], np.arange(n_rows))


def test_values_that_float16_cannot_hold_are_refused(
    storage: Storage, make_snapshot: MakeSnapshot, tmp_path: Path
) -> None:
    snapshot = make_snapshot(storage, [np.array([[1, 2], [3, 7e4]], np.float32)])
    with pytest.raises(InputError, match=r"row 1 holds values that do not fit float16\. Use --dtype float32"):
        export_snapshot(storage, snapshot, tmp_path / "a.npy", "npy", dtype="float16")
    assert list(tmp_path.glob("*a.npy*")) == []


def test_a_file_is_replaced_only_when_one_says_so(storage: Storage, snapshot: Snapshot, tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    path.write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"exists.*--force"):
        export_snapshot(storage, snapshot, path, "npy")
    assert path.read_bytes() == b"mine"
    export_snapshot(storage, snapshot, path, "npy", force=True)
    assert len(np.load(path)) == 245


@pytest.mark.parametrize(
    ("name", "format", "message"),
    [
        ("no/folder/a", "npy", "there is no folder"),
        ("", "npy", "is a folder"),
        ("a.parquet", "parquet", "few tools read float16"),
    ],
)
def test_bad_destinations_are_refused(
    name: str, format: str, message: str, storage: Storage, snapshot: Snapshot, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        export_snapshot(storage, snapshot, tmp_path / name, format, dtype="float16")


def test_a_disk_without_room_is_refused_first(
    storage: Storage, snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export.local, "free_bytes", lambda place: 1000)
    with pytest.raises(ConfigError, match=r"1 kB free, the export needs 5\.39 kB"):
        export_snapshot(storage, snapshot, tmp_path / "a.npy", "npy")


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_rows_leave_no_file(format: str, storage: Storage, snapshot: Snapshot, tmp_path: Path) -> None:
    place = snapshot.parts[2]
    with open(storage.full(place.path), "r+b") as file:
        file.seek(place.layout.row_groups[0].offset)
        file.write(b"\xff")
    before = set(tmp_path.iterdir())
    with pytest.raises(DamagedError, match="row group 0"):
        export_snapshot(storage, snapshot, tmp_path / "rows", format)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("format", FORMATS)
def test_a_killed_export_leaves_no_file(format: str, storage: Storage, snapshot: Snapshot, tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
from sae.store.upkeep.export import export_snapshot
from sae.store.storage.filesystem import Storage
from sae.store.snapshots.snapshot import read_snapshot
import os, signal
storage = Storage({storage.root!r})
def progress(done, total, unit, note=""):
    if done >= 150:
        os.kill(os.getpid(), signal.SIGKILL)
export_snapshot(storage, read_snapshot(storage, {snapshot.ref!r}), Path("rows"), {format!r}, progress=progress)
"""
    folder = tmp_path / "exports"
    folder.mkdir()
    environment = dict(os.environ) | {"PYTHONPATH": str(Path(__file__).parents[4])}
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert all(path.name.startswith(".sae-export-") for path in folder.iterdir())
    export_snapshot(storage, snapshot, folder / "rows", format)
    assert [path.name for path in folder.iterdir()] == ["rows"], "and the next one removes what it left"
