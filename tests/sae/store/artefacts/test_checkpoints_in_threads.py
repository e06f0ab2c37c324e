"""A checkpoint written in a thread: from a copy, one at a time, and it counts once it is committed."""

import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.errors import TransientError
from sae.store.artefacts.checkpoint_files import CheckpointFiles
from sae.store.artefacts.checkpoints import Checkpoints
from sae.store.storage.filesystem import Storage
from tests.sae.store.artefacts.checkpointing import Place, checkpoints, load, newest, save, stored


class Writer:
    """What the writing of tensors waits for, and meets."""

    def __init__(self) -> None:
        self.may_write = threading.Event()
        self.may_write.set()
        self.error: Exception | None = None
        self.at_once = self.most_at_once = 0

    def __enter__(self) -> None:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        assert self.may_write.wait(30)
        if self.error is not None:
            raise self.error

    def __exit__(self, *_: object) -> None:
        self.at_once -= 1


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Writer]:
    watched, write = Writer(), CheckpointFiles.write_tensors

    def write_tensors(files: CheckpointFiles, path: str, tensors: Mapping[str, Tensor]) -> str:
        with watched:
            return write(files, path, tensors)

    monkeypatch.setattr(CheckpointFiles, "write_tensors", write_tensors)
    yield watched
    watched.may_write.set()


def begin(to: Checkpoints[Any], step: int) -> None:
    to.begin({"value": torch.tensor([step])}, Place(step=step, n_tokens=10 * step))


def until_written(of: Checkpoints[Any]) -> None:
    while of.writing:
        time.sleep(0.001)


def test_killed_between_write_and_commit_it_never_happened(any_storage: Storage) -> None:
    dying = checkpoints(any_storage, "aa")
    save(dying, 1)
    begin(dying, 2)
    until_written(dying)
    assert newest(any_storage) == 1
    successor = checkpoints(any_storage, "bb")
    assert load(successor) == 1
    save(successor, 2, 3)
    assert (any_storage.list("things/0123456789abcdef/checkpoints/aa"), stored(any_storage, "bb")) == ([], [2, 3])


def test_once_committed_it_counts(any_storage: Storage) -> None:
    attempt = checkpoints(any_storage, "aa")
    begin(attempt, 3)
    attempt.commit()
    attempt.commit()
    assert (newest(any_storage), stored(any_storage, "aa")) == (3, [3])


def test_the_tensors_may_change_while_they_are_written(memory_storage: Storage, writer: Writer) -> None:
    tensors = {"value": torch.tensor([7]), "transposed": torch.arange(6.0).reshape(2, 3).T}
    attempt = checkpoints(memory_storage)
    writer.may_write.clear()
    attempt.begin(tensors, Place(step=7, n_tokens=70))
    assert attempt.writing
    for tensor in tensors.values():
        tensor.zero_()
    writer.may_write.set()
    attempt.commit()
    found: dict[str, Tensor] = {}
    checkpoints(memory_storage).load(lambda tensors, _: found.update(tensors))
    assert found["value"].tolist() == [7]
    assert found["transposed"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_one_at_a_time_is_written_and_all_of_them_count(memory_storage: Storage, writer: Writer) -> None:
    attempt = checkpoints(memory_storage, "aa")
    writer.may_write.clear()
    begin(attempt, 1)
    threading.Timer(0.05, writer.may_write.set).start()
    for step in range(2, 6):
        begin(attempt, step)  # waits for the one before
        assert newest(memory_storage) == step - 1
    attempt.commit()
    assert writer.most_at_once == 1
    assert stored(memory_storage, "aa") == [4, 5]


def test_one_that_could_not_be_written_says_so_when_it_is_to_count(memory_storage: Storage, writer: Writer) -> None:
    attempt = checkpoints(memory_storage, "aa")
    save(attempt, 1)
    writer.error = TransientError("memory://... is away")
    begin(attempt, 2)
    with pytest.raises(TransientError, match="is away"):
        begin(attempt, 3)
    writer.error = None
    assert (newest(memory_storage), stored(memory_storage, "aa")) == (1, [1])
    save(attempt, 3)
    assert stored(memory_storage, "aa") == [1, 3]


def test_a_process_that_fails_keeps_what_it_had_begun(
    memory_storage: Storage, writer: Writer, caplog: pytest.LogCaptureFixture
) -> None:
    attempt = checkpoints(memory_storage, "aa")
    begin(attempt, 2)
    attempt.close()
    assert stored(memory_storage, "aa") == [2]
    writer.error = TransientError("memory://... is away")
    begin(attempt, 3)
    attempt.close()
    assert stored(memory_storage, "aa") == [2]
    assert "a checkpoint was not written: TransientError('memory://... is away')" in caplog.text
