"""The automatic interpretability score against its definition, written as a plain loop."""

import math
from collections import Counter

import numpy as np
import pytest

from sae.evaluate import interpretability
from sae.evaluate.interpretability import (
    DEFINITIONS,
    KINDS,
    Names,
    UnitFirings,
    concatenate,
    score_units,
    scores_table,
    summarize,
)
from sae.evaluate.rows import NO_TOKEN, RowTexts

N_ROWS, N_UNITS = 400, 12


def texts_of(token: np.ndarray, previous: np.ndarray, label: np.ndarray) -> RowTexts:
    rows = np.arange(len(token))
    return RowTexts(token, previous, label, position=(rows % 10).astype(np.int32), context=rows // 10)


def make_texts(seed: int = 0) -> RowTexts:
    rng = np.random.default_rng(seed)
    token = rng.choice([3, 7, 50_000, 9], N_ROWS, p=[0.6, 0.2, 0.1, 0.1]).astype(np.int32)
    previous = np.where(np.arange(N_ROWS) % 10 == 0, NO_TOKEN, rng.integers(0, 3, N_ROWS)).astype(np.int32)
    label = rng.choice(4, N_ROWS, p=[0.5, 0.3, 0.1, 0.1]).astype(np.uint8)
    return texts_of(token, previous, label)


def make_acts(texts: RowTexts, seed: int = 0) -> np.ndarray:
    """[rows, units]: units that like a token, a previous token or a label, more or less purely; ties included."""
    rng = np.random.default_rng(seed)
    acts = np.zeros((N_ROWS, N_UNITS), np.float32)
    for unit in range(N_UNITS):
        noise = rng.random(N_ROWS) < unit % 4 * 0.1
        liked = [texts.token == 7, texts.previous == 1, texts.label == 2][unit % 3]
        acts[:, unit] = np.where(liked | noise, rng.choice([0.5, 1, 2, 3.25], N_ROWS), 0)
    acts[5:, 11] = 0
    return acts


def firings_of(acts: np.ndarray) -> UnitFirings:
    unit, row = np.nonzero(acts.T > 0)
    return UnitFirings(unit.astype(np.int32), row.astype(np.int32), acts[row, unit])


def naive_winner(act: np.ndarray, texts: RowTexts, name: str) -> tuple[float, bool, set[tuple[str, int]]]:
    """Share, verdict and all equally good candidates of one unit."""
    token_share, label_share = (0.5, 0.8) if name == "mass" else (0.8, 0.9)
    rows = sorted(np.flatnonzero(act > 0), key=lambda row: (-act[row], row))
    n = {"top_tenth": math.ceil(len(rows) / 10), "mass": len(rows), "top_20": 20}[name]
    rows = rows[:n]
    weights = {row: float(act[row]) if name == "mass" else 1.0 for row in rows}
    base_rates = Counter(texts.label.tolist())
    amounts: Counter = Counter()
    for row in rows:
        amounts["token", int(texts.token[row])] += weights[row]
        if texts.previous[row] != NO_TOKEN:
            amounts["previous token", int(texts.previous[row])] += weights[row]
        if base_rates[int(texts.label[row])] / len(texts) < 0.35:
            amounts["label", int(texts.label[row])] += weights[row]
    total = sum(weights.values())
    relative = {
        candidate: amount / total / (label_share if candidate[0] == "label" else token_share)
        for candidate, amount in amounts.items()
    }
    best = max(relative.values())
    tied = {candidate for candidate, value in relative.items() if value > best - 1e-9}
    kind, code = min(tied, key=lambda candidate: KINDS.index(candidate[0]))
    return amounts[kind, code] / total, best >= 1 - 1e-9, tied


@pytest.mark.parametrize("bins", [1 << 23, 10])
def test_scores_equal_the_definition(bins: int, monkeypatch) -> None:
    monkeypatch.setattr(interpretability, "BLOCK_BINS", bins)
    verdicts = Counter()
    for seed in range(5):
        texts = make_texts(seed)
        acts = make_acts(texts, seed)
        scores = score_units(firings_of(acts), N_UNITS, texts)
        assert scores.n_fires.tolist() == (acts > 0).sum(axis=0).tolist()
        for name in DEFINITIONS:
            winners = scores.winners[name]
            for unit in range(N_UNITS):
                if not (acts[:, unit] > 0).any():
                    continue
                share, passes, tied = naive_winner(acts[:, unit], texts, name)
                assert winners.share[unit] == pytest.approx(share)
                assert winners.passes[unit] == passes
                assert (KINDS[winners.kind[unit]], winners.code[unit]) in tied
                verdicts[name, passes] += 1
    assert min(verdicts.values()) >= 3, "the cases decide both ways"
    assert len(verdicts) == 6


def test_units_may_be_scored_in_runs() -> None:
    texts = make_texts()
    acts = make_acts(texts)
    whole = score_units(firings_of(acts), N_UNITS, texts)
    halves = concatenate([score_units(firings_of(acts[:, units]), 6, texts) for units in (slice(6), slice(6, 12))])
    np.testing.assert_array_equal(halves.n_fires, whole.n_fires)
    for name in DEFINITIONS:
        for a, b in zip(halves.winners[name], whole.winners[name], strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_label_on_most_rows_explains_nothing() -> None:
    texts = texts_of(
        np.arange(100, dtype=np.int32), np.full(100, NO_TOKEN, np.int32), np.repeat([0, 1], [60, 40]).astype(np.uint8)
    )
    acts = np.zeros((100, 1), np.float32)
    acts[:60] = 1
    scores = score_units(firings_of(acts), 1, texts)
    assert not any(scores.winners[name].passes[0] for name in DEFINITIONS)


def test_share_is_over_units_that_fire_often_enough() -> None:
    texts = make_texts()
    scores = score_units(firings_of(make_acts(texts)), N_UNITS, texts)
    summary = summarize(scores, min_fires=20)
    qualified = scores.n_fires >= 20
    assert 0 < qualified.sum() < N_UNITS
    assert summary["n_units"] == qualified.sum()
    for name in DEFINITIONS:
        assert summary[name] == pytest.approx(scores.winners[name].passes[qualified].mean())
    assert summarize(scores, min_fires=10_000) == {"n_units": 0, "top_tenth": None, "mass": None, "top_20": None}


def test_table_names_winners_and_leaves_rare_units_out() -> None:
    texts = make_texts()
    scores = score_units(firings_of(make_acts(texts)), N_UNITS, texts)
    names = Names(lambda ids: [f"<{i}>" for i in ids], ["a", "b", "c", "d"])
    rows = scores_table(scores, 20, names).to_pylist()
    assert [row["unit"] for row in rows] == list(range(N_UNITS))
    assert (rows[0]["mass_kind"], rows[0]["mass_name"], rows[0]["mass_passes"]) == ("token", "<7>", True)
    assert (rows[4]["mass_kind"], rows[4]["mass_name"]) == ("previous token", "<1>")
    assert (rows[8]["top_20_kind"], rows[8]["top_20_name"]) == ("label", "c")
    rare = rows[11]
    assert rare["n_fires"] < 20
    assert all(value is None for key, value in rare.items() if key not in ("unit", "n_fires"))


def test_definitions_state_their_thresholds() -> None:
    assert "80%" in DEFINITIONS["top_tenth"].describe()
    assert "strongest 10%" in DEFINITIONS["top_tenth"].describe()
    assert "50%" in DEFINITIONS["mass"].describe()
    assert "20 strongest" in DEFINITIONS["top_20"].describe()
