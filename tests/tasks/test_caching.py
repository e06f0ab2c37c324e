"""A task is done when its artefacts are in the store, whatever Prefect's cache says."""

from pathlib import Path
from types import SimpleNamespace

from sae.store.artefacts.records import require_record
from sae.store.storage.filesystem import Storage
from tasks.caching import Job, fingerprint_key, is_stored, produce
from tests.tasks.work import ThingSpec, make


def key(name: str, job: Job | None = None, **parameters: object) -> str:
    context = SimpleNamespace(task=SimpleNamespace(name=name))
    return fingerprint_key(context, {"job": job or Job(root="runs")} | parameters)


def test_cache_keys_follow_identity_and_ignore_how_work_runs() -> None:
    a, b = ThingSpec(size=1), ThingSpec(size=2)
    base = key("make", spec=a)
    assert base == key("make", spec=a, job=Job(root=str(Path("runs").absolute())))
    assert base == key("make", spec=ThingSpec(size=1), job=Job(root="runs", recompute=True, threads=7, limit_seconds=1))
    assert base == key("make", spec=a, job=Job(root="runs", device="cuda"))
    others = [
        key("other", spec=a),
        key("make", spec=b),
        key("make", spec=a, part=0),
        key("make", spec=a, job=Job(root="x")),
    ]
    assert len({base, *others, key("make", specs=[a, b])}) == 6


def test_work_is_done_once_and_again_only_when_asked_or_missing_or_damaged(tmp_path: Path) -> None:
    root, spec, log = str(tmp_path / "root"), ThingSpec(size=1), tmp_path / "log"
    arguments = {"spec": spec, "log": str(log)}

    def times() -> int:
        return len(log.read_text().splitlines())

    (uri,) = produce(Job(root=root, threads=1), [spec], make, arguments)
    assert Path(uri).is_file()
    assert produce(Job(root=root), [spec], make, arguments) == [uri]
    assert times() == 1
    produce(Job(root=root, recompute=True), [spec], make, arguments)
    assert times() == 2
    Path(uri).unlink()
    assert not is_stored(Storage(root), [spec])
    produce(Job(root=root), [spec], make, arguments)
    assert times() == 3
    storage = Storage(root)
    file = Path(storage.full(require_record(storage, spec.ref).path("a")))
    file.write_text("")
    assert not is_stored(storage, [spec])
    produce(Job(root=root), [spec], make, arguments)
    assert file.read_text() == "x"
    file.unlink()
    produce(Job(root=root), [spec], make, arguments)
    assert times() == 5
    assert file.read_text() == "x"
