"""Corpora: documents read in a fixed order, the digest that names them, and which of them are held out."""

import hashlib
import json
import logging
import os
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeGuard

from sae.errors import InputError
from sae.extract.config import DatasetSource, FilesSource, SegmentSpec, Source, StdlibSource
from sae.extract.files import iter_files
from sae.extract.hub_dataset import dataset_digest, iter_dataset
from sae.progress import Progress, silent
from sae.store.artefacts.records import Record, commit, require_record
from sae.store.storage.filesystem import Storage

logger = logging.getLogger(__name__)

STDLIB_EXCLUDED = frozenset(
    {
        *("test", "tests", "idle_test", "lib2to3", "distutils", "idlelib", "tkinter", "turtledemo", "ensurepip"),
        *("encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__"),
    }
)
"""Folders of the standard library that are tests, tables, generated, or missing on some distributions."""
STDLIB_EXCLUDED_PREFIXES = ("config-", "_sysconfigdata")
STDLIB_EXPECTED_BYTES = 5_000_000
REPORT_BYTES = 16 << 20
"""Text between two reports of progress."""


@dataclass(frozen=True)
class Document:
    """One text of a corpus. `name` is unique inside its segment and decides whether the document is held out."""

    name: str
    text: str


@dataclass
class Tally:
    """What was read of a source; grows while its documents are iterated."""

    n_documents: int = 0
    n_bytes: int = 0
    n_heldout: int = 0
    n_heldout_bytes: int = 0
    skipped: list[str] | None = None
    """`name: reason` of every document that could not be used."""
    digest: str = ""
    """SHA-256 of names and texts in order and of what was skipped; set when the source is exhausted."""


def iter_documents(source: Source) -> Iterator[Document]:
    """The documents of a source, in a fixed order: never empty, valid Unicode.

    Raises: InputError when the source cannot be read or holds no document.
    """
    yield from _read(source, Tally(), 0.0)


def is_heldout(name: str, fraction: float) -> bool:
    """Whether the document of that name is held out: a hash of the name decides, so new documents move no old ones."""
    draw = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big")
    return draw < fraction * 2**64


def resolve_segment(source: Source, heldout_fraction: float) -> SegmentSpec:
    """What a source holds now, as a spec. Raises: as measure_segment."""
    return measure_segment(source, heldout_fraction)[0]


def measure_segment(
    source: Source, heldout_fraction: float, progress: Progress = silent
) -> tuple[SegmentSpec, Tally | None]:
    """What a source holds now, as a spec, and how much of it there is: reads all of it.

    A data set on the hub is pinned by its commit and not read: its size is None.

    Raises: InputError when the source cannot be read or holds no document.
    """
    if _is_on_hub(source):
        spec = SegmentSpec(kind=source.kind, documents=dataset_digest(source), heldout_fraction=heldout_fraction)
        return spec, None
    tally = Tally()
    reported = 0
    for _ in _read(source, tally, heldout_fraction):
        if tally.n_bytes - reported >= REPORT_BYTES:
            reported = tally.n_bytes
            progress(tally.n_documents, tally.n_documents, "documents", f"{tally.n_bytes / 1e6:.0f} MB")
    return SegmentSpec(kind=source.kind, documents=tally.digest, heldout_fraction=heldout_fraction), tally


def commit_segment(storage: Storage, spec: SegmentSpec, source: Source) -> Record:
    """Freeze the set of documents: `segment.json` with its sizes and its SHA-256.

    Raises: InputError when `source` no longer holds what `spec` was resolved from.
    """
    started = time.perf_counter()
    tally = Tally()
    for _ in iter_segment(spec, source, tally):
        pass
    sizes = {
        "n_documents": tally.n_documents,
        "n_heldout_documents": tally.n_heldout,
        "n_bytes": tally.n_bytes,
        "n_skipped": len(tally.skipped or ()),
        "sha256": tally.digest,
    }
    if source.kind == "stdlib" and source.max_documents is None and tally.n_bytes < STDLIB_EXPECTED_BYTES:
        logger.warning(
            "the standard library here has only %.1f MB of sources (%.1f MB expected): results will be weaker. "
            "Point corpus.segments at other text for more.",
            tally.n_bytes / 1e6,
            7.8,
        )
    with storage.staging() as folder:
        content = sizes | {"kind": source.kind, "skipped": tally.skipped}
        (folder / "segment.json").write_text(json.dumps(content, indent=1) + "\n")
        # The same documents may lie elsewhere tomorrow: where they were is told, but is not part of the content.
        metrics = sizes | {"source": source.model_dump(mode="json")}
        return commit(storage, spec, folder, metrics, seconds=time.perf_counter() - started)


