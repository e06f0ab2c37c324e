"""Checkpoints of an artefact in the making: named tensors and a small JSON position, from which a later call goes on.

<ref>/checkpoints/<attempt>/step-00000100.safetensors   the tensors, written first
<ref>/checkpoints/<attempt>/step-00000100.json          the pointer, written after it: position and hashes

Several processes that make an artefact together (`Group`) each write a share of the tensors' rows beside it,

<ref>/checkpoints/<attempt>/step-00000100.part-00003.safetensors

the first writes what is not shared and, once all are there, the pointer with the hashes of all. Share p of P of n rows
are the rows [n p // P, n (p + 1) // P), so another number of processes reads the parts in which its own rows lie.

Every training call is an attempt with a random id and writes only under it, so neither a predecessor that is still
dying nor a second run of the same work can harm it. All of them read the newest checkpoint that is whole, whoever
wrote it. A data file that no pointer names never happened.

Checkpoints lie under the artefact's fingerprint, a digest of spec and code version: one that belongs to another spec
or another code version lies elsewhere and is never found. What is found but does not fit is refused by `restore`.
"""

import itertools
import json
import logging
import re
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import xxhash
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sae.config import FrozenConfig, digest
from sae.errors import StoreError
from sae.store import layout
from sae.store.artefacts.group import ALONE, Group
from sae.store.storage.filesystem import Storage

logger = logging.getLogger(__name__)

KEEP = 2
"""The newest, and one before it in case that is damaged."""
_MOST_TRIES = 100
"""To write into a folder that others delete. Each of them does so once."""
_ATTEMPT = re.compile(r"[0-9a-f]+")
_FILE = re.compile(r"step-(\d{8})\.(?:json|(?:part-\d{5}\.)?safetensors)")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_NONE: Mapping[str, Tensor] = MappingProxyType({})


class Position(FrozenConfig):
    """Where the work stands. Subclasses add what else the loop must know to go on."""

    step: int = Field(ge=1)
    """Optimizer steps done."""


P = TypeVar("P", bound=Position)
Restore = Callable[[dict[str, Tensor], P], None]
"""Puts a checkpoint in place. Raises: StoreError when it does not fit, before anything is changed."""


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
    def of(cls, position: Position, data: bytes, parts: Sequence[str] = ()) -> "Pointer":
        """The pointer to a data file and its parts."""
        fields, xxh3 = position.model_dump(mode="json"), xxhash.xxh3_64_hexdigest(data)
        return cls(position=fields, xxh3=xxh3, parts=tuple(parts), digest=_digest_of(fields, xxh3, parts))


def _digest_of(position: dict[str, Any], xxh3: str, parts: Sequence[str]) -> str:
    return digest([position, xxh3, list(parts)] if parts else [position, xxh3])


class _Saved(NamedTuple):
    """One checkpoint, by what its files are called. The newest is the largest."""

    step: int
    attempt: str


def new_attempt() -> str:
    """A random id for one training call; a sweep shares one."""
    return uuid.uuid4().hex[:16]


