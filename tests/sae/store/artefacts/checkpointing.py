"""Checkpoints of nothing in particular: saved, looked for, counted."""

import torch
from torch import Tensor

from sae.store import layout
from sae.store.artefacts.checkpoints import (
    Checkpoints,
    Position,
    new_attempt,
)
from sae.store.artefacts.modules import named_tensor
from sae.store.storage.filesystem import Storage

REF = "things/0123456789abcdef"


class Place(Position):
    n_tokens: int


def checkpoints(storage: Storage, attempt: str | None = None) -> Checkpoints[Place]:
    return Checkpoints(storage, REF, Place, attempt or new_attempt())


def save(to: Checkpoints[Place], *steps: int) -> None:
    for step in steps:
        to.save({"value": torch.tensor([step])}, Place(step=step, n_tokens=10 * step))


def load(from_: Checkpoints[Place]) -> int | None:
    """The step, None without a checkpoint; what belongs to it is checked."""
    found: list[Tensor] = []
    place = from_.load(lambda tensors, _: found.append(named_tensor(tensors, "value")))
    if place is None:
        return None
    assert (place.n_tokens, int(found[-1])) == (10 * place.step, place.step)
    return place.step


def newest(storage: Storage) -> int | None:
    """As a new attempt would see it."""
    return load(checkpoints(storage))


def stored(storage: Storage, attempt: str) -> list[int]:
    """The steps of an attempt's checkpoints, each with both its files."""
    names = storage.list(layout.checkpoint_folder(REF, attempt))
    steps = sorted({int(name[5:13]) for name in names})
    assert names == sorted(f"step-{step:08d}.{ending}" for step in steps for ending in ("json", "safetensors"))
    return steps
