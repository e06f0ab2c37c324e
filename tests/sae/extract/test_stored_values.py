"""What is stored of the activations: in which precision, which of them, and what the part's record says of them."""

import base64
from pathlib import Path

import numpy as np
import pytest
import torch

from sae.errors import InputError
from sae.extract import stored_rows, write
from sae.extract.config import PartsSpec
from sae.extract.filters import fill_gaps, norm_limit
from sae.extract.part import extract_part, extract_parts, plan_parts
from sae.store.artefacts.records import Record, read_record
from sae.store.part import writer
from sae.store.part.encoding import stored_dtype
from sae.store.part.writer import PartLayout
from sae.store.reading.blocks import iter_rows
from sae.store.snapshots.snapshot import SnapshotSpec, commit_snapshot, read_snapshot
from sae.store.storage.filesystem import Storage
from sae.store.text.contexts import read_contexts
from sae.subject.hooks import splice
from sae.subject.load import load_subject
from tests.flows.models import save_model
from tests.sae.extract.test_models import parts_of

DTYPES = ("float16", "bfloat16", "float32", "int8")
RELATIVE = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 0.0, "int8": 0.0}
"""Largest error of a value, as a share of it."""


def extract_all(storage: Storage, spec: PartsSpec, **options) -> list[Record]:
    n_parts = plan_parts(storage, spec).metrics["n_parts"]
    return extract_parts(storage, [spec], [range(n_parts)], **options)[0]


def rows_of(storage: Storage, spec: PartsSpec) -> dict[tuple[int, int], np.ndarray]:
    """(seq, pos) -> the vector that is read back, of all parts."""
    snapshot = SnapshotSpec(parts=(spec.ref,), n_tokens=None)
    commit_snapshot(storage, snapshot)
    rows = {}
    for block in iter_rows(storage, read_snapshot(storage, snapshot.ref)):
        places = zip(block.seq.tolist(), block.pos.tolist(), strict=True)
        rows |= dict(zip(places, block.act.astype(np.float32), strict=True))
    return rows