class Checkpoints(Generic[P]):
    """The checkpoints of one artefact as one attempt sees them: it reads everybody's and writes its own.

    Args:
        ref: the artefact, `stage/fingerprint`.
        position: the type of position that is read back.
        attempt: from `new_attempt`, the same in all processes of the group.
        group: the processes that make the artefact together; all of them save and load at the same time.
    """

    def __init__(self, storage: Storage, ref: str, position: type[P], attempt: str, group: Group = ALONE) -> None:
        self.storage, self.ref, self.attempt, self._group = storage, ref, attempt, group
        self._position = position
        self._found: set[_Saved] = set()
        """What others had written when this attempt began."""
        self._resumed: _Saved | None = None
        self._own: list[_Saved] = []

    def load(self, restore: Restore[P], parts: Callable[[int], Sequence[int]] = range) -> P | None:
        """Go on from the newest checkpoint of any attempt that is whole and that `restore` takes.

        The others are passed over with a warning. All processes of a group take the same one.

        Args:
            parts: which of so many parts this process needs. Their tensors are put end to end.

        Returns: its position, None when there is none.
        """
        refused: set[_Saved] = set()
        vanished: set[_Saved] = set()
        while True:
            self._found, pointers = self._list()
            for saved in self._as_first_sees(pointers - refused):
                failed: StoreError | None = None
                try:
                    position, tensors = self._read(saved, parts)
                except StoreError as err:
                    failed = err
                if not self._group.agree(failed is not None):
                    try:
                        restore(tensors, position)
                    except StoreError as err:
                        failed = err
                    if not self._group.agree(failed is not None):
                        self._resumed = saved
                        logger.info("%s: going on from the checkpoint of step %d", self.ref, saved.step)
                        return position
                gone = saved not in vanished and not self.storage.exists(self._pointer(saved))
                if self._group.agree(gone):
                    # Its owner is alive and deleted it after writing newer ones: look for those.
                    vanished.add(saved)
                    break
                refused.add(saved)
                uri, reason = self.storage.uri(self._pointer(saved)), failed or "another process could not read it"
                logger.warning("checkpoint %s is passed over: %s", uri, " ".join(str(reason).split()))
            else:
                return None

    def save(self, tensors: Mapping[str, Tensor], position: P, shared: Mapping[str, Tensor] = _NONE) -> None:
        """Write a checkpoint, then delete those that it makes superfluous.

        Of its own and the one it resumed from, the newest two stay. Others that lay there when this attempt began go
        once it has come as far; what was written since belongs to an attempt that is alive.

        Args:
            tensors: what one process writes for all.
            shared: this process's share of the rows of others.
        """
        saved = _Saved(position.step, self.attempt)
        if saved in self._own or (self._resumed is not None and self._resumed.step == saved.step):
            return
        hashes: list[str] = []
        if self._group.world == 1:
            tensors = {**tensors, **shared}
        else:
            data = _as_bytes(shared)
            self._write(layout.checkpoint_part(self.ref, saved.attempt, saved.step, self._group.share), data)
            # The upper half of the hash and the lower: numbers that are told are below 2^63.
            halves = divmod(xxhash.xxh3_64_intdigest(data), 1 << 32)
            hashes = [f"{high << 32 | low:016x}" for high, low in zip(*map(self._group.collect, halves), strict=True)]
        self._group.once(lambda: self._write_pointer(saved, _as_bytes(tensors), position, hashes))
        self._own.append(saved)
        self._prune()

    def _write_pointer(self, saved: "_Saved", data: bytes, position: P, hashes: Sequence[str]) -> None:
        pointer = Pointer.of(position, data, hashes).model_dump_json(indent=1, exclude_defaults=True) + "\n"
        self._write(self._data(saved), data)
        self._write(self._pointer(saved), pointer.encode())

    @property
    def newest(self) -> str | None:
        """The address of the newest checkpoint that this attempt has written or gone on from."""
        candidates = [*self._own, *([self._resumed] if self._resumed else [])]
        return self.storage.uri(self._pointer(max(candidates))) if candidates else None

    def save_beside(self, name: str, data: bytes) -> None:
        """Write a small file for people who watch into the attempt's folder."""
        self._write(f"{layout.checkpoint_folder(self.ref, self.attempt)}/{name}", data)

    def _as_first_sees(self, pointers: set[_Saved]) -> list[_Saved]:
        """Newest first: what the first process has found, for all."""
        text = self._group.tell(json.dumps(sorted(pointers, reverse=True)))
        return [_Saved(step, attempt) for step, attempt in json.loads(text)]

    def _read(self, saved: _Saved, parts: Callable[[int], Sequence[int]]) -> tuple[P, dict[str, Tensor]]:
        """Raises: StoreError when it is not whole."""
        text = self.storage.read_bytes(self._pointer(saved))
        try:
            pointer = Pointer.model_validate_json(text)
            if _digest_of(pointer.position, pointer.xxh3, pointer.parts) != pointer.digest:
                raise StoreError("the pointer's content differs from its own digest")
            position = self._position.model_validate_json(json.dumps(pointer.position))
        except ValidationError as err:
            raise StoreError(f"not a readable pointer ({err.errors()[0]['msg']})") from err
        if position.step != saved.step:
            raise StoreError(f"its pointer is that of step {position.step}")
        tensors = self._read_tensors(self._data(saved), pointer.xxh3)
        found = [
            self._read_tensors(layout.checkpoint_part(self.ref, saved.attempt, saved.step, part), pointer.parts[part])
            for part in parts(len(pointer.parts))
        ]
        joined = {name: torch.cat([part[name] for part in found]) for name in (found[0] if found else ())}
        return position, tensors | joined

    def _read_tensors(self, path: str, xxh3: str) -> dict[str, Tensor]:
        data = self.storage.read_bytes(path)
        if xxhash.xxh3_64_hexdigest(data) != xxh3:
            raise StoreError(f"its data file ({len(data)} bytes) differs from the pointer's hash {xxh3}")
        try:
            return load(data)
        except SafetensorError as err:
            raise StoreError(f"its data file is not safetensors ({err})") from err

    def _list(self) -> tuple[set[_Saved], set[_Saved]]:
        """What other attempts have written: everything, whole or not, and what has a pointer."""
        everything, pointers = set(), set()
        for attempt in filter(_ATTEMPT.fullmatch, self.storage.list(layout.checkpoint_folder(self.ref))):
            if attempt == self.attempt:
                continue
            for name in self.storage.list(layout.checkpoint_folder(self.ref, attempt)):
                if match := _FILE.fullmatch(name):
                    saved = _Saved(int(match[1]), attempt)
                    everything.add(saved)
                    if name.endswith(".json"):
                        pointers.add(saved)
        return everything, pointers

    def _prune(self) -> None:
        candidates = {*self._own, *([self._resumed] if self._resumed else [])}
        kept = sorted(candidates, reverse=True)[:KEEP]
        newest = self._own[-1]
        for saved in sorted(candidates | self._found):
            if saved in kept or saved.step > newest.step:
                continue
            if self._group.rank == 0:
                self._remove(saved)
            self._found.discard(saved)
            if saved in self._own:
                self._own.remove(saved)
            elif saved == self._resumed:
                self._resumed = None

    def _remove(self, saved: _Saved) -> None:
        # Pointer first: a data file without a pointer is harmless, a pointer without its data file is a warning.
        self.storage.remove(self._pointer(saved))
        self.storage.remove(self._data(saved))
        folder = layout.checkpoint_folder(self.ref, saved.attempt)
        for name in self.storage.list(folder):
            if name.startswith(f"step-{saved.step:08d}.part-"):
                self.storage.remove(f"{folder}/{name}")

    def _write(self, path: str, data: bytes) -> None:
        for tries in itertools.count(1):
            try:
                self.storage.replace(path, data)
            except StoreError as err:
                # The folder went while it was written to: a run of the same work has finished and tidies up.
                if not isinstance(err.__cause__, FileNotFoundError) or tries == _MOST_TRIES:
                    raise
            else:
                return

    def _data(self, saved: _Saved) -> str:
        return layout.checkpoint_data(self.ref, saved.attempt, saved.step)

    def _pointer(self, saved: _Saved) -> str:
        return layout.checkpoint_pointer(self.ref, saved.attempt, saved.step)


