"""The evaluation of an SAE over a small store, with a tiny model saved as a Hugging Face folder."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sae.architectures.config import BatchTopKConfig, StandardConfig, TopKConfig
from sae.evaluate.config import Concept, EvaluationConfig, EvaluationSpec, Replicates
from sae.evaluate.evaluate import evaluate_sae
from sae.evaluate.known_answers import rows_in_source_order
from sae.store.artefacts import records
from sae.store.snapshots.snapshot import read_snapshot
from sae.store.storage.filesystem import Storage
from sae.train.config import TrainConfig
from sae.train.in_memory import train_replicates

HOOK_POINT = "gpt_neox.layers.0.mlp.act"


@pytest.fixture
def text_world(make_world, pin_one_layer_model, tmp_path: Path):
    def make(root: str = "store", **kwargs):
        subject = pin_one_layer_model(Storage(str(tmp_path / root)))
        options = {"n_train": 20, "n_heldout": 12, "d_in": 12, "sae_config": TopKConfig(d_sae=16, k=3)}
        world = make_world(**(options | kwargs), subject=subject, root=str(tmp_path / root))
        return world, subject

    return make


def spec_of(world, config: EvaluationConfig, subject: str | None) -> EvaluationSpec:
    return EvaluationSpec(
        config=config,
        sae=world.sae_ref,
        architecture=world.sae.config,
        train_snapshot=world.snapshots["train"],
        heldout_snapshot=world.snapshots.get("heldout"),
        tokens=world.tokens,
        subject=subject,
        hook_point=HOOK_POINT,
        seed=0,
    )


def evaluated(world, spec: EvaluationSpec) -> dict:
    record = evaluate_sae(world.storage, spec, train_replicates=train_replicates)
    with records.local_files(world.storage, record) as folder:
        return {
            path.name: json.loads(path.read_text()) if path.suffix == ".json" else pq.read_table(path).to_pylist()
            for path in sorted(folder.iterdir())
        }


CONFIG = EvaluationConfig(n_contexts=10, n_bootstrap=200, min_fires=5, untrained=None)


@pytest.mark.parametrize("n_segments", [1, 2])
def test_figures_equal_the_definitions_over_all_held_out_rows(text_world, n_segments: int) -> None:
    world, subject = text_world(n_segments=n_segments)
    files = evaluated(world, spec_of(world, CONFIG, subject))
    found = files["evaluation.json"]
    x = np.stack([act for (_, split), rows in world.rows.items() if split == "heldout" for act in rows.values()])
    with torch.no_grad():
        latents = world.sae.encode(torch.from_numpy(x))
        x_hat = world.sae.decode(latents).numpy()
    x = x.astype(np.float64)
    fired = (latents > 0).numpy()
    assert found["split"] == "heldout"
    assert found["n_rows"] == len(x)
    assert found["fvu"] == pytest.approx(((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(), rel=1e-5)
    assert found["fvu_interval"][0] < found["fvu"] < found["fvu_interval"][1]
    assert found["l0"] == pytest.approx(fired.sum() / len(x))
    assert found["l0_rule"] == "topk"
    assert found["n_dead"] == (~fired.any(axis=0)).sum()
    assert found["superposition"] is None
    assert found["shrinkage"]["gamma"] == pytest.approx((x_hat**2).sum() / (x * x_hat).sum(), rel=1e-5)
    centred, centred_hat = x - x.mean(0), x_hat - x.mean(0)
    assert found["shrinkage"]["gamma_centred"] == pytest.approx(
        (centred_hat**2).sum() / (centred * centred_hat).sum(), rel=1e-5
    )
    rows = files["interpretability.parquet"]
    assert [row["n_fires"] for row in rows] == fired.sum(axis=0).tolist()
    neurons = files["neurons.parquet"]
    assert [row["n_fires"] for row in neurons] == (x > 0).sum(axis=0).tolist()
    scored = found["interpretability"]
    assert scored["neurons"]["n_units"] == ((x > 0).sum(axis=0) >= 5).sum()
    passes = [row["mass_passes"] for row in rows if row["n_fires"] >= 5]
    assert scored["latents"]["mass"] == pytest.approx(np.mean(passes))
    assert set(scored["definitions"]) == {"top_tenth", "mass", "top_20"}


def test_error_by_position_and_syntax_equals_a_plain_loop(text_world) -> None:
    world, subject = text_world(n_segments=2)
    found = evaluated(world, spec_of(world, CONFIG, subject))["evaluation.json"]["error_by"]
    assert list(found) == ["position", "syntax_label"]
    rows = {key: act for key, act in world.rows.items() if key[1] == "heldout"}
    mean = np.mean([act for acts in rows.values() for act in acts.values()], axis=0, dtype=np.float64)
    sums: dict[tuple[str, str], np.ndarray] = {}
    for key, acts in rows.items():
        contexts = world.contexts[key]
        for (seq, pos), act in acts.items():
            error = float(((act - world.sae(torch.from_numpy(act)).detach().numpy()) ** 2).sum())
            position = "1" if pos == 1 else "2-3" if pos < 4 else "4-7" if pos < 8 else "8-9"
            label = ("other", "name", "keyword")[contexts.labels[seq - int(contexts.seq[0]), pos]]
            for group in (("position", position), ("syntax_label", label)):
                sums[group] = sums.get(group, 0) + np.array([error, ((act - mean) ** 2).sum(), 1])
    assert sum(len(figures) for figures in found.values()) == len(sums) == 7
    for by, figures in found.items():
        for figure in figures:
            error, deviation, n_rows = sums[by, figure["name"]]
            assert figure["n_rows"] == n_rows
            assert figure["fvu"] == pytest.approx(error / deviation, rel=1e-5)
            assert figure["fvu_interval"][0] < figure["fvu"] < figure["fvu_interval"][1]


def test_controls_stand_beside_every_figure(text_world) -> None:
    world, subject = text_world(n_heldout=60)
    files = evaluated(world, spec_of(world, CONFIG, subject))
    found = files["evaluation.json"]
    names = ["neurons", "pca", "random"]
    assert found["controls"]["k"] == 3
    assert list(found["controls"]["fvu"]) == list(found["ce"]["controls"]) == names
    assert all(0 < value < 1 for value in found["controls"]["fvu"].values())
    assert all(control["kl"] > 0 for control in found["ce"]["controls"].values())
    assert found["ce"]["kl_interval"][0] < found["ce"]["kl"] < found["ce"]["kl_interval"][1]
    assert {"latents", *names} < set(found["interpretability"])
    assert found["interpretability"]["pca"]["n_units"] == 24
    kinds = [*("latents", "neurons", "pca", "random"), "all neurons"]
    syntax = [score for score in found["probing"]["scores"] if score["task"] == "syntax"]
    assert list(dict.fromkeys(score["units_of"] for score in syntax)) == kinds
    table = files["probing.parquet"]
    first = syntax[0]
    own = [r["f1"] for r in table if (r["task"], r["units_of"], r["k"]) == ("syntax", "latents", 1)]
    assert (len(own), np.mean(own)) == (first["n_classes"], pytest.approx(first["f1"]))


def test_no_probes_without_rows_for_them(text_world) -> None:
    world, subject = text_world()
    for n_probe_rows in (0, 40):
        config = EvaluationConfig.model_validate(CONFIG.model_dump() | {"n_probe_rows": n_probe_rows})
        files = evaluated(world, spec_of(world, config, subject))
        assert files["evaluation.json"]["probing"] is None
        assert "probing.parquet" not in files


def test_previous_token_and_label_are_those_of_the_row(text_world) -> None:
    """A unit that fires wherever one token came before is named after that token."""
    world, subject = text_world(n_heldout=60, vocab_size=6)
    spec = spec_of(world, EvaluationConfig(min_fires=1, n_bootstrap=0, n_contexts=4), subject)
    files = evaluated(world, spec)
    contexts = world.contexts[0, "heldout"]
    first = int(contexts.seq[0])
    assert files["evaluation.json"]["fvu_interval"] is None
    kinds = set()
    for unit, row in enumerate(files["neurons.parquet"]):
        rows = [(key, act[unit]) for key, act in world.rows[0, "heldout"].items() if act[unit] > 0]
        total = sum(float(value) for _, value in rows)
        mass = 0.0
        kinds.add(row["mass_kind"])
        for (seq, pos), value in rows:
            if row["mass_kind"] == "label":
                hit = ("other", "name", "keyword")[contexts.labels[seq - first, pos]] == row["mass_name"]
            else:
                at = pos if row["mass_kind"] == "token" else pos - 1
                hit = shown_token(contexts.tokens[seq - first, at]) == row["mass_name"]
            mass += float(value) * hit
        assert row["mass_share"] == pytest.approx(mass / total, rel=1e-4)
    assert kinds & {"token", "previous token"}


def shown_token(token: int) -> str:
    """The fixture's tokenizer: token 0 is special, the others are single bytes in order of their character."""
    from tokenizers import pre_tokenizers

    if token == 0:
        return "<|endoftext|>"
    character = sorted(pre_tokenizers.ByteLevel.alphabet())[token - 1]
    return character if character != "\\" else "\\\\"