def iter_segment(spec: SegmentSpec, source: Source, tally: Tally) -> Iterator[Document]:
    """The documents of a resolved segment, checked against its digest at the end.

    Raises: InputError when `source` no longer holds what `spec` was resolved from.
    """
    yield from _read(source, tally, spec.heldout_fraction)
    found = dataset_digest(source) if _is_on_hub(source) else tally.digest
    if found != spec.documents:
        raise InputError(
            f"{_describe(source)}: changed while the pipeline ran (documents {found[:16]}, planned with "
            f"{spec.documents[:16]}). Start the run again."
        )


def training_texts(storage: Storage, segment: str, source: Source) -> Iterator[str]:
    """The texts of a committed segment's training documents, in order. Raises: as iter_segment."""
    spec = SegmentSpec.model_validate(require_record(storage, segment).spec)
    for document in iter_segment(spec, source, Tally()):
        if not is_heldout(document.name, spec.heldout_fraction):
            yield document.text


def _is_on_hub(source: Source) -> TypeGuard[DatasetSource]:
    return isinstance(source, DatasetSource) and not os.path.isdir(source.name)


def _read(source: Source, tally: Tally, heldout_fraction: float) -> Iterator[Document]:
    """Read a source; count, hash and drop what cannot be used."""
    skipped: list[str] = []

    def skip(name: str, reason: str) -> None:
        skipped.append(f"{name}: {reason}")

    hasher = hashlib.sha256()
    for name, text in _raw_documents(source, skip):
        if not text.strip():
            skip(name, "empty")
            continue
        data = text.encode("utf-8", "surrogatepass")
        try:
            data.decode("utf-8")
        except UnicodeDecodeError:  # JSON can spell half a surrogate pair, which no tokenizer accepts
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            data = text.encode()
        encoded_name = name.encode("utf-8", "surrogatepass")
        hasher.update(b"%d %d\n%b\n" % (len(encoded_name), len(data), encoded_name))
        hasher.update(data)
        tally.n_documents += 1
        tally.n_bytes += len(data)
        if is_heldout(name, heldout_fraction):
            tally.n_heldout += 1
            tally.n_heldout_bytes += len(data)
        yield Document(name, text)
    hasher.update(json.dumps(skipped).encode())
    tally.skipped, tally.digest = skipped, hasher.hexdigest()
    if tally.n_documents == 0:
        reasons = f"; {len(skipped)} were skipped, the first: {skipped[0]}" if skipped else ""
        raise InputError(f"{_describe(source)}: no document to read{reasons}. Check corpus.segments.")


def _raw_documents(source: Source, skip: Callable[[str, str], None]) -> Iterator[tuple[str, str]]:
    if isinstance(source, StdlibSource):
        return _iter_stdlib(source, skip)
    if isinstance(source, FilesSource):
        return iter_files(source, skip)
    return iter_dataset(source, skip)


def _describe(source: Source) -> str:
    if isinstance(source, StdlibSource):
        return f"standard library at {sysconfig.get_paths()['stdlib']}"
    return ", ".join(source.urls) if isinstance(source, FilesSource) else f"data set {source.name!r}"


def _iter_stdlib(source: StdlibSource, skip: Callable[[str, str], None]) -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    names = _stdlib_names(root) if root.is_dir() else []
    if not names:
        raise InputError(
            f"{root}: no Python sources there (this Python ships its standard library zipped or not at all). "
            f"Name another corpus in corpus.segments, for example "
            f'{{"kind": "text", "urls": ["/path/to/*.txt"]}}.'
        )
    for name in names[: source.max_documents]:
        data = (root / name).read_bytes()
        try:
            yield name, data.decode("utf-8")
        except UnicodeDecodeError as err:
            skip(name, f"not UTF-8 (byte {err.start})")


def _stdlib_names(root: Path) -> list[str]:
    """Paths of the sources used, relative to `root`, sorted."""
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [
            sub for sub in subfolders if sub not in STDLIB_EXCLUDED and not sub.startswith(STDLIB_EXCLUDED_PREFIXES)
        ]
        names += [
            PurePosixPath(Path(folder, file).relative_to(root)).as_posix()
            for file in files
            if file.endswith(".py") and not file.startswith(STDLIB_EXCLUDED_PREFIXES)
        ]
    return sorted(names)