def _as_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return bytes(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def remove_checkpoints(storage: Storage, ref: str) -> None:
    """Delete the work in progress of a finished artefact, that of all attempts."""
    folder = layout.checkpoint_folder(ref)
    for attempt in filter(_ATTEMPT.fullmatch, storage.list(folder)):
        for name in storage.list(layout.checkpoint_folder(ref, attempt)):
            storage.remove(f"{layout.checkpoint_folder(ref, attempt)}/{name}")
    if storage.is_local:
        shutil.rmtree(storage.full(folder), ignore_errors=True)


def named_tensor(tensors: Mapping[str, Tensor], name: str, like: Tensor | None = None) -> Tensor:
    """One tensor of a checkpoint. Raises: StoreError when it is missing, or has not shape and dtype of `like`."""
    found = tensors.get(name)
    if found is None:
        raise StoreError(f"it has no tensor {name}")
    if like is not None and (found.shape, found.dtype) != (like.shape, like.dtype):
        raise StoreError(f"its {name} is {found.dtype} {list(found.shape)}, not {like.dtype} {list(like.shape)}")
    return found


def module_tensors(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters, buffers, and the moments of an Adam that has taken a step with every parameter."""
    tensors = {f"module.{name}": tensor for name, tensor in _state(module).items()}
    for name, parameter in module.named_parameters():
        tensors |= {f"adam.{moment}.{name}": optimizer.state[parameter][moment] for moment in _MOMENTS}
    return tensors


@torch.no_grad()
def restore_module(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], step: int
) -> None:
    """Put back what `module_tensors` gave. Raises: StoreError when it does not fit; then nothing is changed."""
    state = {name: named_tensor(tensors, f"module.{name}", tensor) for name, tensor in _state(module).items()}
    moments = {
        name: {moment: named_tensor(tensors, f"adam.{moment}.{name}", parameter) for moment in _MOMENTS}
        for name, parameter in module.named_parameters()
    }
    for name, tensor in _state(module).items():
        tensor.copy_(state[name])
    for name, parameter in module.named_parameters():
        # Fresh tensors like those the optimizer makes: the ones read back are slices of one file.
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step), device=parameter.device),
            **{key: torch.empty_like(parameter).copy_(value) for key, value in moments[name].items()},
        }


def _state(module: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, shared ones once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
