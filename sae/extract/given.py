"""Activations that are given rather than read from a model: inline, in a file, or of a toy model of superposition."""

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import safetensors.torch
import torch
from fsspec.implementations.local import LocalFileSystem

from sae.errors import ConfigError, InputError, TransientError
from sae.extract.config import ArraySource, GivenPartsSpec, GivenSource, InlineSource, Split, SuperpositionSource
from sae.extract.superposition import train_superposition
from sae.extract.write import write_rows
from sae.philox import philox
from sae.progress import Progress, silent
from sae.store.artefacts.records import Record, commit
from sae.store.part.encoding import LARGEST, Dtype, encode, stored_dtype
from sae.store.snapshots.snapshot import PART_FILE
from sae.store.storage.filesystem import Storage

DIRECTIONS_FILE = "directions.safetensors"
"""True feature directions of a superposition source, a file of the part set: key "directions" [n_features, d_in]."""
CONSTANT = "There is nothing to learn from constant data."
READABLE = (".npy", ".safetensors", ".parquet")


def resolve_given_content(source: GivenSource) -> str:
    """SHA-256 of a source's file; empty where the source itself says everything.

    Raises: InputError when the file is missing or of another kind; TransientError when its storage fails.
    """
    if not isinstance(source, ArraySource):
        return ""
    _suffix(source.url)
    with _local_copy(source.url) as path, open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def measure_given(spec: GivenPartsSpec, where: str) -> tuple[int, int, int]:
    """Read given activations and find what is wrong with them, as import_activations would.

    Args:
        spec: of any split.
        where: the setting, for messages about values that lie in no file.

    Returns: training rows, held-out rows, d_in.
    Raises: as import_activations.
    """
    source, what = spec.source, spec.source.url if isinstance(spec.source, ArraySource) else where
    act = None
    if isinstance(source, SuperpositionSource):
        n_rows, d_in = source.n_samples, source.d_in
    else:
        act = _checked_source(source, spec.content, what, spec.dtype)
        n_rows, d_in = act.shape
    n_train = _split_rows("train", spec.heldout_fraction, n_rows, what)[1]
    if spec.heldout_fraction > 0:
        _split_rows("heldout", spec.heldout_fraction, n_rows, what)
    if act is not None and (act[:n_train] == act[0]).all():
        raise InputError(f"{what}: its {n_train} training rows are equal. {CONSTANT}")
    return n_train, n_rows - n_train, d_in


