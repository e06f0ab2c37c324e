"""Several writers of one artefact at the same moment: one wins, equals succeed, and its files are never gone."""

import multiprocessing
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from sae.errors import DamagedError, StoreError
from sae.store import layout
from sae.store.artefacts.record import Record
from sae.store.artefacts.records import commit, is_intact, local_files, read_record, require_record, verify
from sae.store.storage.filesystem import Storage
from tests.sae.store.things import ThingSpec, make


@pytest.fixture(params=["disk", "s3"])
def shared_storage(request: pytest.FixtureRequest) -> Storage:
    """A fresh root that several writers can share. (In memory a file is not put in one step.)"""
    return Storage(request.getfixturevalue("s3_root")) if request.param == "s3" else request.getfixturevalue("storage")


class Contest:
    """One thread per version commits it at the same moment while a reader watches."""

    def __init__(self, storage: Storage, spec: ThingSpec, versions: list[bytes]) -> None:
        self.storage, self.spec, self.versions = storage, spec, versions
        self.outcomes: list[Record | StoreError] = []
        self.seen: list[Exception] = []
        """What the reader met and must not."""
        self._start, self._over = threading.Barrier(len(versions) + 1), threading.Event()

    def run(self) -> None:
        writers = [threading.Thread(target=self._write, args=(data,)) for data in self.versions]
        reader = threading.Thread(target=self._watch)
        for thread in (*writers, reader):
            thread.start()
        for thread in writers:
            thread.join()
        self._over.set()
        reader.join()

    def check(self) -> None:
        """One content won, its writers got its record, the others were refused; its files were always there."""
        assert not self.seen
        assert len(self.outcomes) == len(self.versions)
        record = require_record(self.storage, self.spec.ref)
        assert verify(self.storage, record) == []
        records = [outcome for outcome in self.outcomes if isinstance(outcome, Record)]
        refusals = [str(outcome) for outcome in self.outcomes if not isinstance(outcome, Record)]
        assert records == [record] * self.versions.count(self.storage.read_bytes(record.path("a")))
        assert all("the same work gave other bytes" in refusal for refusal in refusals), refusals

    def _write(self, data: bytes) -> None:
        self._start.wait()
        try:
            self.outcomes.append(make(self.storage, self.spec, {"a": data, "b": b"same"}))
        except StoreError as err:
            self.outcomes.append(err)

    def _watch(self) -> None:
        self._start.wait()
        while not self._over.is_set():
            try:
                if (record := read_record(self.storage, self.spec.ref)) is not None:
                    self._watch_files(record)
            except DamagedError:  # the damaged record is still there
                pass
            except Exception as err:
                self.seen.append(err)

    def _watch_files(self, record: Record) -> None:
        try:
            with local_files(self.storage, record):
                assert is_intact(self.storage, self.spec.ref)
        except DamagedError as err:
            self.seen.append(err)


def contests(
    storage: Storage, versions: list[bytes], n: int, before: Callable[[ThingSpec], None] | None = None
) -> None:
    for size in range(n):
        contest = Contest(storage, ThingSpec(size=size), versions)
        if before is not None:
            before(contest.spec)
        contest.run()
        contest.check()


def test_equal_writers_all_succeed(shared_storage: Storage) -> None:
    contests(shared_storage, [b"x"] * 4, 4)


def test_of_different_writers_one_content_wins(shared_storage: Storage) -> None:
    contests(shared_storage, [b"x", b"x", b"y", b"y", b"z"], 4)


def test_equal_writers_mend_a_damaged_artefact(shared_storage: Storage) -> None:
    def damage(spec: ThingSpec) -> None:
        record = make(shared_storage, spec, {"a": b"x", "b": b"same"})
        shared_storage.remove(record.path("b"))
        shared_storage.replace(layout.record_path(spec.ref), b"torn")

    contests(shared_storage, [b"x"] * 4, 4, damage)


def test_of_different_writers_one_replaces_a_damaged_record(storage: Storage) -> None:
    def damage(spec: ThingSpec) -> None:
        make(storage, spec, {"a": b"x", "b": b"same"})
        storage.replace(layout.record_path(spec.ref), b"torn")

    contests(storage, [b"x", b"x", b"y", b"y", b"z"], 30, damage)


def test_processes_that_mend_the_same_record_agree(storage: Storage) -> None:
    spec = ThingSpec(size=1)
    context = multiprocessing.get_context("fork")  # spawned ones would load torch, and not be there at once
    make(storage, spec, {"a": b"x"})
    for _ in range(5):
        storage.replace(layout.record_path(spec.ref), b"torn")
        barrier, results = context.Barrier(4, timeout=60), context.SimpleQueue()
        arguments = [(storage, spec, data, barrier, results) for data in (b"x", b"y", b"x", b"y")]
        children = [context.Process(target=_mend, args=each) for each in arguments]
        for child in children:
            child.start()
        for child in children:
            child.join()
        outcomes = [results.get() for _ in children]
        record = require_record(storage, spec.ref)
        assert sorted(outcomes, key=str) == [(record.content, record.produced.seconds)] * 2 + [None] * 2
        assert verify(storage, record) == []


def _mend(storage: Storage, spec: ThingSpec, data: bytes, barrier: Any, results: Any) -> None:
    barrier.wait()
    try:
        with storage.staging() as folder:
            (folder / "a").write_bytes(data)
            record = commit(storage, spec, folder, {}, seconds=os.getpid())  # tells the writers apart
        results.put((record.content, record.produced.seconds))
    except StoreError:
        results.put(None)
