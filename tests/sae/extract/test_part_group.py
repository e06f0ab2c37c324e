"""Groups of parts: each part is committed and skipped by itself, also when several processes work on one set."""

import json
import multiprocessing
import os
import random
import shutil
import sys
from pathlib import Path

import pytest

from sae.extract import stream
from sae.extract.config import PartsSpec
from sae.extract.part import plan_parts
from sae.extract.part_group import extract_group
from sae.extract.stream import NICENESS, helper_threads
from sae.store import layout
from sae.store.artefacts.records import require_record, verify
from sae.store.snapshots import part_sets
from sae.store.snapshots.part_sets import finished_parts, groups_of
from sae.store.snapshots.snapshot import SnapshotSpec, commit_snapshot
from sae.store.storage.filesystem import Storage
from tests.sae.extract.conftest import MakeWorld, World


def count_parts(world: World, spec: PartsSpec) -> int:
    return int(plan_parts(world.storage, spec).metrics["n_parts"])


def watch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(part set, part) of every part that is computed from now on."""
    computed: list[tuple[str, int]] = []

    def commit(storage, spec, folder, metrics, *, seconds, part, device):  # type: ignore[no-untyped-def]
        computed.append((spec.ref, part))
        return original(storage, spec, folder, metrics, seconds=seconds, part=part, device=device)

    original = stream.commit
    monkeypatch.setattr(stream, "commit", commit)
    return computed


def stored(world: World, spec: PartsSpec) -> dict[str, int | None]:
    """The files of a part set with their sizes; of records the name: they say how long the work took."""
    return {name: None if name.endswith(".json") else size for name, size in world.storage.sizes(spec.ref).items()}


def test_a_group_computes_what_is_missing_and_then_has_an_index(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world()
    spec = world.parts()
    n_parts = count_parts(world, spec)
    monkeypatch.setattr(part_sets, "MAX_GROUPS", 2)
    first, second = groups_of(n_parts)
    computed = watch(monkeypatch)
    extract_group(world.storage, [spec], [(first.start, first.stop)])
    assert sorted(computed) == [(spec.ref, part) for part in first]  # two are written at a time
    assert finished_parts(world.storage, spec.ref, n_parts).nonzero()[0].tolist() == list(first)
    assert len(world.storage.list(layout.index_folder(spec.ref))) == 1
    before = stored(world, spec)

    world.storage.remove(layout.record_path(spec.ref, 1))
    computed.clear()
    extract_group(world.storage, [spec], [(first.start, first.stop)])
    assert computed == [(spec.ref, 1)]
    assert stored(world, spec) == before

    computed.clear()
    extract_group(world.storage, [spec], [(first.start, first.stop)], recompute=True)
    assert sorted(computed) == [(spec.ref, part) for part in first]
    assert stored(world, spec) == before

    extract_group(world.storage, [spec], [(second.start, second.stop)])
    assert finished_parts(world.storage, spec.ref, n_parts).all()
    snapshot = commit_snapshot(world.storage, SnapshotSpec(parts=(spec.ref,), n_tokens=None))
    assert snapshot.metrics["n_parts"] == n_parts


def test_only_the_hook_points_that_lack_a_part_are_written(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world()
    specs = [world.parts(), world.parts(hook_point="gpt_neox.layers.0.mlp.dense_h_to_4h")]
    for spec in specs:
        count_parts(world, spec)
    computed = watch(monkeypatch)
    first, second = (spec.ref for spec in specs)
    extract_group(world.storage, specs[:1], [(0, 1)])
    extract_group(world.storage, specs, [(0, 2), (0, 2)])
    assert computed[0] == (first, 0)
    assert sorted(computed[1:]) == sorted([(second, 0), (first, 1), (second, 1)])  # two are written at a time
    for spec in specs:
        assert all(verify(world.storage, require_record(world.storage, spec.ref, part)) == [] for part in (0, 1))


def work(root: str, spec_json: str, seed: int, start: "multiprocessing.synchronize.Barrier", report: str) -> None:
    """One of several extractors: every part of the set, in an order of its own."""
    spec, storage = PartsSpec.model_validate_json(spec_json), Storage(root)
    n_parts = int(require_record(storage, spec.ref).metrics["n_parts"])
    groups = groups_of(n_parts)
    random.Random(seed).shuffle(groups)
    with pytest.MonkeyPatch.context() as patch:
        computed = watch(patch)
        start.wait(120)
        for group in groups:
            extract_group(storage, [spec], [(group.start, group.stop)])
    Path(report).write_text(json.dumps(computed))


def test_two_extractors_share_a_part_set_without_a_coordinator(make_world: MakeWorld, tmp_path: Path) -> None:
    world = make_world()
    spec = world.parts(part_bytes=4 * 16 * 32 * 2)
    n_parts = count_parts(world, spec)
    shared = tmp_path / "shared"
    shutil.copytree(world.storage.full(""), shared)
    for part in range(n_parts):
        extract_group(world.storage, [spec], [(part, part + 1)])

    spawn = multiprocessing.get_context("spawn")
    start = spawn.Barrier(2)
    reports = [tmp_path / f"report-{seed}.json" for seed in range(2)]
    workers = [
        spawn.Process(target=work, args=(str(shared), spec.model_dump_json(), seed, start, str(report)))
        for seed, report in enumerate(reports)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(200)
        assert worker.exitcode == 0

    storage = Storage(str(shared))
    assert finished_parts(storage, spec.ref, n_parts).all()
    for part in range(n_parts):
        ours, alone = (require_record(each, spec.ref, part) for each in (storage, world.storage))
        assert ours.content == alone.content
        assert verify(storage, ours) == []
    # One file and one record per part, and the record of the set: nobody left anything behind.
    assert storage.sizes(spec.ref).keys() == world.storage.sizes(spec.ref).keys()
    computed = [{part for _, part in json.loads(report.read_text())} for report in reports]
    assert computed[0] | computed[1] == set(range(n_parts))
    assert all(computed)  # both had their share
    assert sum(map(len, computed)) < 2 * n_parts


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no niceness of their own")
@pytest.mark.parametrize(("n_cores", "nicer"), [(64, NICENESS), (1, 0)], ids=["a core to spare", "none"])
def test_the_threads_beside_the_model_let_it_go_before(
    n_cores: int, nicer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, 0)

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(n_cores)))
    own = niceness()
    with helper_threads() as executors:
        assert [executor.submit(niceness).result() for executor in executors] == [min(own + nicer, 19)] * 2
    assert niceness() == own
