import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sae.errors import ConfigError, InputError
from sae.extract.config import PartsSpec
from sae.extract.part import extract_part, plan_parts
from sae.store.artefacts.records import Record, local_files, require_record
from sae.store.part.writer import PartLayout
from sae.store.snapshots.snapshot import SnapshotSpec, commit_snapshot, read_snapshot
from sae.store.storage.filesystem import Storage
from sae.store.text.contexts import PADDING, read_contexts
from sae.subject.hooks import splice
from sae.subject.load import load_subject


def read_part(storage: Storage, record: Record) -> dict[str, np.ndarray]:
    with local_files(storage, record) as folder:
        table = pq.read_table(folder / "part.parquet")
    act = np.stack([np.asarray(row, np.float16) for row in table["act"].to_pylist()])
    return {"act": act} | {name: table[name].to_numpy() for name in ("seq", "pos", "token")}


def extract_all(storage: Storage, spec: PartsSpec) -> list[Record]:
    n_parts = plan_parts(storage, spec).metrics["n_parts"]
    return [extract_part(storage, [spec], part)[0] for part in range(n_parts)]


def full_forward(world, spec: PartsSpec) -> dict[tuple[int, int], np.ndarray]:
    """(seq, pos) -> activation, from a plain forward pass of the whole model over one context at a time."""
    model = load_subject(world.storage, world.subject.ref).model
    contexts = read_contexts(world.storage, spec.tokens, spec.split)
    seen = []
    model.gpt_neox.layers[0].mlp.act.register_forward_hook(lambda _, args, out: seen.append(out))
    found = {}
    for seq, tokens, docs in zip(contexts.seq, contexts.tokens, contexts.docs, strict=True):
        n = int((docs != PADDING).sum())
        with torch.no_grad():
            model(torch.from_numpy(tokens[:n].astype(np.int64))[None])
        for pos, act in enumerate(seen.pop()[0].numpy()):
            if tokens[pos] != 0:
                found[int(seq), pos] = act
    return found


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_stored_rows_are_the_activations_of_a_plain_forward_pass(make_world, packing, split):
    world = make_world(packing=packing)
    spec = world.parts(split=split)
    expected = full_forward(world, spec)
    n_rows = 0
    for record in extract_all(world.storage, spec):
        rows = read_part(world.storage, record)
        for act, seq, pos in zip(rows["act"], rows["seq"], rows["pos"], strict=True):
            np.testing.assert_allclose(act, expected[seq, pos], rtol=2e-3, atol=1e-4)
        n_rows += len(rows["seq"])
    assert n_rows == len(expected)


def test_every_token_is_stored_once_or_counted_as_left_out(make_world):
    world = make_world(packing=False)
    spec = world.parts()
    records = extract_all(world.storage, spec)
    contexts = read_contexts(world.storage, spec.tokens, "train")
    tokens = {(s, p): t for s, row in zip(contexts.seq, contexts.tokens, strict=True) for p, t in enumerate(row)}
    seen = set()
    for record in records:
        rows = read_part(world.storage, record)
        for seq, pos, token in zip(rows["seq"], rows["pos"], rows["token"], strict=True):
            assert tokens[seq, pos] == token != 0
            seen.add((seq, pos))
    totals = {key: sum(record.metrics[key] for record in records) for key in ("n_rows", "n_special", "n_padding")}
    assert len(records) > 1
    assert len(seen) == totals["n_rows"]
    assert totals["n_padding"] == (contexts.docs == PADDING).sum()
    assert totals["n_special"] == len(contexts)
    assert sum(totals.values()) == contexts.tokens.size


def test_special_tokens_can_be_kept(make_world):
    world = make_world()
    record = extract_all(world.storage, world.parts(keep_special=True))[0]
    assert record.metrics["n_rows"] == 8 * 16
    assert record.metrics["n_special"] == 0
    assert (read_part(world.storage, record)["token"] == 0).any()


def test_rows_are_permuted_within_their_part_and_each_part_otherwise(make_world):
    world = make_world()
    first, second = (read_part(world.storage, record) for record in extract_all(world.storage, world.parts())[:2])
    assert set(first["seq"]) == set(range(8))
    assert set(second["seq"]) == set(range(8, 16))
    assert np.corrcoef(np.arange(len(first["seq"])), first["seq"])[0, 1] < 0.4


def test_record_describes_the_part(make_world):
    world = make_world()
    spec = world.parts()
    records = extract_all(world.storage, spec)
    stored = np.concatenate([read_part(world.storage, record)["act"] for record in records]).astype(np.float64)
    commit_snapshot(world.storage, SnapshotSpec(parts=(spec.ref,), n_tokens=None))
    snapshot = read_snapshot(world.storage, SnapshotSpec(parts=(spec.ref,), n_tokens=None).ref)
    assert (snapshot.n_rows, snapshot.d_in) == stored.shape
    np.testing.assert_allclose(snapshot.mean, stored.mean(0), rtol=1e-12)
    assert snapshot.mean_sq_norm == pytest.approx(((stored - stored.mean(0)) ** 2).sum(1).mean(), rel=1e-9)
    layout = PartLayout.model_validate(records[0].metrics["layout"])
    assert [group.n_rows for group in layout.row_groups[:-1]] == [50] * (len(layout.row_groups) - 1)


