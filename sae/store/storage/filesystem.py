"""The only door to storage (fsspec): read, atomic write, exclusive create.

Local folders, `s3://` and `memory://` (tests in one process) are supported, because only they offer an exclusive
create, on which the commit protocol rests. Nothing is ever written through `with fs.open(...)`: leaving such a block
by an exception still commits a truncated object. Files are finished in a local staging folder, then put whole.
"""

import contextlib
import copy
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from sae.errors import ConfigError, PipelineError
from sae.store import layout
from sae.store.storage import local
from sae.store.storage.address import protocol_of
from sae.store.storage.staging import find_abandoned, private_folder


class StoredFile(NamedTuple):
    """A file as a listing shows it."""

    path: str
    """Relative to the root."""
    n_bytes: int
    modified: float
    """Seconds since 1970 by the storage's own clock: when it was put there or last changed."""


class Storage:
    """One root: a folder, a bucket prefix or a memory file system. Paths are relative to the root, with `/`.

    Every method raises TransientError when storage failed in a way that may pass, and StoreError when permission is
    missing, the disk is full or the address cannot work.

    Args:
        root: a local path, `file://...`, `s3://bucket/prefix` or `memory://name`.

    Raises: ConfigError for another protocol, and for an address with credentials or options in it.
    """

    def __init__(self, root: str) -> None:
        self.protocol = protocol_of(root)
        if "://" in root:
            root = f"{self.protocol}://{root.split('://', 1)[1]}"
        self._failures: tuple[type[Exception], ...] = (OSError,)
        self._s3: ModuleType | None = None
        # Listings are never cached: other processes write to the same root.
        if self.protocol == "s3":
            from sae.store.storage import s3  # here, because its client takes a while to import

            self._s3, self.fs = s3, s3.connect()
            self._failures += s3.FAILURES
            self._base = self.fs._strip_protocol(root)
        else:
            self.fs, self._base = fsspec.core.url_to_fs(root, use_listings_cache=False)
        if self.is_local:
            self._base = os.path.abspath(self._base)
        self.root = self._base if self.is_local else root.rstrip("/")

    def __repr__(self) -> str:
        return f"Storage({self.root!r})"

    @property
    def is_local(self) -> bool:
        """Whether files can be opened by path."""
        return isinstance(self.fs, LocalFileSystem)

    def uri(self, path: str = "") -> str:
        """The full address of `path`, for people and for other tools."""
        return f"{self.root}/{path}" if path else self.root

    def full(self, path: str) -> str:
        """`path` as the underlying file system names it."""
        return f"{self._base}/{path}" if path else self._base

    def exists(self, path: str) -> bool:
        """Whether a file is there. A folder is not a file."""
        with self._errors(path):
            try:
                return bool(self.fs.info(self.full(path))["type"] == "file")
            except (FileNotFoundError, NotADirectoryError):
                return False

    def size(self, path: str) -> int:
        """Bytes of a file. Raises: StoreError when it is missing."""
        with self._errors(path):
            return int(self.fs.info(self.full(path))["size"])

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every file below `folder`, by path relative to it; empty when there is none. One listing on S3."""
        inside = f"{folder}/" if folder else ""
        found = {file.path.removeprefix(inside): file.n_bytes for file in self.walk(folder)}
        return {name: found[name] for name in sorted(found) if not _is_hidden(name)}

    def walk(self, folder: str) -> Iterator[StoredFile]:
        """Every file below `folder`, hidden ones too, in no order; a file that vanishes meanwhile is left out.

        Held in memory is one page of a bucket's listing, or one local folder's.
        """
        place = self.full(folder)
        with self._errors(folder):
            if self._s3:
                found = self._s3.walk(self.fs, place)
            elif self.is_local:
                found = local.walk(Path(place))
            else:
                names = [name for name in self.fs.find(place) if name != place]  # a file has none below it
                found = ((name, self.fs.size(name), self.fs.modified(name).timestamp()) for name in names)
            for name, n_bytes, modified in found:
                yield StoredFile(name.removeprefix(self._base).lstrip("/"), n_bytes, modified)

    def now(self) -> float:
        """What time it is by the clock that dates files here, in seconds since 1970: a file is written to see.

        On a bucket that is the server's clock, on a network drive the drive's, else this machine's.
        """
        path = f"{layout.STAGING}/probe-{uuid.uuid4().hex}"
        with self._errors(path):
            if self.is_local:
                local.make_folders(self._scratch)
                with tempfile.TemporaryFile(dir=self._scratch) as probe:
                    return os.fstat(probe.fileno()).st_mtime
            self.fs.pipe_file(self.full(path), b"what time is it")
            modified = self.fs.modified(self.full(path))
            self.fs.rm_file(self.full(path))
            return float(modified.timestamp())

    def read_bytes(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        """The bytes [start, end) of a file, all of it by default; fewer where the file ends before.

        Raises: StoreError when it is missing.
        """
        with self._errors(path):
            try:
                # By keyword: the third positional argument of s3fs' cat_file is a version id.
                return bytes(self.fs.cat_file(self.full(path), start=start, end=end))
            except OSError as err:
                if self._s3 and self._s3.status(err) == 416:  # all of the range is behind the end
                    return b""
                raise

    def read_if_there(self, path: str) -> bytes | None:
        """All of a small file, or None when it is missing: one request where `exists` and `read_bytes` make three."""
        whole = {"max_concurrency": 1} if self._s3 else {}  # s3fs: without asking for the size first
        with self._errors(path):
            try:
                return bytes(self.fs.cat_file(self.full(path), **whole))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def signed_url(self, path: str, seconds: int) -> str:
        """An address from which a file on S3 can be read for a while without other credentials. Asks nobody.

        It is as good as a credential: never to be stored, logged or part of a message.
        """
        with self._errors(path):
            return str(self.fs.url(self.full(path), expires=seconds))

    def list(self, folder: str) -> list[str]:
        """Names directly inside `folder`, sorted; empty when there is no such folder. Dot names are not shown."""
        place = self.full(folder)
        with self._errors(folder):
            try:
                entries = [str(entry).rstrip("/") for entry in self.fs.ls(place, detail=False)]
            except (FileNotFoundError, NotADirectoryError):
                return []
        names = (entry.rsplit("/", 1)[-1] for entry in entries if entry.lstrip("/") != place.lstrip("/"))
        return sorted(name for name in names if not _is_hidden(name))

    def put_file(self, file: Path, path: str) -> None:
        """Move a finished local file to `path`; readers see nothing or all of it. An existing file is replaced."""
        with self._errors(path):
            if self.is_local:
                local.put(file, Path(self.full(path)))
            elif self._s3:
                self.fs.put_file(str(file), self.full(path), chunksize=self._s3.UPLOAD_BYTES)
            else:
                self.fs.put_file(str(file), self.full(path))

    def create_exclusive(self, path: str, data: bytes) -> bool:
        """Write `data` at `path` if nothing is there. Returns: False when somebody else was first.

        Local: a finished file is hard-linked into place. S3: a conditional PUT (If-None-Match).
        """
        if self.is_local:
            with self._errors(path), self.staging() as folder:
                return local.create(Path(self.full(path)), data, scratch=folder)
        with self._errors(path):
            if self._s3:
                return bool(self._s3.create(self.fs, self.full(path), data))
            try:
                self.fs.pipe_file(self.full(path), data, mode="create")
            except FileExistsError:
                return False
            return True

    def replace(self, path: str, data: bytes) -> None:
        """Write `data` at `path`, atomically, whatever is there (checkpoint pointers, never commit records)."""
        with self.staging() as folder:
            (folder / "data").write_bytes(data)
            self.put_file(folder / "data", path)

    def remove(self, path: str) -> None:
        """Delete one file if it is there."""
        with self._errors(path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            self.fs.rm_file(self.full(path))

    def remove_empty_folders(self, folder: str) -> None:
        """Delete `folder` if no file is below it, and empty folders inside it; nothing to do on a bucket."""
        if self.is_local:
            with self._errors(folder):
                local.remove_empty_folders(Path(self.full(folder)))

    @contextlib.contextmanager
    def holding(self, folder: str) -> Iterator[None]:
        """Keep `folder` from those who would empty it (`taking`) while the block writes into it.

        It is a shared lock on the local folder, which ends with the process; a bucket has none.
        """
        if not self.is_local:
            yield
            return
        with contextlib.ExitStack() as entered:
            with self._errors(folder):
                entered.enter_context(local.holding(Path(self.full(folder))))
            yield

    @contextlib.contextmanager
    def taking(self, folder: str) -> Iterator[bool]:
        """Keep writers out of `folder` while the block empties it. Yields: False when one holds it, or it is gone."""
        if not self.is_local:
            yield True
            return
        with contextlib.ExitStack() as entered:
            with self._errors(folder):
                taken = entered.enter_context(local.taking(Path(self.full(folder))))
            yield taken

    def abandoned_staging(self) -> Iterator[str]:
        """Staging folders inside a local root whose owner has died. (A bucket's lie in this machine's temporary
        folder; the next run removes them.)"""
        if self.is_local:
            yield from (f"{layout.STAGING}/{found.name}" for found in find_abandoned(self._scratch))

    def remove_abandoned_staging(self, path: str) -> bool:
        """Delete one of `abandoned_staging`. Returns: False when it is none any more."""
        if path not in self.abandoned_staging():
            return False
        shutil.rmtree(self.full(path), ignore_errors=True)
        return True

    def torn_uploads(self) -> Iterator[tuple[StoredFile, str]]:
        """Uploads in pieces that were begun below the root and not ended, with their ids; their sizes are not known.

        Their pieces are paid for and shown in no listing. Always empty but on a bucket.
        """
        if not self._s3:
            return
        with self._errors(""):
            for name, begun, upload in self._s3.torn_uploads(self.fs, self._base):
                yield StoredFile(name.removeprefix(self._base).lstrip("/"), 0, begun), upload

    def abort_upload(self, path: str, upload: str) -> None:
        """Give up an upload in pieces: whoever still sends some is told that there is no such upload."""
        assert self._s3
        with self._errors(path):
            self._s3.abort_upload(self.fs, self.full(path), upload)

    def fetch(self, path: str, into: Path) -> Path:
        """A local path that holds the file: itself on a local root, else a download inside `into`.

        Raises: StoreError when it is missing; on a local root whoever opens it finds that out.
        """
        if self.is_local:
            return Path(self.full(path))
        copied = into / Path(path).name
        with self._errors(path):
            self.fs.get_file(self.full(path), str(copied))
        return copied

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A private local folder for one attempt, removed afterwards. On a local root it is on the same device.

        Raises: StoreError when a write inside the block finds the disk full.
        """
        parent, prefix = self._scratch, "" if self.is_local else "sae-pipeline-"
        with contextlib.ExitStack() as entered:
            with self._errors(layout.STAGING):
                local.make_folders(parent)
                folder = entered.enter_context(private_folder(parent, prefix))
            try:
                yield folder
            except Exception as err:
                if local.is_disk_full(err):
                    raise local.disk_full(err, parent) from err
                raise

    def free_bytes(self) -> int | None:
        """Bytes that can still be written; None where nobody knows (a bucket)."""
        return local.free_bytes(Path(self._base)) if self.is_local else None

    def check_writable(self) -> None:
        """Write and delete a small file; see that a second create of it is refused.

        Raises: ConfigError when the root cannot be written or its exclusive create is not exclusive.
        """
        probe = copy.copy(self)
        if self._s3:  # a wrong address is known in seconds
            probe.fs = self._s3.connect(patient=False)
        path = f"{layout.STAGING}/probe-{uuid.uuid4().hex}"
        try:
            exclusive = probe.create_exclusive(path, b"first") and not probe.create_exclusive(path, b"second")
            probe.list(layout.STAGING)
            probe.remove(path)
        except PipelineError as err:
            reason = str(err).removeprefix(f"{self.uri(path)}: ").rstrip(".")
            raise ConfigError(
                f"root {self.root!r} cannot be written: {reason}. Choose another with --root or execution.root."
            ) from err
        if not exclusive:
            raise ConfigError(
                f"root {self.root!r}: its storage overwrites what an exclusive create must leave alone (on S3: it "
                f"ignores If-None-Match), so a second run could corrupt stored data. Use another root."
            )

    @contextlib.contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """Turn what a file system raises into our errors, with the place."""
        try:
            yield
        except PipelineError:
            raise
        except self._failures as err:
            raise self._as_error(err, path) from err

    def _as_error(self, err: Exception, path: str) -> PipelineError:
        error: PipelineError | None = self._s3.as_error(err, self.uri(path)) if self._s3 else None
        return error or local.as_error(err, self.uri(path), self._scratch)

    @property
    def _scratch(self) -> Path:
        """Where unfinished files lie."""
        return Path(self.full(layout.STAGING)) if self.is_local else Path(tempfile.gettempdir())


def _is_hidden(name: str) -> bool:
    """Whether a path belongs to nobody's artefact: unfinished files, Prefect's results."""
    return any(piece.startswith(".") for piece in name.split("/"))
