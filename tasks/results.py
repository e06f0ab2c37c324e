"""Where Prefect keeps tasks' results: small JSON files on the root they point into, however a run was started."""

from pathlib import Path
from typing import Any

from prefect.exceptions import ObjectAlreadyExists
from prefect.filesystems import RemoteFileSystem, WritableFileSystem
from prefect.utilities.annotations import NotSet

from sae.config import digest
from sae.store import layout
from sae.store.storage.filesystem import Storage

SAVE_ATTEMPTS = 5


def result_storage(storage: Storage) -> WritableFileSystem | Path | type[NotSet]:
    """What `task.with_options(result_storage=...)` takes for this root. Once per flow run is enough.

    A local root needs nothing on the server. For S3 a storage block is saved there, named by a digest of what it
    says, so two runs that save it at once save the same. It holds the address and no credentials: whoever reads
    results brings his own. For memory://, which only this process can read, Prefect's own default stays.
    """
    if storage.is_local:
        return Path(storage.full(layout.RESULTS))
    if storage.protocol == "memory":
        return NotSet
    from sae.store.storage import s3

    block = RemoteFileSystem(basepath=storage.uri(layout.RESULTS), settings=s3.OPTIONS)
    block = _saved(block, f"sae-pipeline-{digest([block.basepath, block.settings])}")
    block._filesystem = storage.fs  # the same connections, and the same care about time-outs
    return block


def _saved(block: RemoteFileSystem, name: str) -> RemoteFileSystem:
    """The block as the server knows it, saved there unless it is."""
    load: Any = RemoteFileSystem.load
    save: Any = block.save
    try:
        known: RemoteFileSystem = load(name, _sync=True)
        if (known.basepath, known.settings) == (block.basepath, block.settings):  # nobody edited it
            return known
    except ValueError:  # Prefect's "not found"
        pass
    for attempt in range(SAVE_ATTEMPTS):
        try:
            save(name, overwrite=True, _sync=True)
            break
        except ObjectAlreadyExists:  # another run registered the block's type at the same moment
            if attempt + 1 == SAVE_ATTEMPTS:
                raise
    return block