def vector(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f8")


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_read_back_in_the_precision_of_their_dtype(make_world, dtype):
    world = make_world()
    exact, spec = world.parts(dtype="float32"), world.parts(dtype=dtype)
    extract_all(world.storage, exact)
    extract_all(world.storage, spec)
    expected, found = rows_of(world.storage, exact), rows_of(world.storage, spec)
    assert found.keys() == expected.keys()
    places = sorted(found)
    a, b = (np.stack([rows[place] for place in places]) for rows in (expected, found))
    step = 0.51 * np.ptp(a, axis=0) / 255 if dtype == "int8" else 1e-7
    assert (np.abs(a - b) <= RELATIVE[dtype] * np.abs(a) + step).all()


@pytest.mark.parametrize("block_rows", [3, 1 << 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_record_holds_the_moments_of_the_values_as_they_are_read_back(make_world, monkeypatch, dtype, block_rows):
    monkeypatch.setattr(writer, "BLOCK_BYTES", block_rows * 32 * stored_dtype(dtype).itemsize)
    monkeypatch.setattr(write, "SUM_VALUES", 2 * 32)
    monkeypatch.setattr(stored_rows, "PICKED_BYTES", 7 * 32 * 4)
    world = make_world()
    spec = world.parts(dtype=dtype)
    records = extract_all(world.storage, spec)
    act = np.stack(list(rows_of(world.storage, spec).values())).astype(np.float64)
    norms = np.linalg.norm(act, axis=1)
    totals = {name: sum(record.metrics[name] for record in records) for name in ("n_rows", "sum_sq", "sum_norm")}
    assert totals["n_rows"] == len(act)
    np.testing.assert_allclose(sum(vector(record.metrics["sum"]) for record in records), act.sum(0), rtol=1e-12)
    np.testing.assert_allclose(
        sum(vector(record.metrics["sum_sq_by_dim"]) for record in records), (act**2).sum(0), rtol=1e-12
    )
    np.testing.assert_allclose([totals["sum_sq"], totals["sum_norm"]], [(norms**2).sum(), norms.sum()], rtol=1e-12)
    first = np.array([record.metrics["median_norm"] for record in records])
    assert np.median(norms) == pytest.approx(np.median(first), rel=0.1)
    assert records[0].metrics["median_norm"] == pytest.approx(np.median(norms[: records[0].metrics["n_rows"]]))


def test_values_above_float16_are_divided_by_a_recorded_power_of_two(make_world):
    world = make_world()
    subject = load_subject(world.storage, world.subject.ref)
    contexts = read_contexts(world.storage, world.tokens.ref, "train")
    # In the second part one token of the second batch is large, so what the first batch left must be scaled too.
    context = 8 + 4 + int(np.argmax(contexts.tokens[12:16, 3] != 0))
    marked = torch.from_numpy(contexts.tokens[context].astype(np.int64))
    seen = []
    subject.model.gpt_neox.embed_in.register_forward_pre_hook(lambda _, args: seen.append((args[0] == marked).all(-1)))

    def enlarge(act: torch.Tensor) -> torch.Tensor:
        act = act.clone()
        act[seen[-1], 3, 5] = 3e5
        return act

    specs = [world.parts(), world.parts(dtype="float32")]
    with splice(subject.model, specs[0].hook_point, enlarge):
        records = extract_all(world.storage, specs[0], subject=subject)
        extract_all(world.storage, specs[1], subject=subject)
    exponents = [PartLayout.model_validate(record.metrics["layout"]).encoding.exponent for record in records]
    assert exponents[:4] == [0, 4, 0, 0]  # 3e5 / 2**4 = 18750
    found, expected = (rows_of(world.storage, spec) for spec in specs)
    assert max(act.max() for act in found.values()) == pytest.approx(3e5, rel=2**-11)
    for place, act in expected.items():
        np.testing.assert_allclose(found[place], act, rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_bfloat16_model_is_stored_as_it_computes(storage, tmp_path: Path, corpus_folder: Path, dtype):
    save_model("llama", tmp_path / "model")
    (spec,) = parts_of(storage, tmp_path / "model", corpus_folder, ("model.layers.0",), "bfloat16")
    spec = PartsSpec.model_validate(spec.model_dump() | {"dtype": dtype, "part_bytes": 1 << 12})
    subject = load_subject(storage, spec.subject)
    assert subject.model.dtype == torch.bfloat16
    extract_all(storage, spec, subject=subject)
    rows = rows_of(storage, spec)
    contexts = read_contexts(storage, spec.tokens, "train")
    seen: list[torch.Tensor] = []
    subject.model.model.layers[0].register_forward_hook(
        lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    subject.model(torch.from_numpy(contexts.tokens[:4].astype(np.int64)))
    for row, act in enumerate(seen[0].float().numpy()):
        for pos in range(act.shape[0]):
            np.testing.assert_array_equal(rows[int(contexts.seq[row]), pos], act[pos])


def test_attention_sinks_are_left_out_of_their_hook_point_and_counted(make_world):
    world = make_world()
    subject = load_subject(world.storage, world.subject.ref)
    layer, mlp = "gpt_neox.layers.0", "gpt_neox.layers.0.mlp.act"

    def sink(act: torch.Tensor) -> torch.Tensor:
        act = act.clone()
        act[:, 0] *= 50
        return act

    filtered = [world.parts(hook_point=name, max_norm_multiple=10.0) for name in (mlp, layer)]
    plain = world.parts(hook_point=layer)
    with splice(subject.model, layer, sink):
        n_parts = [plan_parts(world.storage, spec).metrics["n_parts"] for spec in (*filtered, plain)]
        _, records, unfiltered = extract_parts(
            world.storage, [*filtered, plain], [range(n) for n in n_parts], subject=subject
        )
    everything, without, of_mlp = (rows_of(world.storage, spec) for spec in (plain, filtered[1], filtered[0]))
    assert without.keys() == {place for place in everything if place[1] != 0}
    assert all(np.array_equal(act, everything[place]) for place, act in without.items())
    assert of_mlp.keys() == everything.keys()
    for record, whole in zip(records, unfiltered, strict=True):
        assert record.metrics["n_sink"] == whole.metrics["n_rows"] - record.metrics["n_rows"] > 0
        assert whole.metrics["n_sink"] == 0
        assert whole.metrics["norm_limit"] is None
        assert record.metrics["norm_limit"] == pytest.approx(10 * whole.metrics["median_norm"], rel=1e-6)
        assert record.metrics["n_special"] == whole.metrics["n_special"]


def test_rows_that_fill_the_gaps_of_dropped_ones_are_the_last():
    gaps, fillers = fill_gaps(8, np.array([1, 4, 7]))
    assert (gaps.tolist(), fillers.tolist()) == ([1, 4], [5, 6])
    gaps, fillers = fill_gaps(4, np.array([2, 3]))
    assert len(gaps) == len(fillers) == 0


def test_there_is_no_norm_limit_where_most_rows_are_zero():
    assert norm_limit(np.array([0.0, 0.0, 3.0]), 10.0) is None
    assert norm_limit(np.array([0.0, 2.0, 3.0]), 10.0) == 20.0
    assert norm_limit(np.array([1.0]), None) is None


def test_special_tokens_are_kept_by_role_or_spelling(make_world):
    world = make_world()
    kept = world.parts(keep_special=True)
    extract_all(world.storage, kept)
    everything = rows_of(world.storage, kept)
    special = load_subject(world.storage, world.subject.ref).tokenizer.eos_token
    for name in ("eos", special):
        spec = world.parts(keep_special=(name,))
        records = extract_all(world.storage, spec)
        assert rows_of(world.storage, spec).keys() == everything.keys()
        assert sum(record.metrics["n_special"] for record in records) == 0
    assert read_record(world.storage, world.parts(keep_special=("eos",)).ref).metrics["dropped_ids"] == []
    with pytest.raises(InputError, match=r"no special token 'separator'; it has .*'eos'"):
        plan_parts(world.storage, world.parts(keep_special=("separator",)))


def test_dropped_tokens_that_cannot_be_stored_do_not_matter(make_world):
    world = make_world()
    spec = world.parts()
    plan_parts(world.storage, spec)
    subject = load_subject(world.storage, world.subject.ref)
    tokens = []
    subject.model.gpt_neox.embed_in.register_forward_pre_hook(lambda _, args: tokens.append(args[0]))

    def spoil(act: torch.Tensor) -> torch.Tensor:
        act = act.clone()
        act[tokens[-1] == 0] = float("nan")
        return act

    with splice(subject.model, spec.hook_point, spoil):
        (record,) = extract_part(world.storage, [spec], 0, subject=subject)
    assert record.metrics["n_special"] > 0
    assert np.isfinite(record.metrics["sum_norm"])
