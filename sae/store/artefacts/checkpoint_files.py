"""The files of an artefact's checkpoints: written, found, verified, removed. `checkpoints.py` knows which count."""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import xxhash
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sae.config import FrozenConfig, digest
from sae.errors import StoreError
from sae.store import layout
from sae.store.storage.filesystem import Storage

_MOST_TRIES = 100
"""To write into a folder that others delete. Each of them does so once."""
_ATTEMPT = re.compile(r"[0-9a-f]+")
_FILE = re.compile(r"step-(\d{8})\.(?:json|(?:part-\d{5}\.)?safetensors)")


class Position(FrozenConfig):
    """Where the work stands. Subclasses add what else the loop must know to go on."""

    step: int = Field(ge=1)
    """Optimizer steps done."""


P = TypeVar("P", bound=Position)


class Pointer(FrozenConfig):
    """The small file that makes a checkpoint count."""

    position: dict[str, Any]
    xxh3: str
    """xxh3-64 of the data file, in hex."""
    parts: tuple[str, ...] = ()
    """The same of every part, where several processes have written one each."""
    digest: str
    """Of the other fields: a flipped bit in a counter would go unnoticed otherwise."""

    @classmethod
    def of(cls, position: Position, xxh3: str, parts: Sequence[str] = ()) -> "Pointer":
        """The pointer to a data file and its parts, by their hashes."""
        fields = position.model_dump(mode="json")
        return cls(position=fields, xxh3=xxh3, parts=tuple(parts), digest=_digest_of(fields, xxh3, parts))


def _digest_of(position: dict[str, Any], xxh3: str, parts: Sequence[str]) -> str:
    return digest([position, xxh3, list(parts)] if parts else [position, xxh3])


class Saved(NamedTuple):
    """One checkpoint, by what its files are called. The newest is the largest."""

    step: int
    attempt: str


class CheckpointFiles:
    """Those of one artefact, of all attempts. ref: `stage/fingerprint`."""

    def __init__(self, storage: Storage, ref: str) -> None:
        self.storage, self.ref = storage, ref

    def data(self, saved: Saved) -> str:
        """Path of the tensors that the first process writes."""
        return layout.checkpoint_data(self.ref, saved.attempt, saved.step)

    def part(self, saved: Saved, part: int) -> str:
        """Path of the tensors that one of several processes writes."""
        return layout.checkpoint_part(self.ref, saved.attempt, saved.step, part)

    def pointer(self, saved: Saved) -> str:
        """Path of the pointer."""
        return layout.checkpoint_pointer(self.ref, saved.attempt, saved.step)

    def write_tensors(self, path: str, tensors: Mapping[str, Tensor]) -> str:
        """Returns: the xxh3-64 of the file, in hex."""
        data = bytes(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))
        self.write(path, data)
        return xxhash.xxh3_64_hexdigest(data)

    def write_pointer(self, saved: Saved, pointer: Pointer) -> None:
        """From now on the checkpoint counts."""
        self.write(self.pointer(saved), f"{pointer.model_dump_json(indent=1, exclude_defaults=True)}\n".encode())

    def write(self, path: str, data: bytes) -> None:
        """Write a file that is seen whole or not at all."""
        for tries in itertools.count(1):
            try:
                self.storage.replace(path, data)
            except StoreError as err:
                # The folder went while it was written to: a run of the same work has finished and tidies up.
                if not isinstance(err.__cause__, FileNotFoundError) or tries == _MOST_TRIES:
                    raise
            else:
                return

    def read_pointer(self, saved: Saved, position: type[P]) -> tuple[Pointer, P]:
        """Raises: StoreError when it is not whole."""
        text = self.storage.read_bytes(self.pointer(saved))
        try:
            pointer = Pointer.model_validate_json(text)
            if _digest_of(pointer.position, pointer.xxh3, pointer.parts) != pointer.digest:
                raise StoreError("the pointer's content differs from its own digest")
            found = position.model_validate_json(json.dumps(pointer.position))
        except ValidationError as err:
            raise StoreError(f"not a readable pointer ({err.errors()[0]['msg']})") from err
        if found.step != saved.step:
            raise StoreError(f"its pointer is that of step {found.step}")
        return pointer, found

    def read_tensors(self, path: str, xxh3: str) -> dict[str, Tensor]:
        """Raises: StoreError when the file is not the one with this hash."""
        data = self.storage.read_bytes(path)
        if xxhash.xxh3_64_hexdigest(data) != xxh3:
            raise StoreError(f"its data file ({len(data)} bytes) differs from the pointer's hash {xxh3}")
        try:
            return load(data)
        except SafetensorError as err:
            raise StoreError(f"its data file is not safetensors ({err})") from err

    def list(self, but: str) -> tuple[set[Saved], set[Saved]]:
        """What other attempts than one have written: everything, whole or not, and what has a pointer."""
        everything, pointers = set(), set()
        for attempt in attempts(self.storage, self.ref):
            if attempt == but:
                continue
            for name in self.storage.list(layout.checkpoint_folder(self.ref, attempt)):
                if match := _FILE.fullmatch(name):
                    saved = Saved(int(match[1]), attempt)
                    everything.add(saved)
                    if name.endswith(".json"):
                        pointers.add(saved)
        return everything, pointers

    def remove(self, saved: Saved) -> None:
        """Delete all files of a checkpoint."""
        # Pointer first: a data file without a pointer is harmless, a pointer without its data file is a warning.
        self.storage.remove(self.pointer(saved))
        self.storage.remove(self.data(saved))
        folder = layout.checkpoint_folder(self.ref, saved.attempt)
        for name in self.storage.list(folder):
            if name.startswith(f"step-{saved.step:08d}.part-"):
                self.storage.remove(f"{folder}/{name}")


def attempts(storage: Storage, ref: str) -> list[str]:
    """Those that have written something."""
    return [name for name in storage.list(layout.checkpoint_folder(ref)) if _ATTEMPT.fullmatch(name)]
