"""Damaged checkpoints are passed over, and go when they are of no use."""

import logging
import re
from collections.abc import Callable

import pytest
import torch

from sae.errors import StoreError
from sae.store import layout
from sae.store.artefacts.modules import named_tensor
from sae.store.storage.filesystem import Storage
from tests.sae.store.artefacts.checkpointing import REF, Place, checkpoints, load, newest, save, stored


def damage_data(change: Callable[[bytes], bytes]) -> Callable[[Storage], None]:
    path = layout.checkpoint_data(REF, "aa", 2)
    return lambda storage: storage.replace(path, change(storage.read_bytes(path)))


def damage_pointer(change: Callable[[bytes], bytes]) -> Callable[[Storage], None]:
    path = layout.checkpoint_pointer(REF, "aa", 2)
    return lambda storage: storage.replace(path, change(storage.read_bytes(path)))


def flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


DAMAGES = {
    "data truncated": damage_data(lambda data: data[:-1]),
    "data empty": damage_data(lambda data: b""),
    "data flipped": damage_data(lambda data: flip(data, 8 * len(data) - 3)),
    "data deleted": lambda storage: storage.remove(layout.checkpoint_data(REF, "aa", 2)),
    "pointer truncated": damage_pointer(lambda data: data[:-20]),
    "pointer empty": damage_pointer(lambda data: b""),
    "pointer not text": damage_pointer(lambda data: b"\xff\xfe" + data),
    "another step's pointer": lambda storage: storage.replace(
        layout.checkpoint_pointer(REF, "aa", 2), storage.read_bytes(layout.checkpoint_pointer(REF, "aa", 1))
    ),
    "other counters": damage_pointer(lambda data: data.replace(b'"n_tokens": 20', b'"n_tokens": 21')),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_one_line(
    damage: str, storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    save(checkpoints(storage, "aa"), 1, 2)
    DAMAGES[damage](storage)
    assert newest(storage) == 1
    (record,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
    assert re.fullmatch(r"checkpoint \S+/aa/step-00000002\.json is passed over: .+", record.getMessage())


def test_no_flipped_bit_of_a_pointer_goes_unnoticed(memory_storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    save(checkpoints(memory_storage, "aa"), 1, 2)
    path = layout.checkpoint_pointer(REF, "aa", 2)
    text = memory_storage.read_bytes(path)
    outcomes = []
    for bit in range(8 * len(text)):
        memory_storage.replace(path, flip(text, bit))
        outcomes.append(newest(memory_storage))  # which checks what belongs to the step
    assert outcomes.count(1) > 0.9 * len(outcomes)  # the rest are spaces that became other white space
    assert set(outcomes) <= {1, 2}


def test_a_checkpoint_that_does_not_fit_is_passed_over(any_storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    attempt = checkpoints(any_storage, "aa")
    save(attempt, 1)
    attempt.save({"other": torch.zeros(1)}, Place(step=2, n_tokens=20))
    assert newest(any_storage) == 1
    assert "it has no tensor value" in caplog.text
    with pytest.raises(StoreError, match=r"its x is torch.float32 \[2\], not torch.int64 \[2\]"):
        named_tensor({"x": torch.zeros(2)}, "x", torch.zeros(2, dtype=torch.int64))
    with pytest.raises(StoreError, match=r"\[2\], not torch.float32 \[3\]"):
        named_tensor({"x": torch.zeros(2)}, "x", torch.zeros(3))


def test_damaged_checkpoints_go_once_the_work_has_come_as_far(any_storage: Storage) -> None:
    save(checkpoints(any_storage, "aa"), 1, 2)
    DAMAGES["data flipped"](any_storage)
    successor = checkpoints(any_storage, "bb")
    assert load(successor) == 1
    save(successor, 2, 3)
    assert (stored(any_storage, "aa"), stored(any_storage, "bb")) == ([], [2, 3])


def test_one_that_does_not_fit_goes_only_once_the_work_has_come_as_far(any_storage: Storage) -> None:
    other = checkpoints(any_storage, "aa")
    save(other, 1)
    other.save({"other": torch.zeros(1)}, Place(step=4, n_tokens=40))
    successor = checkpoints(any_storage, "bb")
    assert load(successor) == 1
    save(successor, 2, 3)
    assert (stored(any_storage, "aa"), stored(any_storage, "bb")) == ([4], [2, 3])
    save(successor, 4)
    assert (stored(any_storage, "aa"), stored(any_storage, "bb")) == ([], [3, 4])