def test_plan_cuts_the_contexts_into_parts(make_world):
    world = make_world()
    metrics = plan_parts(world.storage, world.parts()).metrics
    n_contexts = len(read_contexts(world.storage, world.tokens.ref, "train"))
    assert metrics["contexts_per_part"] == 8
    assert metrics["tokens_per_part"] == 128
    assert metrics["n_parts"] == -(-n_contexts // 8)
    assert metrics["row_group_rows"] == 50


@pytest.mark.parametrize(
    ("options", "contexts"),
    [
        ({"part_bytes": 8 * 1024 - 1}, 4),  # 1024 bytes a context, 4 contexts a batch
        ({"part_bytes": 31 * 1024}, 16),
        ({"part_bytes": 1}, 4),
        ({"part_bytes": 31 * 1024, "dtype": "float32"}, 8),
        ({"part_bytes": 31 * 1024, "dtype": "int8"}, 32),
        ({"part_bytes": 31 * 1024, "hook_point": "gpt_neox.layers.0"}, 32),  # half as wide
        ({"part_bytes": 31 * 1024, "batch_contexts": 6}, 24),
    ],
)
def test_parts_are_a_power_of_two_of_batches_within_the_bytes_asked_for(make_world, options, contexts):
    world = make_world()
    assert plan_parts(world.storage, world.parts(**options)).metrics["contexts_per_part"] == contexts


def test_part_out_of_range_is_refused(make_world):
    world = make_world()
    plan_parts(world.storage, world.parts())
    with pytest.raises(ConfigError, match="no part 99"):
        extract_part(world.storage, [world.parts()], 99)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "1 of 32 activations are NaN or infinite"),
        (float("inf"), "1 of 32 activations are NaN or infinite"),
        (2e9, r"an activation of 2e\+09 is too large for float16"),
    ],
)
def test_value_that_cannot_be_stored_is_located(make_world, value, message):
    world = make_world()
    spec = world.parts()
    plan_parts(world.storage, spec)
    subject = load_subject(world.storage, world.subject.ref)
    contexts = read_contexts(world.storage, spec.tokens, "train")
    context = int(np.argmax(contexts.tokens[:8, 3] != 0))
    marked = torch.from_numpy(contexts.tokens[context].astype(np.int64))

    def spoil(act: torch.Tensor) -> torch.Tensor:
        act = act.clone()
        act[tokens_seen[-1] == 1, 3, 5] = value
        return act

    tokens_seen = []
    subject.model.gpt_neox.embed_in.register_forward_pre_hook(
        lambda _, args: tokens_seen.append((args[0] == marked).all(-1))
    )
    where = f"layers.0.mlp.act', part 0, context {contexts.seq[context]}, position 3"
    with splice(subject.model, spec.hook_point, spoil), pytest.raises(InputError, match=message) as caught:
        extract_part(world.storage, [spec], 0, subject=subject)
    assert where in str(caught.value)


def test_unknown_hook_point_fails_in_the_plan(make_world):
    world = make_world()
    with pytest.raises(InputError, match=r"Did you mean 'gpt_neox\.layers\.0\.mlp\.act'"):
        plan_parts(world.storage, world.parts(hook_point="gpt_neox.layers.0.mlp.akt"))


def test_bfloat16_model_is_stored_exactly_in_float16(make_world):
    world = make_world()
    spec = world.parts()
    plan_parts(world.storage, spec)
    subject = load_subject(world.storage, world.subject.ref)
    subject.model.to(torch.bfloat16)
    (record,) = extract_part(world.storage, [spec], 0, subject=subject)
    act = torch.from_numpy(read_part(world.storage, record)["act"])
    large = act[act.abs() > 1e-3]
    assert torch.equal(large, large.to(torch.bfloat16).to(torch.float16))


def test_extraction_works_in_memory(make_world, memory_storage):
    world = make_world(root=memory_storage)
    (record, *_) = extract_all(memory_storage, world.parts())
    assert require_record(memory_storage, record.ref, 0) == record


def test_progress_counts_tokens(make_world):
    world = make_world()
    plan_parts(world.storage, world.parts())
    calls = []
    extract_part(
        world.storage, [world.parts()], 0, progress=lambda done, total, unit, note="": calls.append((done, total, unit))
    )
    assert calls == [(64, 128, "tokens"), (128, 128, "tokens")]
