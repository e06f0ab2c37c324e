"""Checkpoints: the newest whole one is found whoever wrote it, and no death or damage takes it away."""

import itertools
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sae.store import layout
from sae.store.artefacts.checkpoints import (
    remove_checkpoints,
)
from sae.store.storage.filesystem import Storage
from tests.sae.store.artefacts.checkpointing import REF, Place, checkpoints, load, newest, save, stored


def test_tensors_and_position_come_back_as_they_were(any_storage: Storage) -> None:
    tensors = {
        "float": torch.tensor([[0.1, float("nan")], [-0.0, float("inf")]]),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "counts": torch.tensor([2**60 + 1]),
        "empty": torch.zeros(0, 4),
    }
    checkpoints(any_storage).save(tensors, Place(step=3, n_tokens=7))
    found: dict[str, Tensor] = {}
    place = checkpoints(any_storage).load(lambda tensors, _: found.update(tensors))
    assert place == Place(step=3, n_tokens=7)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].contiguous().view(torch.uint8).tolist() == tensor.contiguous().view(torch.uint8).tolist()


def test_without_a_checkpoint_there_is_nothing_to_load(any_storage: Storage) -> None:
    assert newest(any_storage) is None


def test_the_newest_counts_whoever_wrote_it(any_storage: Storage) -> None:
    for step in (5, 9, 2):
        save(checkpoints(any_storage), step)
    assert newest(any_storage) == 9


def test_an_attempt_writes_only_under_its_own_id_and_keeps_two(any_storage: Storage) -> None:
    first, second = checkpoints(any_storage, "aa"), checkpoints(any_storage, "bb")
    save(first, 1, 2, 3)
    save(second, 1, 2)
    save(first, 4)
    assert sorted(any_storage.list(layout.checkpoint_folder(REF))) == ["aa", "bb"]
    assert stored(any_storage, "aa") == [3, 4]
    assert stored(any_storage, "bb") == [1, 2]


def test_a_predecessors_checkpoints_go_once_there_are_as_many_newer_ones(any_storage: Storage) -> None:
    save(checkpoints(any_storage, "aa"), 10, 20)
    successor = checkpoints(any_storage, "bb")
    assert load(successor) == 20
    assert stored(any_storage, "aa") == [10, 20]
    save(successor, 25)
    assert (stored(any_storage, "aa"), stored(any_storage, "bb")) == ([20], [25])
    save(successor, 30)
    assert (stored(any_storage, "aa"), stored(any_storage, "bb")) == ([], [25, 30])


def test_what_several_dead_attempts_left_goes_too(any_storage: Storage) -> None:
    save(checkpoints(any_storage, "aa"), 10, 20)
    save(checkpoints(any_storage, "bb"), 15)
    any_storage.remove(layout.checkpoint_pointer(REF, "bb", 15))  # died between data file and pointer
    successor = checkpoints(any_storage, "cc")
    assert load(successor) == 20
    save(successor, 30, 40)
    assert [stored(any_storage, attempt) for attempt in ("aa", "bb", "cc")] == [[], [], [30, 40]]


def test_what_a_dying_predecessor_still_writes_is_left_alone(any_storage: Storage) -> None:
    dying = checkpoints(any_storage, "aa")
    save(dying, 10)
    successor = checkpoints(any_storage, "bb")
    assert load(successor) == 10
    save(dying, 20, 30)
    save(successor, 15, 20, 25, 26)
    assert stored(any_storage, "aa") == [20, 30]
    assert newest(any_storage) == 30


def test_two_attempts_in_turns_do_not_disturb_each_other(any_storage: Storage) -> None:
    a, b = checkpoints(any_storage, "aa"), checkpoints(any_storage, "bb")
    assert load(a) is load(b) is None
    for step in range(1, 9):
        save(a, step)
        if step % 2:
            save(b, step)
        assert newest(any_storage) == step
    assert (stored(any_storage, "aa"), stored(any_storage, "bb")) == ([7, 8], [5, 7])


def test_a_step_that_is_saved_already_is_not_written_again(storage: Storage) -> None:
    first = checkpoints(storage, "aa")
    save(first, 4, 4)
    assert stored(storage, "aa") == [4]
    second = checkpoints(storage, "bb")
    load(second)
    save(second, 4)
    assert (stored(storage, "aa"), stored(storage, "bb")) == ([4], [])


class Watched(Storage):
    """Calls back before every change of a file and before every read."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.before_change: Callable[[], None] = lambda: None
        self.before_read: Callable[[], None] = lambda: None

    def put_file(self, local: Path, path: str) -> None:
        self.before_change()
        super().put_file(local, path)

    def remove(self, path: str) -> None:
        self.before_change()
        super().remove(path)

    def read_bytes(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        self.before_read()
        return super().read_bytes(path, start, end)


@pytest.mark.parametrize("n_reads", [0, 1])
def test_what_its_living_owner_deletes_meanwhile_is_looked_for_again(
    n_reads: int, storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    alive = checkpoints(storage, "aa")
    save(alive, 1, 2)
    watched, reads = Watched(storage.root), itertools.count()
    # Between listing and reading the pointer, or between the pointer and its data file.
    watched.before_read = lambda: save(alive, 3, 4, 5) if next(reads) == n_reads else None
    assert newest(watched) == 5
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def test_a_kill_before_any_file_operation_leaves_the_newest_readable(memory_storage: Storage) -> None:
    """Two attempts, one after the other, each killed at every possible place."""
    deaths = 0
    for first_life, second_life in itertools.product(range(1, 13), range(1, 10)):
        memory_storage.fs.store.clear()
        known = 0
        for life in (first_life, second_life):
            dying = Watched(memory_storage.root)
            operations = itertools.count(1)

            def die(life: int = life, operations: itertools.count = operations) -> None:
                if next(operations) == life:
                    raise Killed

            dying.before_change = die
            attempt = checkpoints(dying)
            start = load(attempt) or 0
            assert start >= known
            try:
                for step in range(start + 1, start + 5):
                    save(attempt, step)
                    known = step
            except Killed:
                deaths += 1
            found = newest(memory_storage)
            assert (found or 0) >= known
            known = found or 0
    assert deaths == 2 * 12 * 9


def test_a_run_that_finishes_may_tidy_up_while_another_saves(storage: Storage) -> None:
    attempt, stop = checkpoints(storage), threading.Event()

    def tidy_up() -> None:
        while not stop.wait(0.02):
            remove_checkpoints(storage, REF)

    thread = threading.Thread(target=tidy_up)
    thread.start()
    try:
        for step in range(1, 50):
            save(attempt, step)
            newest(storage)
    finally:
        stop.set()
        thread.join()
    save(attempt, 50)
    assert newest(storage) == 50


def test_removing_leaves_no_checkpoint_of_any_attempt(any_storage: Storage) -> None:
    for attempt in ("aa", "bb"):
        save(checkpoints(any_storage, attempt), 1, 2)
        tensors, place = {"value": torch.tensor([3])}, Place(step=3, n_tokens=30)
        checkpoints(any_storage, attempt).save(tensors, place, {"curve.txt": b"so far"})
    path = f"{layout.checkpoint_folder(REF, 'bb')}/curve.txt"
    assert any_storage.read_bytes(path) == b"so far"
    remove_checkpoints(any_storage, REF)
    remove_checkpoints(any_storage, REF)
    assert newest(any_storage) is None
    assert not any_storage.exists(path)
    if any_storage.is_local:
        assert not os.path.exists(any_storage.full(layout.checkpoint_folder(REF)))
