"""Damaged files are found on use, computed again, and put back under their names; nothing downstream is touched."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sae.errors import DamagedError, StoreError
from sae.plan import PipelineConfig, Plan, make_plan
from sae.store import layout
from sae.store.artefacts.records import Record, read_record, require_record
from sae.store.storage.filesystem import Storage
from tests.flows.processes import contents, strays

pytestmark = pytest.mark.usefixtures("prefect_backend")

Damage = Callable[[Path], None]


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.Random(path.name).randrange(len(data))] ^= 0x10
    path.write_bytes(bytes(data))


DAMAGES = (delete, truncate, flip_a_bit)


def places(plan: Plan, storage: Storage) -> dict[str, tuple[Record, str]]:
    """A file of every kind: the record that names it, its name."""

    def of(ref: str, part: int | None = None) -> Record:
        return require_record(storage, ref, part)

    hook = plan.config.hook_points[0]
    return {
        "tokens": (of(plan.tokens[0].ref), "train.parquet"),
        "tokenizer": (of(plan.tokenizer.ref), "tokenizer.json"),
        "subject weights": (of(plan.subject.ref), "model.safetensors"),
        "activations": (of(plan.parts[hook, "train"][0].ref, 1), "part.parquet"),
        "held-out activations": (of(plan.parts[hook, "heldout"][0].ref, 0), "part.parquet"),
        "snapshot": (of(plan.snapshots[hook, "train"].ref), "snapshot.json"),
        "SAE weights": (of(plan.saes[0].ref), "sae.safetensors"),
        "evaluation": (of(plan.evaluations[0].ref), "evaluation.json"),
        "statistics": (of(plan.statistics[0].ref), "latents.parquet"),
        "statistics of a part": (of(plan.statistics[0].ref, 0), ""),
        "report": (of(plan.report.ref), "index.html"),
    }


KINDS = (
    "tokens",
    "tokenizer",
    "subject weights",
    "activations",
    "held-out activations",
    "snapshot",
    "SAE weights",
    "evaluation",
    "statistics",
    "statistics of a part",
    "report",
)


def run(config: PipelineConfig, **options: Any) -> list[dict[str, Any]]:
    from flows.pipeline import pipeline

    return pipeline(config, **options)


def remove(config: PipelineConfig, *refs: str) -> None:
    """Delete the commit records of artefacts, so that a run makes them again and uses their inputs."""
    for ref in refs:
        for path in Path(config.execution.root, ref).glob("*.json"):
            path.unlink()


@pytest.mark.parametrize("damage", [delete, pytest.param(truncate, marks=pytest.mark.slow)])
def test_files_that_are_missing_or_short_are_made_again_and_nothing_else(damage: Damage, copy: PipelineConfig) -> None:
    storage, plan = Storage(copy.execution.root), make_plan(copy)
    before, stamps = contents(copy), record_stamps(copy)
    records = {record.ref + str(record.part): record for record, _ in places(plan, storage).values()}.values()
    originals = damage_all(places(plan, storage), storage, damage)
    outcomes = run(copy)
    made = {(o["ref"], o["part"]) for o in outcomes if o["outcome"] == "computed"}
    assert made == {(record.ref, record.part) for record in records}
    assert {path: path.read_bytes() for path in originals} == originals
    assert contents(copy) == before
    assert record_stamps(copy) == stamps
    assert strays(copy.execution.root) == []


@pytest.mark.slow
def test_flipped_bits_everywhere_are_found_on_use_and_mended(copy: PipelineConfig) -> None:
    storage, plan = Storage(copy.execution.root), make_plan(copy)
    before = contents(copy)
    used = {kind: place for kind, place in places(plan, storage).items() if kind != "report"}
    # What reads the files has to be done again; what lies between stays.
    remove(copy, *{ref for kind in used for ref in readers(plan, kind)})
    originals = damage_all(used, storage, flip_a_bit)
    run(copy)
    assert {path: path.read_bytes() for path in originals} == originals
    assert contents(copy) == before
    assert strays(copy.execution.root) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_found_on_use_and_mended(kind: str, copy: PipelineConfig) -> None:
    storage, plan = Storage(copy.execution.root), make_plan(copy)
    before = contents(copy)
    place = places(plan, storage)[kind]
    remove(copy, *readers(plan, kind))
    ((path, original),) = damage_all({kind: place}, storage, flip_a_bit).items()
    if kind != "report":  # nobody reads a report but people
        run(copy)
        assert path.read_bytes() == original
        assert contents(copy) == before


def test_an_artefact_is_compared_with_its_record_when_one_asks_for_it(copy: PipelineConfig) -> None:
    storage, plan = Storage(copy.execution.root), make_plan(copy)
    record, name = places(plan, storage)["report"]
    ((path, original),) = damage_all({"report": (record, name)}, storage, flip_a_bit).items()
    assert path.read_bytes() != original
    run(copy, repair=(record.ref,))
    assert path.read_bytes() == original
    assert strays(copy.execution.root) == []


def damage_all(kinds: dict[str, tuple[Record, str]], storage: Storage, damage: Damage) -> dict[Path, bytes]:
    """Damage a file of every kind. Returns: what each held."""
    originals = {}
    for record, name in kinds.values():
        path = Path(storage.full(record.path(name or record.files[0].name)))
        originals[path] = path.read_bytes()
        damage(path)
    return originals


def readers(plan: Plan, kind: str) -> tuple[str, ...]:
    """Artefacts that read a file of this kind."""
    sae, evaluation, statistics, report = (
        plan.saes[0].ref,
        plan.evaluations[0].ref,
        plan.statistics[0].ref,
        plan.report.ref,
    )
    return {
        "tokens": (plan.parts[plan.config.hook_points[0], "train"][0].ref,),
        "tokenizer": (plan.tokens[0].ref,),
        "subject weights": (evaluation,),
        "activations": (sae,),
        "held-out activations": (evaluation,),
        "snapshot": (sae,),
        "SAE weights": (evaluation,),
        "evaluation": (report,),
        "statistics": (report,),
        "statistics of a part": (statistics,),
        "report": (),
    }[kind]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_set_aside_and_made_again(damage: Damage, copy: PipelineConfig) -> None:
    storage, plan = Storage(copy.execution.root), make_plan(copy)
    before = contents(copy)
    part_set = plan.parts[copy.hook_points[0], "train"][0]
    for ref, part in ((plan.saes[0].ref, None), (part_set.ref, 2)):
        damage(Path(storage.full(layout.record_path(ref, part))))
    outcomes = run(copy)
    assert {(o["ref"], o["part"]) for o in outcomes if o["outcome"] == "computed"} == {
        (plan.saes[0].ref, None),
        (part_set.ref, 2),
    }
    assert contents(copy) == before
    assert read_record(storage, plan.saes[0].ref) is not None


def test_other_bytes_are_refused_and_the_stored_ones_kept(copy: PipelineConfig) -> None:
    storage, plan = Storage(copy.execution.root), make_plan(copy)
    record = require_record(storage, plan.saes[0].ref)
    path = Path(storage.full(layout.record_path(record.ref)))
    # As if it had been trained on another kind of machine: a record of other bytes under the same name.
    weights = Path(storage.full(record.path("sae.safetensors")))
    with storage.staging() as folder:
        from sae.store.artefacts.records import commit

        path.unlink()
        (folder / "sae.safetensors").write_bytes(b"other bytes")
        commit(storage, plan.saes[0], folder, record.metrics, seconds=0)
    kept = path.read_bytes()
    with pytest.raises(StoreError, match="gave other bytes"):
        run(copy, repair=(record.ref,))
    assert path.read_bytes() == kept
    assert weights.exists()


def test_a_flow_alone_names_what_it_cannot_make(copy: PipelineConfig) -> None:
    from flows.train import train

    storage, plan = Storage(copy.execution.root), make_plan(copy)
    record = require_record(storage, plan.parts[copy.hook_points[0], "train"][0].ref, 1)
    data = bytearray(Path(storage.full(record.path("part.parquet"))).read_bytes())
    place = record.metrics["layout"]["row_groups"][2]
    data[place["offset"] + 5] ^= 1
    Path(storage.full(record.path("part.parquet"))).write_bytes(bytes(data))
    remove(copy, plan.saes[0].ref)
    with pytest.raises(DamagedError) as caught:
        train(copy)
    message = str(caught.value)
    assert "part.parquet" in message
    assert "row group 2" in message
    assert f"offset {place['offset']}" in message
    assert (caught.value.ref, caught.value.part) == (record.ref, 1)


def test_what_cannot_be_computed_any_more_says_where_the_damage_is(copy: PipelineConfig, tmp_path: Path) -> None:
    import numpy as np

    from tests.flows.conftest import with_settings

    rows = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    np.save(tmp_path / "given.npy", rows)
    given = {
        "subject": None,
        "corpus": None,
        "activations": {"kind": "given", "sets": {"mine": {"kind": "file", "url": str(tmp_path / "given.npy")}}},
        "saes": [{"sae": {"architecture": "topk", "d_sae": 8, "k": 2, "k_aux": 0}, "batch_rows": 16}],
        "evaluation": {"untrained": None},
    }
    config = with_settings(copy, given)
    run(config)
    storage, plan = Storage(config.execution.root), make_plan(config)
    record = require_record(storage, plan.parts["mine", "train"][0].ref, 0)
    place = record.metrics["layout"]["row_groups"][0]
    path = Path(storage.full(record.path("part.parquet")))
    data = bytearray(path.read_bytes())
    data[place["offset"]] ^= 1
    path.write_bytes(bytes(data))
    remove(config, plan.saes[0].ref)
    (tmp_path / "given.npy").unlink()
    with pytest.raises(StoreError) as caught:  # the plan is remembered, so the source is missed only now
        run(config)
    assert all(text in str(caught.value) for text in ("part.parquet", "row group 0", f"offset {place['offset']}"))
    assert "given.npy" in str(caught.value)
    assert path.read_bytes() == bytes(data)


def record_stamps(config: PipelineConfig) -> dict[str, int]:
    """When each commit record was written: a record that is touched is another one."""
    return {
        str(path): path.stat().st_mtime_ns
        for pattern in ("[!.]*/*/record.json", "[!.]*/*/part-*.json")
        for path in Path(config.execution.root).glob(pattern)
        if json.loads(path.read_text())
    }
