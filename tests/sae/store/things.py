"""Small artefacts to commit, and to harm."""

from typing import ClassVar

from sae.config import Ref, Spec
from sae.store.artefacts.record import Record
from sae.store.artefacts.records import commit
from sae.store.storage.filesystem import Storage


class ThingSpec(Spec):
    stage: ClassVar[str] = "things"
    code_version: ClassVar[int] = 1
    size: int
    source: Ref = "sources/0123456789abcdef"
    more: tuple[Ref, ...] = ("sources/aaaaaaaaaaaaaaaa",)


def make(storage: Storage, spec: Spec, contents: dict[str, bytes], part: int | None = None) -> Record:
    with storage.staging() as folder:
        for name, data in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        return commit(storage, spec, folder, {"n": len(contents)}, seconds=1.0, part=part)
