"""Where bad days take place: fresh roots, the children that die there, and an S3 endpoint behind a network."""

import contextlib
import functools
import itertools
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sae.store.storage import s3
from sae.store.storage.filesystem import Storage
from tests.bad_days import small_store
from tests.bad_days.children import Children
from tests.sae.store.network import Network, network


class NotHereError(Exception):
    """This system does not let a fault be made; the message says why."""


class Place:
    """Fresh roots below a folder and on an endpoint. The environment has the endpoint's credentials.

    Args:
        children: start one child at a time.
        rivals: start another beside it.
        endpoint: URL of an S3 server.
    """

    def __init__(self, folder: Path, children: Children, rivals: Children, endpoint: str) -> None:
        self.folder, self.children, self.rivals, self.endpoint = folder, children, rivals, endpoint
        self._numbers = itertools.count()

    def fresh_folder(self) -> Path:
        """A new folder."""
        folder = self.folder / str(next(self._numbers))
        folder.mkdir(parents=True)
        return folder

    def fresh(self, is_remote: bool) -> Storage:
        """A new, empty root."""
        if not is_remote:
            return Storage(str(self.fresh_folder() / "root"))
        return Storage(f"s3://{self._bucket}/{uuid.uuid4().hex[:12]}/root")

    def copy(self, storage: Storage) -> Storage:
        """The same files in a new root."""
        copied = self.fresh(not storage.is_local)
        if storage.is_local:
            shutil.copytree(storage.root, copied.root)
        else:
            for file in storage.walk(""):
                copied.fs.pipe_file(copied.full(file.path), storage.read_bytes(file.path))
        return copied

    def discard(self, storage: Storage) -> None:
        """Delete a root on disk."""
        if storage.is_local:
            shutil.rmtree(Path(storage.root).parent)

    def environment(self, hop: Network) -> dict[str, str]:
        """Of a child whose way to S3 leads through a network, and whose staging folders lie here."""
        return {"AWS_ENDPOINT_URL": hop.url, "TMPDIR": str(self.fresh_folder())}

    @contextlib.contextmanager
    def network(self) -> Iterator[Network]:
        """A hop to the endpoint, while the block runs."""
        with network(self.endpoint) as hop:
            yield hop

    @functools.cached_property
    def _bucket(self) -> str:
        bucket = f"bucket-{uuid.uuid4().hex[:12]}"
        s3.connect().mkdir(bucket)
        return bucket


@functools.cache
def uninterrupted(work: Callable[[Storage], Any] = small_store.build) -> dict[str, Any]:
    """What a root holds in the end when nothing goes wrong."""
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(folder)
        work(storage)
        return small_store.contents(storage)
