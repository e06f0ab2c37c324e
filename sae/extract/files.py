"""Documents in text, jsonl and Parquet files, read through fsspec."""

import gzip
import json
import lzma
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from sae.errors import ConfigError, InputError, TransientError
from sae.extract.config import FilesSource

UNREADABLE = (gzip.BadGzipFile, zlib.error, lzma.LZMAError, zipfile.BadZipFile, EOFError)
"""What unpacking a damaged file, or one that was never packed, ends with."""
Skip = Callable[[str, str], None]
"""Called with the name of an unusable document and the reason."""


def iter_files(source: FilesSource, skip: Skip) -> Iterator[tuple[str, str]]:
    """(name, text) of every document, files in order of their names.

    A document is named by its file, relative to the folder that holds all of them, and its line or row.

    Raises: InputError for a missing or unreadable file, a file of another format, or a missing key.
    """
    files = [file for url in source.urls for file in _expand(url)]
    names = _relative_names([path for _, path in files])
    seen: set[str] = set()
    read = {"text": _iter_text, "jsonl": _iter_jsonl, "parquet": _iter_parquet}[source.kind]
    n_usable, problems = 0, []

    def note(name: str, reason: str) -> None:
        problems.append(f"{name}: {reason}")
        skip(name, reason)

    for name, (fs, path) in sorted(zip(names, files, strict=True), key=lambda item: item[0]):
        if name in seen:  # two patterns match one file
            continue
        seen.add(name)
        try:
            for document in read(source, fs, path, name, note):
                n_usable += 1
                yield document
        except FileNotFoundError as err:
            raise InputError(f"{path}: no such file. Check corpus.segments.") from err
        except (IsADirectoryError, PermissionError) as err:
            raise InputError(f"{path}: cannot be read ({err}). Check corpus.segments.") from err
        except UNREADABLE as err:
            raise InputError(f"{path}: cannot be unpacked ({err or 'it ends early'}). Check corpus.segments.") from err
        except OSError as err:
            raise TransientError(f"{path}: {err}") from err
    if n_usable == 0 and problems:
        raise InputError(f"{', '.join(source.urls)}: no usable document; the first problem: {problems[0]}")


def _expand(url: str) -> list[tuple[Any, str]]:
    """The file system and path of every file that `url` names, sorted."""
    try:
        fs, path = fsspec.core.url_to_fs(os.path.expanduser(url))
    except ImportError as err:
        raise ConfigError(f"{url}: {err}") from err
    except ValueError as err:
        raise InputError(f"{url}: {err}. Check corpus.segments.") from err
    if any(char in path for char in "*?["):
        paths = sorted(str(found) for found in fs.glob(path) if fs.isfile(found))
        if not paths:
            raise InputError(f"{url}: no file matches this pattern. Check corpus.segments.")
        return [(fs, found) for found in paths]
    if fs.isdir(path):
        raise InputError(f"{url}: is a folder. Name the files in it, for example {url.rstrip('/')}/*")
    if not fs.exists(path):
        raise InputError(f"{url}: no such file. Check corpus.segments.")
    return [(fs, path)]


def _relative_names(paths: list[str]) -> list[str]:
    """Paths without what they have in common, so that a moved corpus keeps its names."""
    folders = {path.rpartition("/")[0] for path in paths}
    same_kind = len({folder.startswith("/") for folder in folders}) == 1
    common = os.path.commonpath(folders) if same_kind else ""
    return [path[len(common) :].lstrip("/") for path in paths]


def _iter_text(source: FilesSource, fs: Any, path: str, name: str, skip: Skip) -> Iterator[tuple[str, str]]:
    with fs.open(path, "rb", compression="infer") as file:
        data = file.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as err:
        skip(name, f"not UTF-8 (byte {err.start} is 0x{data[err.start]:02x})")
        return
    yield name, text


def _iter_jsonl(source: FilesSource, fs: Any, path: str, name: str, skip: Skip) -> Iterator[tuple[str, str]]:
    with fs.open(path, "rb", compression="infer") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except UnicodeDecodeError as err:
                raise InputError(f"{where}: not UTF-8 (byte {err.start} of the line)") from err
            except json.JSONDecodeError as err:
                raise InputError(f"{where}: not JSON ({err}). A jsonl file has one object per line.") from err
            if not isinstance(row, dict):
                raise InputError(f"{where}: a {type(row).__name__}, expected an object")
            if source.text_field not in row:
                raise InputError(
                    f"{where}: no key {source.text_field!r}; its keys are {_listed(sorted(row))}. Set text_field."
                )
            yield from _text_value(row[source.text_field], f"{name}:{number}", where, skip)


def _iter_parquet(source: FilesSource, fs: Any, path: str, name: str, skip: Skip) -> Iterator[tuple[str, str]]:
    with fs.open(path, "rb") as handle:
        try:
            file = pq.ParquetFile(handle)
        except pa.ArrowInvalid as err:
            raise InputError(f"{path}: not a Parquet file ({err})") from err
        columns = file.schema_arrow.names
        if source.text_field not in columns:
            raise InputError(
                f"{path}: no column {source.text_field!r}; its columns are {_listed(columns)}. Set text_field."
            )
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=[source.text_field]):
            for value in batch.column(0).to_pylist():
                yield from _text_value(value, f"{name}:{number}", f"{path}, row {number}", skip)
                number += 1


def _text_value(value: Any, name: str, where: str, skip: Skip) -> Iterator[tuple[str, str]]:
    if value is None:
        skip(name, "null")
    elif isinstance(value, str):
        yield name, value
    else:
        raise InputError(f"{where}: the text is a {type(value).__name__}, expected a string. Set text_field.")


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:20])) or "none"
