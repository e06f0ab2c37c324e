"""A snapshot as one file that other tools read: .npy, .safetensors, or Parquet without anything special.

Rows come in the order in which they lie in the store (inside a part they are permuted), a row group at a time: memory
does not grow with the snapshot. The file is written under another name in a folder that dies with its process, and
renamed when it is whole.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae.errors import ConfigError, InputError, StoreError
from sae.memory import readable
from sae.progress import Progress, silent
from sae.store.reading.blocks import RowBlock, iter_rows
from sae.store.snapshots.snapshot import Snapshot
from sae.store.storage import local
from sae.store.storage.filesystem import Storage
from sae.store.storage.staging import private_folder

Format = Literal["npy", "safetensors", "parquet"]
DType = Literal["float16", "float32"]

IDENTITY = ("seq", "pos", "token")
PARQUET_GROUP_BYTES = 64 << 20
"""Of vectors in a row group, before compression."""
_SAFETENSORS_TYPES = {"float16": "F16", "float32": "F32", "int32": "I32"}


def export_snapshot(
    storage: Storage,
    snapshot: Snapshot,
    destination: Path,
    format: Format,
    *,
    dtype: DType | None = None,
    n_rows: int | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> int:
    """Write a snapshot's rows to one local file.

    npy: the vectors [rows, d_in], and nothing else. safetensors: `act` [rows, d_in] and `seq`, `pos`, `token` [rows]
    int32. parquet: one row per vector, columns `seq`, `pos`, `token` and `act` (a list of floats), zstd.

    Args:
        dtype: of the vectors. None: float16 where they are stored so, else float32; Parquet always has float32, which
            every tool reads.
        n_rows: so many, from the start; all by default.
        force: replace a file that is there.

    Returns: rows written.
    Raises:
        ConfigError: the file exists, its folder does not, the disk has no room, or the format has no such dtype.
        InputError: values that do not fit float16.
        DamagedError: as iter_rows; nothing is left then.
    """
    n_rows = snapshot.n_rows if n_rows is None else min(n_rows, snapshot.n_rows)
    dtype = dtype or ("float16" if snapshot.dtype == "float16" and format != "parquet" else "float32")
    if format == "parquet" and dtype != "float32":
        raise ConfigError("--dtype float16: few tools read float16 from Parquet; it is written as float32")
    _check_destination(destination, force)
    _check_room(destination.parent, n_rows * (snapshot.d_in * np.dtype(dtype).itemsize + 4 * len(IDENTITY)), format)
    write: Callable[..., None] = {"npy": _write_npy, "safetensors": _write_safetensors, "parquet": _write_parquet}[
        format
    ]
    try:
        with private_folder(destination.parent, ".sae-export-") as folder:
            unfinished = folder / "export"
            blocks = _blocks(storage, snapshot, n_rows, np.dtype(dtype), progress)
            with open(unfinished, "xb") as file:
                write(file, blocks, snapshot, n_rows, np.dtype(dtype))
            _publish(unfinished, destination, force)
    except OSError as err:
        if local.is_disk_full(err):
            raise local.disk_full(err, destination.parent) from err
        raise StoreError(f"{destination}: {err}") from err
    return n_rows


def _blocks(
    storage: Storage, snapshot: Snapshot, n_rows: int, dtype: np.dtype, progress: Progress
) -> Iterator[RowBlock]:
    """The first rows, in the exported dtype."""
    done = 0
    for block in iter_rows(storage, snapshot):
        block = RowBlock(*(column[: n_rows - done] for column in block))
        with np.errstate(over="ignore"):  # looked for below
            act = np.ascontiguousarray(block.act, dtype)
        if act.dtype != block.act.dtype and not np.isfinite(act).all():
            row = done + int(np.argmin(np.isfinite(act).all(axis=1)))
            raise InputError(f"{snapshot.ref}: row {row} holds values that do not fit {dtype}. Use --dtype float32.")
        done += len(act)
        yield RowBlock(act, block.seq, block.pos, block.token)
        progress(done, n_rows, "rows")
        if done == n_rows:
            return


def _write_npy(file: IO[bytes], blocks: Iterator[RowBlock], snapshot: Snapshot, n_rows: int, dtype: np.dtype) -> None:
    shape = (n_rows, snapshot.d_in)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for block in blocks:
        file.write(block.act.data)


def _write_safetensors(
    file: IO[bytes], blocks: Iterator[RowBlock], snapshot: Snapshot, n_rows: int, dtype: np.dtype
) -> None:
    """The format: 8 bytes length of the header, a JSON header, then the tensors' bytes, without gaps.

    Source: https://github.com/huggingface/safetensors#format.
    """
    shapes: dict[str, tuple[list[int], np.dtype]] = {"act": ([n_rows, snapshot.d_in], dtype)}
    shapes |= {name: ([n_rows], np.dtype(np.int32)) for name in IDENTITY}
    # float16 vectors of odd number and width would leave the int32 columns unaligned: those come first then.
    names = sorted(shapes, key=lambda name: (-shapes[name][1].itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt", "snapshot": snapshot.ref}}
    ends: dict[str, int] = {}
    end = 0
    for name in names:
        shape, kind = shapes[name]
        ends[name] = end
        end += int(np.prod(shape)) * kind.itemsize
        header[name] = {"dtype": _SAFETENSORS_TYPES[kind.name], "shape": shape, "data_offsets": [ends[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    start = file.tell()
    file.truncate(start + end)
    for block in blocks:
        for name in names:
            values = np.ascontiguousarray(getattr(block, name))
            file.seek(start + ends[name])
            file.write(values.data)
            ends[name] += values.nbytes


def _write_parquet(
    file: IO[bytes], blocks: Iterator[RowBlock], snapshot: Snapshot, n_rows: int, dtype: np.dtype
) -> None:
    schema = pa.schema([(name, pa.int32()) for name in IDENTITY] + [("act", pa.list_(pa.float32()))])
    group_rows = max(1, PARQUET_GROUP_BYTES // (snapshot.d_in * dtype.itemsize))
    # Vectors have no values in common: a dictionary would only cost.
    options = {"compression": "zstd", "use_dictionary": list(IDENTITY), "write_statistics": list(IDENTITY)}
    with pq.ParquetWriter(file, schema, **options) as writer:
        waiting: list[pa.RecordBatch] = []
        for block in blocks:
            offsets = np.arange(len(block.act) + 1, dtype=np.int32) * snapshot.d_in
            act = pa.ListArray.from_arrays(pa.array(offsets), pa.array(block.act.reshape(-1).copy()))
            columns = [pa.array(getattr(block, name)) for name in IDENTITY]
            waiting.append(pa.record_batch([*columns, act], schema=schema))
            if sum(batch.num_rows for batch in waiting) >= group_rows:
                writer.write_table(pa.Table.from_batches(waiting), row_group_size=group_rows)
                waiting.clear()
        if waiting:
            writer.write_table(pa.Table.from_batches(waiting), row_group_size=group_rows)


def _check_destination(destination: Path, force: bool) -> None:
    if not destination.parent.is_dir():
        raise ConfigError(f"{destination}: there is no folder {destination.parent}")
    if destination.is_dir():
        raise ConfigError(f"{destination}: is a folder. Name a file.")
    if destination.exists() and not force:
        raise ConfigError(f"{destination}: exists. Choose another name, or --force to replace it.")


def _check_room(folder: Path, n_bytes: int, format: Format) -> None:
    free = local.free_bytes(folder)
    # How far Parquet compresses is not known; vectors of floats shrink by a tenth or so.
    needed = n_bytes * 3 // 4 if format == "parquet" else n_bytes
    if free is not None and needed > free:
        raise ConfigError(
            f"{folder}: {readable(free)} free, the export needs {readable(needed)}. Free some, or lower --rows."
        )


def _publish(unfinished: Path, destination: Path, force: bool) -> None:
    """Give a whole file its name, durably. Raises: ConfigError when somebody else took the name meanwhile."""
    local.fsync(unfinished)
    if force:
        os.replace(unfinished, destination)
    else:
        try:
            os.link(unfinished, destination)
        except FileExistsError as err:
            raise ConfigError(f"{destination}: was made by somebody else meanwhile; --force replaces it") from err
        except OSError:  # a file system without hard links
            os.replace(unfinished, destination)
    local.fsync(destination.parent)
