"""Several parts and hook points in one call: one forward pass for all, and each part as if it were extracted alone."""

import threading
import time

import numpy as np
import pytest
import torch

from sae.errors import ConfigError, StoreError
from sae.extract import stream
from sae.extract.config import PartsSpec
from sae.extract.part import extract_part, extract_parts, plan_parts
from sae.store.artefacts.records import commit, read_record
from sae.store.storage.filesystem import Storage
from sae.subject.load import load_subject

WIDE, NARROW = "gpt_neox.layers.0.mlp.act", "gpt_neox.layers.0"


def planned(storage: Storage, *specs: PartsSpec) -> list[int]:
    """Commit the plans; returns the numbers of parts."""
    return [int(plan_parts(storage, spec).metrics["n_parts"]) for spec in specs]


@pytest.fixture
def counted(make_world) -> tuple:
    """A world, its model loaded, and the number of contexts of every forward pass."""
    world = make_world()
    subject = load_subject(world.storage, world.subject.ref)
    passes: list[int] = []
    subject.model.gpt_neox.embed_in.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    return world, subject, passes


def test_hook_points_of_other_widths_and_dtypes_share_every_forward_pass(counted, tmp_path):
    world, subject, passes = counted
    specs = [
        world.parts(hook_point=WIDE),
        world.parts(hook_point=NARROW),
        world.parts(hook_point=WIDE, dtype="float32"),
        world.parts(hook_point=NARROW, dtype="int8", max_norm_multiple=2.0),
    ]
    n_parts = planned(world.storage, *specs)
    sizes = [read_record(world.storage, spec.ref).metrics["contexts_per_part"] for spec in specs]
    assert sizes == [8, 16, 4, 32]
    together = extract_parts(world.storage, specs, [range(n) for n in n_parts], subject=subject)
    n_contexts = read_record(world.storage, specs[0].ref).metrics["n_contexts"]
    assert len(passes) == -(-n_contexts // 4)
    assert sum(passes) == n_contexts

    # Computing a part again commits it again: other bytes would be refused.
    for spec, records in zip(specs, together, strict=True):
        for part, record in enumerate(records):
            assert extract_part(world.storage, [spec], part, subject=subject) == [record]


def test_specs_of_other_forward_passes_are_refused(make_world):
    world = make_world()
    specs = [world.parts(), world.parts(batch_contexts=2)]
    planned(world.storage, *specs)
    with pytest.raises(ConfigError, match=r"differ in batch_contexts \(2, 4\)"):
        extract_part(world.storage, specs, 0)


def test_finished_parts_are_left_alone_and_their_contexts_not_run(counted):
    world, subject, passes = counted
    spec = world.parts()
    (n_parts,) = planned(world.storage, spec)
    first = extract_parts(world.storage, [spec], [[1]], subject=subject)
    assert passes == [4, 4]
    passes.clear()
    (records,) = extract_parts(world.storage, [spec], [range(n_parts)], subject=subject)
    n_contexts = read_record(world.storage, spec.ref).metrics["n_contexts"]
    assert sum(passes) == n_contexts - 8
    assert records[1] == first[0][0]
    passes.clear()
    assert extract_parts(world.storage, [spec], [range(n_parts)]) == [records]  # and no model is loaded
    assert passes == []


def test_part_that_somebody_else_finishes_meanwhile_is_not_computed(counted):
    world, subject, passes = counted
    spec = world.parts()
    planned(world.storage, spec)
    other = load_subject(world.storage, world.subject.ref)

    def progress(done: int, total: int, unit: str, note: str = "") -> None:
        if done == 4 * 16:  # the first batch
            extract_part(world.storage, [spec], 2, subject=other)

    extract_parts(world.storage, [spec], [range(4)], subject=subject, progress=progress)
    assert len(passes) == 3 * 2


def test_a_part_is_written_while_the_model_runs_and_two_at_most_are_in_memory(counted, monkeypatch):
    world, subject, _ = counted
    spec = world.parts()
    planned(world.storage, spec)
    events: list[tuple[str, int]] = []
    batches = iter(range(99))
    subject.model.gpt_neox.embed_in.register_forward_pre_hook(
        lambda _, args: events.append(("forward", next(batches) // 2))
    )

    def slow_commit(storage, spec, folder, metrics, *, seconds, part, device):
        time.sleep(0.1)
        events.append(("written", part))
        return commit(storage, spec, folder, metrics, seconds=seconds, part=part, device=device)

    monkeypatch.setattr(stream, "commit", slow_commit)
    extract_parts(world.storage, [spec], [range(5)], subject=subject)
    for part in range(4):
        assert events.index(("forward", part + 1)) < events.index(("written", part))
    for part in range(2):  # the next but two does not begin before this one's memory is free
        assert events.index(("written", part)) < events.index(("forward", part + 3))


def test_error_of_a_write_ends_the_call_and_keeps_what_was_committed(make_world):
    world = make_world()
    spec = world.parts()
    planned(world.storage, spec)
    with world.storage.staging() as folder:
        (folder / "part.parquet").write_bytes(b"other bytes")
        commit(world.storage, spec, folder, {}, seconds=0, part=1)
    with pytest.raises(StoreError, match="the same work gave other bytes"):
        extract_parts(world.storage, [spec], [range(4)], recompute=True)
    assert read_record(world.storage, spec.ref, 0).metrics["n_contexts"] == 8
    assert read_record(world.storage, spec.ref, 3) is None
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith(("put-", "write-"))] == []


def test_threads_of_torch_do_not_change_what_is_recorded(counted):
    world, subject, _ = counted
    specs = [world.parts(seed=seed) for seed in (0, 0)]
    planned(world.storage, specs[0])
    threads = torch.get_num_threads()
    (record,) = extract_part(world.storage, [specs[0]], 0, subject=subject)
    assert torch.get_num_threads() == threads
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [threads]
    assert np.isfinite(record.metrics["sum_norm"])
