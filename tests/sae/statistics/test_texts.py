"""What statistics say about text, on a small store, against plain loops over all its rows."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sae.architectures.config import StandardConfig
from sae.statistics import cooccurrence, tree
from sae.statistics.config import StatisticsConfig, StatisticsSpec
from sae.statistics.passages import N_LATENTS
from sae.statistics.statistics import count_parts, merge_parts, merge_statistics, statistics_of_part
from sae.statistics.tree import merge_levels
from sae.store.artefacts import records
from sae.store.text.contexts import PADDING

HOOK_POINT = "gpt_neox.layers.0.mlp.act"
CONFIG = StatisticsConfig(n_top=3, n_samples=400, n_per_group=2, context_tokens=5, n_sampled_rows=10_000, n_passages=4)
Place = tuple[int, str, int, int]
"""Segment, split, context and position."""


def run(world, config: StatisticsConfig = CONFIG) -> tuple[dict[str, pa.Table], dict]:
    spec = StatisticsSpec(
        config=config,
        sae=world.sae_ref,
        snapshots=world.snapshots,
        tokens=world.tokens,
        hook_point=HOOK_POINT,
        seed=0,
    )
    n_parts = count_parts(world.storage, spec)
    for part in range(n_parts):
        statistics_of_part(world.storage, spec, part)
    for level in merge_levels(n_parts):
        for node in level:
            merge_parts(world.storage, spec, node.part)
    record = merge_statistics(world.storage, spec)
    with records.local_files(world.storage, record) as folder:
        tables = {path.stem: pq.read_table(path) for path in folder.glob("*.parquet")}
        return tables, json.loads((folder / "statistics.json").read_text())


def all_rows(world) -> dict[Place, tuple[np.ndarray, int, int | None, int]]:
    """Every stored row: its latents [d_sae], token, previous token and syntax label."""
    found = {}
    with torch.no_grad():
        for (segment, split), rows in world.rows.items():
            contexts = world.contexts[segment, split]
            for (seq, pos), x in rows.items():
                index = seq - int(contexts.seq[0])
                previous = int(contexts.tokens[index, pos - 1]) if pos else None
                latents = world.sae.encode(torch.from_numpy(x)[None])[0].numpy()
                found[segment, split, seq, pos] = (
                    latents,
                    int(contexts.tokens[index, pos]),
                    previous,
                    int(contexts.labels[index, pos]),
                )
    return found


@pytest.mark.parametrize("counted", [True, False], ids=["all-firings", "sample-of-all"])
def test_associations_equal_a_plain_loop(make_world, monkeypatch: pytest.MonkeyPatch, counted: bool) -> None:
    if not counted:
        monkeypatch.setattr(cooccurrence, "MAX_PAIRS", 1)
        monkeypatch.setattr(cooccurrence, "FEW_CODES", 19)
    world = make_world(n_segments=2)
    tables, summary = run(world)
    assert (summary["association"] == "counted over all firings") == counted
    rows = all_rows(world).values()
    for column, prefix, place in (("tokens", "token", 1), ("previous_tokens", "previous", 2)):
        carried = Counter(row[place] for row in rows)
        for latent in tables["latents"].to_pylist():
            fired = Counter(row[place] for row in rows if row[0][latent["latent"]] > 0)
            fired.pop(None, None)
            expected = sorted(fired.items(), key=lambda item: (-item[1], item[0]))[:5]
            assert list(zip(latent[column], latent[f"{prefix}_counts"], strict=True)) == expected
            for (token, n), precision, recall, lift in zip(
                expected, *(latent[f"{prefix}_{name}"] for name in ("precision", "recall", "lift")), strict=True
            ):
                assert precision == pytest.approx(n / latent["n_fired"], rel=1e-5)
                assert recall == pytest.approx(n / carried[token], rel=1e-5)
                assert lift == pytest.approx(precision * len(rows) / carried[token], rel=1e-5)
    labels = ["other", "name", "keyword"]
    carried = Counter(row[3] for row in rows)
    for latent in tables["latents"].to_pylist():
        fired = Counter(row[3] for row in rows if row[0][latent["latent"]] > 0)
        assert dict(zip(latent["syntax"], latent["syntax_counts"], strict=True)) == {
            labels[label]: n for label, n in fired.items()
        }
        np.testing.assert_allclose(
            latent["syntax_recall"],
            [fired[labels.index(name)] / carried[labels.index(name)] for name in latent["syntax"]],
        )


def test_positions_are_counted_by_bin(make_world) -> None:
    world = make_world()
    tables, summary = run(world)
    assert summary["position_edges"] == [0, 1, 2, 4, 8, 10]
    places = all_rows(world)
    positions = [pos for _, _, _, pos in places]
    assert summary["position_rows"] == np.histogram(positions, [0, 1, 2, 4, 8, 10])[0].tolist()
    for latent in tables["latents"].to_pylist():
        fired = [place[3] for place, row in places.items() if row[0][latent["latent"]] > 0]
        assert latent["positions"] == np.histogram(fired, [0, 1, 2, 4, 8, 10])[0].tolist()


def test_near_misses_carry_the_top_token_and_are_silent(make_world) -> None:
    world = make_world(n_segments=2, n_train=30)
    tables, _ = run(world)
    places = all_rows(world)
    top = {row["latent"]: row["tokens"][0] for row in tables["latents"].to_pylist() if row["tokens"]}
    misses = [row for row in tables["examples"].to_pylist() if row["group"] == "miss"]
    per_latent = defaultdict(list)
    for row in misses:
        latents, token, _, _ = places[row["segment"], row["split"], row["seq"], row["pos"]]
        assert token == top[row["latent"]] == row["token_ids"][row["peak"]]
        assert latents[row["latent"]] == 0
        assert row["value"] == row["activations"][row["peak"]] == 0
        per_latent[row["latent"]].append((row["segment"], row["seq"], row["pos"]))
    for latent, token in top.items():
        silent = sum(row[1] == token and row[0][latent] == 0 for row in places.values())
        assert len(set(per_latent[latent])) == len(per_latent[latent]) == min(2, silent)


def test_near_misses_show_other_firings_in_their_window(make_world) -> None:
    world = make_world(n_train=30)
    tables, _ = run(world)
    places = all_rows(world)
    n_firing = 0
    for row in tables["examples"].to_pylist():
        if row["group"] != "miss":
            continue
        start = row["pos"] - row["peak"]
        for i, act in enumerate(row["activations"]):
            stored = places.get((row["segment"], row["split"], row["seq"], start + i))
            assert act == pytest.approx(stored[0][row["latent"]] if stored else 0, rel=1e-5)
            n_firing += act > 0
    assert n_firing > 0


def test_sampled_rows_hold_every_firing_latent(make_world) -> None:
    world = make_world(n_segments=2)
    tables, summary = run(world)
    places = all_rows(world)
    assert summary["n_sampled_rows"] == tables["rows"].num_rows == len(places)  # so many were asked for
    for row in tables["rows"].to_pylist():
        latents, token, _, _ = places[row["segment"], row["split"], row["seq"], row["pos"]]
        assert row["token"] == token
        assert sorted(row["latents"]) == np.flatnonzero(latents > 0).tolist()
        np.testing.assert_allclose(row["values"], latents[row["latents"]], rtol=1e-5)


def test_passages_hold_the_strongest_latents_of_every_token(make_world) -> None:
    world = make_world(sae_config=StandardConfig(d_sae=24, l1_coefficient=0))
    passages = run(world)[0]["passages"].to_pylist()
    places = all_rows(world)
    contexts = world.contexts[0, "heldout"]
    assert [row["seq"] for row in passages] == contexts.seq[:4].tolist()
    for row in passages:
        index = row["seq"] - int(contexts.seq[0])
        present = contexts.docs[index] != PADDING
        assert row["split"] == "heldout"
        assert row["token_ids"] == contexts.tokens[index, present].tolist()
        latents = np.array(row["latents"]).reshape(-1, N_LATENTS)
        values = np.array(row["values"]).reshape(-1, N_LATENTS)
        for pos in range(len(row["token_ids"])):
            stored = places.get((0, "heldout", row["seq"], pos))
            act = stored[0] if stored else np.zeros(24)
            n = min(N_LATENTS, int((act > 0).sum()))
            np.testing.assert_allclose(values[pos, :n], np.sort(act)[::-1][:n], rtol=1e-5)
            np.testing.assert_allclose(act[latents[pos, :n]], values[pos, :n], rtol=1e-5)
            assert (latents[pos, n:] == -1).all()


def test_a_tree_of_merges_gives_the_tables_of_one_merge(
    make_world, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = []
    for fan_in in (100, 2):
        monkeypatch.setattr(tree, "FAN_IN", fan_in)
        world = make_world(contexts_per_part=2, root=str(tmp_path / str(fan_in)))
        found.append(run(world)[0])
    for name, table in found[0].items():
        if name != "latents":
            assert table.equals(found[1][name]), name
            continue
        for column in table.column_names:
            if column in ("mean_act", "std_act"):  # sums of float64 in another order
                np.testing.assert_allclose(table[column], found[1][name][column], rtol=1e-6)
            else:
                assert table[column].equals(found[1][name][column]), column


def test_given_activations_have_no_text_statistics(make_given_world) -> None:
    world = make_given_world(np.random.default_rng(0).standard_normal((300, 4)))
    tables, summary = run(world)
    assert "passages" not in tables
    assert not summary["has_syntax"]
    assert "miss" not in tables["examples"]["group"].to_pylist()
    for row in tables["latents"].to_pylist():
        assert row["tokens"] == row["syntax"] == row["positions"] == []
        assert row["rule_kind"] is None
    assert tables["rows"].num_rows == 300
    assert any(row["coactive"] for row in tables["latents"].to_pylist())
