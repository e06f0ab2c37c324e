"""Garbage: all that killed work leaves is found, nothing else is, and nothing that a running writer owns is lost."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sae.store import layout
from sae.store.artefacts.records import commit, read_record, require_record, verify
from sae.store.storage.filesystem import Storage
from sae.store.upkeep import collect as collect_module
from sae.store.upkeep.collect import Garbage, delete_all, delete_garbage, find_garbage
from tests.sae.store.things import ThingSpec, make
from tests.sae.store.upkeep import paused

ROOT = Path(__file__).parents[4]


@pytest.fixture(params=["disk", "s3"])
def shared_storage(request: pytest.FixtureRequest) -> Storage:
    """A fresh root that several processes can share."""
    return Storage(request.getfixturevalue("s3_root")) if request.param == "s3" else request.getfixturevalue("storage")


class Process:
    """`paused.py` in one of its roles."""

    def __init__(self, role: str, storage: Storage, lease_seconds: float = 30) -> None:
        root = storage.uri()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.sae.store.upkeep.paused", role, root, str(lease_seconds)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, word: str) -> None:
        assert self.process.stdout
        assert self.process.stdout.readline().strip() == word

    def go_on(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def finish(self) -> None:
        self.wait_for("done")
        assert self.process.wait(60) == 0


@pytest.fixture
def start(shared_storage: Storage) -> Iterator[Callable[..., Process]]:
    """Start a process on the shared root; what is left of it ends with the test."""
    started: list[Process] = []

    def start(role: str, **options: float) -> Process:
        started.append(Process(role, shared_storage, **options))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.communicate()


def leave_attempt(storage: Storage, spec: ThingSpec, part: int | None = None, data: bytes = b"x") -> str:
    """What a writer leaves that was killed before its record. Returns: the folder of its files."""
    record = make(storage, spec, {"a": data, "sub/b": b"same"}, part)
    storage.remove(layout.record_path(spec.ref, part))
    return record.folder


def put(storage: Storage, *paths: str) -> None:
    for path in paths:
        storage.replace(path, b"mine")


def files(storage: Storage) -> set[str]:
    return {file.path for file in storage.walk("") if not file.path.startswith(layout.STAGING)}


def collect(storage: Storage, **options: object) -> list[Garbage]:
    found = list(find_garbage(storage, grace_seconds=0, **options))  # type: ignore[arg-type]
    assert list(delete_all(storage, found)) == [(each, True) for each in found]
    return found


def test_what_killed_work_leaves_is_deleted_and_nothing_else(
    any_storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect_module, "TEMPORARY_SECONDS", 0)
    finished, unfinished = ThingSpec(size=1), ThingSpec(size=2)
    records = [make(any_storage, finished, {"a": b"1"}), make(any_storage, finished, {"a": b"2"}, part=3)]
    put(
        any_storage,
        "notes.txt",
        "things/notes.txt",
        f"{finished.ref}/notes.txt",
        f"{finished.ref}/my-folder/a",
        f"{finished.ref}/part-00003.json.bak",
        f"{unfinished.ref}/checkpoints/abc/step-00000001.json",
        f"{layout.RESULTS}/result",
    )
    kept = files(any_storage)
    beside = leave_attempt(any_storage, ThingSpec(size=3), data=b"other").rpartition("/")[2]
    put(
        any_storage,
        f"{finished.ref}/{beside}/a",
        f"{finished.ref}/part-00003/{beside}/a",
        f"{finished.ref}/checkpoints/abc/step-00000001.json",
        f"{records[0].folder}/.a.01234567",
        f"{records[0].folder}/{layout.COLLECTED}{'0' * 32}",
    )
    folders = {leave_attempt(any_storage, unfinished, part) for part in (None, 4)}
    found = collect(any_storage)
    assert {each.path for each in found} == folders | {
        f"{ThingSpec(size=3).ref}/{beside}",
        f"{finished.ref}/{beside}",
        f"{finished.ref}/part-00003/{beside}",
        f"{finished.ref}/checkpoints/abc",
        f"{records[0].folder}/.a.01234567",
        f"{records[0].folder}/{layout.COLLECTED}{'0' * 32}",
    }
    assert files(any_storage) == kept
    assert [verify(any_storage, record) for record in records] == [[], []]
    assert collect(any_storage) == []


def test_probes_and_notes_of_others_at_work_stay_without_any_grace(any_storage: Storage) -> None:
    record = make(any_storage, ThingSpec(size=1), {"a": b"1"})
    put(any_storage, f"{layout.STAGING}/probe-{'0' * 32}", f"{record.folder}/{layout.COLLECTED}{'0' * 32}")
    assert list(find_garbage(any_storage, grace_seconds=0)) == []


def test_sizes_are_told(any_storage: Storage) -> None:
    folder = leave_attempt(any_storage, ThingSpec(size=1), data=b"x" * 100)
    (found,) = find_garbage(any_storage, grace_seconds=0)
    assert (found.kind, found.path, found.n_files, found.n_bytes) == ("unrecorded files", folder, 2, 104)


def test_what_is_young_stays(any_storage: Storage) -> None:
    leave_attempt(any_storage, ThingSpec(size=1))
    assert list(find_garbage(any_storage)) == []


def test_what_changed_since_it_was_found_stays(any_storage: Storage) -> None:
    folder = leave_attempt(any_storage, ThingSpec(size=1))
    (found,) = find_garbage(any_storage, grace_seconds=0)
    if any_storage.protocol == "s3":
        time.sleep(1.1)  # a bucket's times are in seconds
    put(any_storage, f"{folder}/a")
    assert not delete_garbage(any_storage, found)
    assert f"{folder}/sub/b" in files(any_storage)


def test_a_jump_of_this_machine_s_clock_makes_nothing_on_a_bucket_old(
    s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, later = Storage(s3_root), time.time() + 365 * 86400
    leave_attempt(storage, ThingSpec(size=1))
    monkeypatch.setattr(time, "time", lambda: later)
    assert list(find_garbage(storage)) == []


def test_damaged_records_and_what_only_they_name_go_when_asked_for(any_storage: Storage) -> None:
    spec = ThingSpec(size=1)
    record = make(any_storage, spec, {"a": b"1"})
    aside = layout.damaged_path(layout.record_path(spec.ref), "01234567")
    any_storage.replace(aside, b"torn")
    any_storage.remove(layout.record_path(spec.ref))
    assert collect(any_storage) == []
    assert {each.path for each in collect(any_storage, damaged_records=True)} == {aside, record.folder}
    assert files(any_storage) == set()


def test_files_of_a_record_that_cannot_be_read_stay(any_storage: Storage) -> None:
    spec = ThingSpec(size=1)
    record = make(any_storage, spec, {"a": b"1"})
    put(any_storage, f"{spec.ref}/{'0' * 16}/a", layout.record_path(spec.ref))
    assert collect(any_storage) == []
    assert f"{record.folder}/a" in files(any_storage)


def test_staging_of_the_dead_goes_and_that_of_the_living_stays(storage: Storage) -> None:
    dead = Path(storage.full(layout.STAGING), "1-abc")
    with storage.staging() as alive:
        (dead / "files").mkdir(parents=True)
        (dead / "files" / "a").write_bytes(b"unfinished")
        (dead / "lock").write_text(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        (found,) = collect(storage)
        assert (found.kind, found.path) == ("staging", f"{layout.STAGING}/1-abc")
        assert alive.exists()
    assert not dead.exists()


def test_torn_uploads_are_given_up(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(s3_root)
    for path in (f"things/{'0' * 16}/{'1' * 16}/a", "../prefix-of-another/a"):
        bucket, _, key = storage.full(path).replace("prefix/../", "").partition("/")
        upload = storage.fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)["UploadId"]
        arguments = {"Bucket": bucket, "Key": key, "UploadId": upload, "PartNumber": 1}
        storage.fs.call_s3("upload_part", Body=b"x" * (5 << 20), **arguments)
    (begun,) = [file.modified for file, _ in storage.torn_uploads()]
    monkeypatch.setattr(storage, "now", lambda: begun + 3600)
    assert list(find_garbage(storage)) == []
    monkeypatch.setattr(storage, "now", lambda: begun + 25 * 3600)
    (found,) = find_garbage(storage)
    assert (found.kind, found.path) == ("torn upload", f"things/{'0' * 16}/{'1' * 16}/a")
    assert delete_garbage(storage, found)
    assert delete_garbage(storage, found), "it is no error when it is gone"
    assert list(storage.torn_uploads()) == []
    assert len(storage.fs.call_s3("list_multipart_uploads", Bucket=bucket)["Uploads"]) == 1


def test_a_writer_that_pauses_before_its_record_loses_nothing(
    shared_storage: Storage, start: Callable[..., Process]
) -> None:
    writer = start("writer")
    writer.wait_for("stopped")
    paused.collect(shared_storage)
    if shared_storage.is_local:
        assert list(find_garbage(shared_storage, grace_seconds=0)) != [], "found, and owned by the writer"
    writer.go_on()
    writer.finish()
    assert verify(shared_storage, require_record(shared_storage, ThingSpec(size=1).ref)) == []
    assert collect(shared_storage) == []


def test_a_writer_that_comes_while_the_same_files_are_collected_loses_nothing(
    shared_storage: Storage, start: Callable[..., Process]
) -> None:
    make_attempt_of(shared_storage)
    collector = start("collector")
    collector.wait_for("stopped")
    writer = start("writers")
    if not shared_storage.is_local:  # on a disk it waits for the collector
        wait_until(lambda: read_record(shared_storage, ThingSpec(size=1).ref) is not None)
    collector.go_on()
    collector.finish()
    writer.finish()
    assert_all_written(shared_storage)


def test_a_collector_that_is_killed_leaves_nothing_in_the_way(
    shared_storage: Storage, start: Callable[..., Process]
) -> None:
    make_attempt_of(shared_storage)
    collector = start("collector")
    collector.wait_for("stopped")
    collector.process.kill()
    writer = start("writer", lease_seconds=0.2)
    writer.wait_for("stopped")
    writer.go_on()
    writer.finish()
    assert verify(shared_storage, require_record(shared_storage, ThingSpec(size=1).ref)) == []
    assert not any(layout.COLLECTED in path for path in files(shared_storage))


def test_files_of_a_writer_that_was_killed_go(shared_storage: Storage, start: Callable[..., Process]) -> None:
    writer = start("writer")
    writer.wait_for("stopped")
    writer.process.kill()
    writer.process.wait()
    collect(shared_storage)
    assert files(shared_storage) == set()


@pytest.mark.slow
def test_writers_and_collectors_side_by_side(shared_storage: Storage, start: Callable[..., Process]) -> None:
    collectors = [start("collectors") for _ in range(2)]
    writers = [start("writers") for _ in range(2)]
    for writer in writers:
        writer.finish()
    for collector in collectors:
        collector.go_on()
        collector.finish()
    assert_all_written(shared_storage)


def test_empty_folders_go_with_their_files(storage: Storage) -> None:
    leave_attempt(storage, ThingSpec(size=1), part=1)
    collect(storage)
    assert not Path(storage.full(ThingSpec(size=1).ref)).exists()
    with storage.staging() as folder:
        commit(storage, ThingSpec(size=1), folder, {}, seconds=0)
    assert read_record(storage, ThingSpec(size=1).ref) is not None


def make_attempt_of(storage: Storage) -> None:
    """Files of the same content as a writer will put, left by one that died."""
    paused.write(storage, 1)
    storage.remove(layout.record_path(ThingSpec(size=1).ref))
    if not storage.is_local:
        time.sleep(1.1)  # a bucket's times are in seconds, and what changed since it was found stays


def assert_all_written(storage: Storage) -> None:
    for size in range(paused.N_WRITTEN):
        assert verify(storage, require_record(storage, ThingSpec(size=size).ref)) == []
    assert not any(layout.COLLECTED in path for path in files(storage))


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)
