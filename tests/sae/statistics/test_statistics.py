"""The statistics of a small store, part by part and merged, against a plain loop over all its rows."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sae.architectures.config import BatchTopKConfig, StandardConfig, TopKConfig
from sae.errors import StoreError
from sae.statistics.accumulate import HISTOGRAM_EDGES
from sae.statistics.config import StatisticsConfig, StatisticsSpec
from sae.statistics.statistics import count_parts, merge_statistics, statistics_of_part
from sae.store.artefacts import records
from sae.store.storage.filesystem import Storage
from sae.store.text.contexts import PADDING, read_document_names
from sae.subject.hooks import direct_logit_matrix
from sae.subject.load import load_subject
from sae.subject.text import token_bytes

HOOK_POINT = "gpt_neox.layers.0.mlp.act"
CONFIG = StatisticsConfig(n_top=3, n_samples=16, n_per_group=2, context_tokens=5, n_neighbours=3, dense_above=0.3)
ARCHITECTURES = [
    TopKConfig(d_sae=8, k=2),
    BatchTopKConfig(d_sae=8, k=2),
    StandardConfig(d_sae=8, l1_coefficient=0),
]


def spec_of(world, config: StatisticsConfig = CONFIG, subject: str | None = None) -> StatisticsSpec:
    return StatisticsSpec(
        config=config,
        sae=world.sae_ref,
        snapshots=world.snapshots,
        tokens=world.tokens,
        subject=subject,
        hook_point=HOOK_POINT,
        seed=0,
    )


def run(world, spec: StatisticsSpec) -> tuple[pa.Table, pa.Table, dict]:
    for part in range(count_parts(world.storage, spec)):
        statistics_of_part(world.storage, spec, part)
    record = merge_statistics(world.storage, spec)
    with records.local_files(world.storage, record) as folder:
        return (
            pq.read_table(folder / "latents.parquet"),
            pq.read_table(folder / "examples.parquet"),
            json.loads((folder / "statistics.json").read_text()),
        )


def naive_latents(world) -> dict[tuple[int, str], dict[tuple[int, int], np.ndarray]]:
    """(segment, split) -> (seq, pos) -> latents [d_sae], one row at a time."""
    with torch.no_grad():
        return {
            place: {key: world.sae.encode(torch.from_numpy(x)[None])[0].numpy() for key, x in rows.items()}
            for place, rows in world.rows.items()
        }


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda config: config.architecture)
@pytest.mark.parametrize("n_segments", [1, 2])
def test_latents_equal_a_plain_loop_over_all_rows(make_world, architecture, n_segments: int) -> None:
    world = make_world(n_segments=n_segments, sae_config=architecture)
    latents, _, summary = run(world, spec_of(world))
    encoded = naive_latents(world)
    n_rows = {split: sum(len(rows) for (_, s), rows in encoded.items() if s == split) for split in world.snapshots}
    assert summary["n_rows_train"] == n_rows["train"]
    assert summary["n_rows_heldout"] == n_rows["heldout"]
    assert summary["n_rows"] == sum(n_rows.values())
    for row in latents.to_pylist():
        per_split = defaultdict(list)
        for (_, split), rows in encoded.items():
            per_split[split] += [float(act[row["latent"]]) for act in rows.values() if act[row["latent"]] > 0]
        values = per_split["train"] + per_split["heldout"]
        assert row["n_fired_train"] == len(per_split["train"])
        assert row["n_fired_heldout"] == len(per_split["heldout"])
        assert row["n_fired"] == len(values) == sum(row["histogram"])
        assert row["frequency"] == pytest.approx(len(values) / sum(n_rows.values()))
        assert row["mean_act"] == pytest.approx(np.mean(values), rel=1e-5)
        assert row["max_act"] == pytest.approx(max(values), rel=1e-5)
        assert row["dense"] == (row["frequency"] > CONFIG.dense_above)
        assert not row["dead"]
        bins = np.histogram(values, HISTOGRAM_EDGES)[0]
        assert np.abs(np.array(row["histogram"]) - bins).sum() <= 2  # a value on an edge may round over it
        assert row["logits_up"] == row["logits_down_bytes"] == []
        assert len(row["neighbours"]) == len(row["neighbour_cosines"]) == 3


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda config: config.architecture)
@pytest.mark.parametrize("n_segments", [1, 2])
def test_windows_hold_the_latent_on_every_token(make_world, architecture, n_segments: int) -> None:
    world = make_world(n_segments=n_segments, sae_config=architecture)
    _, examples, _ = run(world, spec_of(world))
    encoded = naive_latents(world)
    names = [read_document_names(world.storage, ref) for ref in world.tokens]
    assert examples.num_rows > 50
    for row in examples.to_pylist():
        place = (row["segment"], row["split"])
        contexts = world.contexts[place]
        index = row["seq"] - int(contexts.seq[0])
        start = row["pos"] - row["peak"]
        wanted = [p for p in range(row["pos"] - 3, row["pos"] + 2) if 0 <= p < contexts.tokens.shape[1]]
        wanted = [p for p in wanted if contexts.docs[index, p] != PADDING]
        assert list(range(start, start + len(row["token_ids"]))) == wanted
        assert row["token_ids"] == contexts.tokens[index, wanted].tolist()
        assert len(row["token_bytes"]) == len(wanted)
        none = np.zeros(8)
        expected = [encoded[place].get((row["seq"], p), none)[row["latent"]] for p in wanted]
        np.testing.assert_allclose(row["activations"], expected, rtol=1e-5, atol=1e-6)
        assert row["activations"][row["peak"]] == row["value"]
        assert row["doc"] == contexts.docs[index, row["pos"]]
        assert row["doc_name"] == names[row["segment"]][row["doc"]]


def test_top_examples_are_the_strongest_of_each_document(make_world) -> None:
    world = make_world(n_segments=2)
    _, examples, _ = run(world, spec_of(world))
    best: dict[int, dict[tuple[int, int], float]] = defaultdict(dict)
    for (segment, split), rows in naive_latents(world).items():
        contexts = world.contexts[segment, split]
        for (seq, pos), act in rows.items():
            doc = (segment, int(contexts.docs[seq - contexts.seq[0], pos]))
            for latent in np.flatnonzero(act > 0):
                best[latent][doc] = max(best[latent].get(doc, 0), float(act[latent]))
    for latent, documents in best.items():
        top = [row for row in examples.to_pylist() if (row["latent"], row["group"]) == (latent, "top")]
        expected = sorted(documents.items(), key=lambda item: -item[1])[:3]
        assert [(row["segment"], row["doc"]) for row in top] == [doc for doc, _ in expected]
        np.testing.assert_allclose([row["value"] for row in top], [value for _, value in expected], rtol=1e-5)
        assert [row["rank"] for row in top] == list(range(len(top)))


def test_another_division_into_parts_gives_the_same_tables(make_world, tmp_path: Path) -> None:
    tables = []
    for contexts_per_part in (2, 100):
        world = make_world(contexts_per_part=contexts_per_part, root=str(tmp_path / str(contexts_per_part)))
        tables.append(run(world, spec_of(world))[:2])
    (few_latents, few_examples), (many_latents, many_examples) = tables
    for name in ("n_fired", "n_fired_train", "n_fired_heldout", "histogram", "dead", "dense", "neighbours"):
        assert few_latents[name].to_pylist() == many_latents[name].to_pylist(), name
    for name in ("mean_act", "max_act", "q25", "q50", "q75"):
        np.testing.assert_allclose(few_latents[name].to_numpy(), many_latents[name].to_numpy(), rtol=1e-5)
    for name in ("latent", "group", "rank", "seq", "pos", "split", "doc", "doc_name", "peak", "token_ids"):
        assert few_examples[name].to_pylist() == many_examples[name].to_pylist(), name


def test_same_spec_gives_the_same_bytes(make_world, tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        world = make_world(root=str(tmp_path / name))
        spec = spec_of(world)
        run(world, spec)
        record = records.require_record(world.storage, spec.ref)
        parts = [records.require_record(world.storage, spec.ref, part).content for part in range(3)]
        contents.append((record.content, parts, record.metrics))
    assert contents[0] == contents[1]


def test_a_model_adds_the_bytes_of_tokens_and_the_direct_path_to_the_logits(
    make_world, pin_one_layer_model, tmp_path: Path
) -> None:
    subject = pin_one_layer_model(Storage(str(tmp_path / "store")))
    world = make_world(d_in=12, vocab_size=257, subject=subject, root=str(tmp_path / "store"))
    latents, examples, summary = run(world, spec_of(world, subject=subject))
    assert summary["vocab_size"] == 257
    assert summary["logits"].startswith("direct path")
    model = load_subject(world.storage, subject)
    for row in examples.to_pylist()[:20]:
        assert row["token_bytes"] == token_bytes(model.tokenizer, row["token_ids"])
    matrix = direct_logit_matrix(model.model, HOOK_POINT)
    effects = world.sae.W_dec.detach() @ matrix
    effects -= effects.mean(dim=1, keepdim=True)
    for row, effect in zip(latents.to_pylist(), effects, strict=True):
        best = effect.topk(10)
        np.testing.assert_allclose(row["logits_up_values"], best.values, rtol=1e-4)
        assert row["logits_up"] == best.indices.tolist()
        assert row["logits_up_bytes"] == token_bytes(model.tokenizer, row["logits_up"])
        np.testing.assert_allclose(row["logits_down_values"], effect.topk(10, largest=False).values, rtol=1e-4)


def test_a_store_in_memory_gives_the_same_bytes(make_world, tmp_path: Path) -> None:
    contents = []
    for root in (str(tmp_path / "disk"), "memory://statistics"):
        world = make_world(root=root)
        spec = spec_of(world)
        for part in range(count_parts(world.storage, spec)):
            statistics_of_part(world.storage, spec, part)
        contents.append(merge_statistics(world.storage, spec).content)
    world.storage.fs.store.clear()
    assert contents[0] == contents[1]


def test_held_out_parts_come_first(make_world) -> None:
    world = make_world()
    spec = spec_of(world)
    splits = [statistics_of_part(world.storage, spec, part).metrics["split"] for part in range(5)]
    assert count_parts(world.storage, spec) == 5
    assert splits == ["heldout", "heldout", "train", "train", "train"]


def test_merge_names_the_missing_part(make_world) -> None:
    world = make_world()
    spec = spec_of(world)
    statistics_of_part(world.storage, spec, 0)
    with pytest.raises(StoreError, match="part-00001"):
        merge_statistics(world.storage, spec)


def test_given_activations_show_their_labels(make_given_world) -> None:
    values = np.random.default_rng(0).standard_normal((30, 4))
    labels = tuple(f"thing {i}" for i in range(30))
    world = make_given_world(values, labels)
    latents, examples, summary = run(world, spec_of(world))
    assert summary["n_rows"] == summary["n_rows_train"] == 30
    assert summary["vocab_size"] is None
    assert not summary["has_text"]
    assert "given" in summary["no_logits_because"]
    encoded = naive_latents(world)[0, "train"]
    assert sum(latents["n_fired"].to_pylist()) == sum(int((act > 0).sum()) for act in encoded.values())
    for row in examples.to_pylist():
        assert row["token_bytes"] == [f"thing {row['seq']}".encode()]
        assert row["activations"] == [row["value"]]
        assert row["value"] == pytest.approx(encoded[row["seq"], 0][row["latent"]], rel=1e-5)
        assert row["peak"] == 0
        assert row["doc"] == row["seq"]


def test_unlabelled_rows_are_shown_by_number(make_given_world) -> None:
    world = make_given_world(np.random.default_rng(0).standard_normal((10, 4)))
    _, examples, _ = run(world, spec_of(world))
    row = examples.to_pylist()[0]
    assert row["token_bytes"] == [f"row {row['seq']}".encode()]


def test_dead_latents_have_no_figures_and_no_examples(make_given_world) -> None:
    world = make_given_world(np.ones((12, 4)), sae_config=TopKConfig(d_sae=8, k=1))
    latents, examples, _ = run(world, spec_of(world))
    rows = latents.to_pylist()
    assert sum(row["dead"] for row in rows) == 7
    for row in rows:
        if row["dead"]:
            assert np.isnan([row["mean_act"], row["max_act"], row["q25"], row["q75"]]).all()
            assert row["n_fired"] == 0
        else:
            assert row["dense"]
    assert {row["latent"] for row in examples.to_pylist()} == {row["latent"] for row in rows if not row["dead"]}