def test_cross_entropy_is_measured_on_the_configured_contexts(text_world) -> None:
    world, subject = text_world()
    found = evaluated(world, spec_of(world, CONFIG, subject))["evaluation.json"]["ce"]
    assert found["n_contexts"] == 10
    assert found["increase"] == pytest.approx(found["sae"] - found["clean"])
    assert found["increase_interval"][0] < found["increase"] < found["increase_interval"][1]
    expected = (found["zero"] - found["sae"]) / (found["zero"] - found["clean"])
    assert found["recovered_zero"] == pytest.approx(expected)
    assert found["bigram"] is None, "only the embedded subject's record has baselines"


def test_same_spec_gives_the_same_bytes(text_world) -> None:
    contents = []
    for root in ("a", "b"):
        world, subject = text_world(root=root)
        record = evaluate_sae(world.storage, spec_of(world, CONFIG, subject))
        contents.append((record.content, record.metrics))
    assert contents[0] == contents[1]


CORNERS = np.array([[1.0, 0, 0, 0], [1.1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def test_a_threshold_decides_what_counts_as_positive(make_given_world) -> None:
    world = make_given_world(CORNERS, tuple("abcde"), BatchTopKConfig(d_sae=6, k=1))
    found = evaluated(world, spec_of(world, EvaluationConfig(n_bootstrap=50), None))["evaluation.json"]
    pre_acts = world.sae.pre_acts(torch.from_numpy(CORNERS).float())
    assert 0 < found["l0"] == int((pre_acts > 0.2).sum()) / 5 < int((pre_acts > 0).sum()) / 5
    assert found["l0_rule"] == "threshold"


def test_given_activations_are_judged_on_their_training_rows(make_given_world) -> None:
    world = make_given_world(CORNERS, tuple("abcde"), StandardConfig(d_sae=6, l1_coefficient=0))
    files = evaluated(world, spec_of(world, EvaluationConfig(n_bootstrap=50), None))
    assert list(files) == ["evaluation.json"]
    found = files["evaluation.json"]
    assert (found["split"], found["n_rows"], found["l0_rule"]) == ("train", 5, "relu")
    assert found["ce"] is None
    assert found["interpretability"] is None
    assert found["probing"] is None
    assert found["error_by"] == {}
    assert found["controls"]["fvu"]["neurons"] < 1
    assert found["geometry"]["decoder"]["participation_ratio"] <= 4


def test_rows_of_given_activations_come_back_in_source_order(make_given_world) -> None:
    world = make_given_world(CORNERS)
    x = rows_in_source_order(world.storage, read_snapshot(world.storage, world.snapshots["train"]))
    np.testing.assert_array_equal(x.numpy(), CORNERS.astype(np.float32))


def test_concepts_and_replicates_are_reported(make_given_world) -> None:
    world = make_given_world(CORNERS, tuple("abcde"))
    other = TrainConfig(sae=TopKConfig(d_sae=6, k=1), n_tokens=20, batch_rows=5)
    config = EvaluationConfig(
        n_bootstrap=0,
        concepts=(Concept(name="first", rows=(0, 1)), Concept(name="none", rows=(0, 4))),
        replicates=Replicates(n_seeds=2, others={"topk": other}),
    )
    found = evaluated(world, spec_of(world, config, None))["concepts.json"]
    assert found["labels"] == list("abcde")
    assert [concept["name"] for concept in found["concepts"]] == ["first", "none"]
    assert set(found["replicates"]) == {"this recipe", "topk"}
    assert found["replicates"]["topk"]["n_seeds"] == 2


def test_true_directions_are_compared_where_they_are_known(make_given_world) -> None:
    world = make_given_world(CORNERS, directions=np.eye(4, dtype=np.float32))
    found = evaluated(world, spec_of(world, EvaluationConfig(n_bootstrap=0), None))["evaluation.json"]
    cosines = world.sae.W_dec.detach().numpy().max(axis=0)
    assert found["superposition"]["mmcs"] == pytest.approx(cosines.mean(), rel=1e-5)