def import_activations(storage: Storage, spec: GivenPartsSpec, *, progress: Progress = silent) -> Record:
    """Write all parts of a split of given activations, then the record of the part set.

    A row's `seq` is its number in the source, `pos` is 0 and `token` -1. Held-out rows are the last of the source.

    Returns: the part set's record; its metrics are those of `sae.extract.part.plan_parts`, a row being a context.
    Raises:
        InputError: a file that is missing, changed or of another shape; NaN, infinite or constant values; a split
            without rows.
        ConfigError: the values do not fit the dtype.
    """
    started = time.perf_counter()
    directions = None
    what = spec.source.url if isinstance(spec.source, ArraySource) else f"{spec.source.kind} activations"
    if isinstance(spec.source, SuperpositionSource):
        values, directions = train_superposition(spec.source, spec.seed, progress)
        act = checked_values(values, what, spec.dtype)
    else:
        act = _checked_source(spec.source, spec.content, what, spec.dtype)
    first, stop = _split_rows(spec.split, spec.heldout_fraction, len(act), what)
    act = act[first:stop]

    row_bytes = act.shape[1] * stored_dtype(spec.dtype).itemsize
    rows_per_part = max(1, spec.part_bytes // row_bytes)
    row_group_rows = max(1, spec.row_group_bytes // row_bytes)
    n_parts = -(-len(act) // rows_per_part)
    for part in range(n_parts):
        writing = time.perf_counter()
        begin = part * rows_per_part
        block = act[begin : begin + rows_per_part]
        order = philox("rows", spec.seed, part, spec.fingerprint).permutation(len(block))
        identity = np.empty((3, len(block)), np.int32)
        identity[0], identity[1], identity[2] = first + begin + order, 0, -1
        encoded, encoding = encode(torch.from_numpy(block[order]), spec.dtype)
        with storage.staging() as folder:
            path, durable = folder / PART_FILE, storage.is_local
            metrics = write_rows(path, encoded, identity, row_group_rows, encoding, durable=durable)
            commit(storage, spec, folder, metrics, seconds=time.perf_counter() - writing, part=part)
        progress(begin + len(block), len(act), "rows")
    plan = {
        "d_in": act.shape[1],
        "n_parts": n_parts,
        "n_contexts": len(act),
        "contexts_per_part": rows_per_part,
        "tokens_per_part": rows_per_part,
        "row_group_rows": row_group_rows,
    }
    with storage.staging() as folder:
        if directions is not None:
            safetensors.torch.save_file({"directions": torch.from_numpy(directions)}, folder / DIRECTIONS_FILE)
        return commit(storage, spec, folder, plan, seconds=time.perf_counter() - started)


def checked_values(values: np.ndarray, what: str, dtype: Dtype) -> np.ndarray:
    """The values as float32, found to be fit to be stored as `dtype`. [rows, d_in]

    Raises: InputError, naming the row, for another shape or type, NaN or infinite values, or data without variance;
        ConfigError for values too large for `dtype`.
    """
    if values.ndim != 2 or 0 in values.shape:
        raise InputError(f"{what}: shape {list(values.shape)}, expected [rows, d_in] with at least one of each")
    if values.dtype.kind not in "fiu":
        raise InputError(f"{what}: values of type {values.dtype}, expected numbers")
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise InputError(
            f"{what}: row {row} holds NaN or infinite values ({int((~finite).sum())} of {len(values)} rows do). "
            f"Remove them."
        )
    largest = LARGEST[dtype]
    row = int(np.argmax(np.abs(values).max(axis=1)))
    if float(np.abs(values[row]).max()) > largest:  # which float16 cannot hold
        raise ConfigError(
            f"{what}: row {row} holds {np.abs(values[row]).max():.6g}, {dtype} goes up to {largest:.6g}. "
            f"{'Scale' if dtype == 'float32' else 'Set activations.dtype to float32, or scale'} the values."
        )
    act = np.require(values, np.float32, ["C", "W"])
    encoded, _ = encode(torch.from_numpy(act), dtype)
    if (encoded == encoded[0]).all():
        same = "equal" if (values == values[0]).all() else f"equal once they are {dtype}"
        raise InputError(f"{what}: all {len(act)} rows are {same}. {CONSTANT}")
    return act


def read_array(source: ArraySource, content: str) -> np.ndarray:
    """The array of a .npy, .safetensors or .parquet file.

    Args:
        content: SHA-256 that the file must have.

    Raises: InputError for another kind of file, a missing name, or a file that changed.
    """
    readers = dict(zip(READABLE, (_read_npy, _read_safetensors, _read_parquet), strict=True))
    suffix = _suffix(source.url)
    with _local_copy(source.url) as path:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != content:
            raise InputError(f"{source.url}: changed while the pipeline ran. Start the run again.")
        return readers[suffix](path, source)


def _suffix(url: str) -> str:
    """The kind of file. Raises: InputError when it is none that can be read."""
    suffix = os.path.splitext(url)[1].lower()
    if suffix not in READABLE:
        raise InputError(f"{url}: a {suffix or 'nameless'} file; expected one of {', '.join(READABLE)}")
    return suffix


def _read_npy(path: Path, source: ArraySource) -> np.ndarray:
    try:
        # Mapped first: a header that promises more than the file holds must not take memory.
        mapped = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError, OSError) as err:
        raise InputError(f"{source.url}: not a plain .npy array ({err})") from err
    return np.array(mapped)


def _read_safetensors(path: Path, source: ArraySource) -> np.ndarray:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if source.name not in names:
                raise InputError(f"{source.url}: no tensor {source.name!r}; it has {', '.join(map(repr, names))}")
            tensor = file.get_tensor(source.name)
    except safetensors.SafetensorError as err:
        raise InputError(f"{source.url}: not a safetensors file ({err})") from err
    # numpy has no bfloat16.
    return np.asarray(tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy())


def _read_parquet(path: Path, source: ArraySource) -> np.ndarray:
    try:
        names = pq.read_schema(path).names
        if source.name not in names:
            raise InputError(f"{source.url}: no column {source.name!r}; it has {', '.join(map(repr, names))}")
        column = pq.read_table(path, columns=[source.name])[source.name].combine_chunks()
    except pa.ArrowInvalid as err:
        raise InputError(f"{source.url}: not a Parquet file ({err})") from err
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise InputError(f"{source.url}: column {source.name!r} is of type {kind}, expected lists of numbers")
    if column.null_count:
        raise InputError(f"{source.url}: column {source.name!r} has {column.null_count} null rows")
    if pa.types.is_fixed_size_list(kind):
        widths = np.array([kind.list_size])
    else:
        widths = np.unique(np.diff(column.offsets.to_numpy()))
    if len(widths) != 1:
        raise InputError(f"{source.url}: rows of column {source.name!r} have lengths from {widths[0]} to {widths[-1]}")
    flat = column.flatten()
    if flat.null_count:
        raise InputError(f"{source.url}: column {source.name!r} holds {flat.null_count} null values")
    return np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(-1, int(widths[0]))


def _checked_source(source: InlineSource | ArraySource, content: str, what: str, dtype: Dtype) -> np.ndarray:
    values = np.array(source.values, np.float64) if isinstance(source, InlineSource) else read_array(source, content)
    return checked_values(values, what, dtype)


def _split_rows(split: Split, heldout_fraction: float, n_rows: int, what: str) -> tuple[int, int]:
    """First row and end of the split."""
    n_train = n_rows - round(n_rows * heldout_fraction)
    first, stop = (0, n_train) if split == "train" else (n_train, n_rows)
    if first >= stop:
        raise InputError(
            f"{what}: {n_rows} rows leave none for the {split} split with heldout_fraction {heldout_fraction}. "
            f"Change activations.heldout_fraction."
        )
    return first, stop


@contextlib.contextmanager
def _local_copy(url: str) -> Iterator[Path]:
    """A local path of a file anywhere; a download is removed afterwards."""
    try:
        fs, path = fsspec.core.url_to_fs(os.path.expanduser(url))
    except (ImportError, ValueError) as err:
        raise InputError(f"{url}: {err}. Check activations.sets.") from err
    if not fs.isfile(path):
        raise InputError(f"{url}: no such file. Check activations.sets.")
    if isinstance(fs, LocalFileSystem):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / os.path.basename(path)
        try:
            fs.get_file(path, str(local))
        except OSError as err:
            raise TransientError(f"{url}: {err}") from err
        yield local
