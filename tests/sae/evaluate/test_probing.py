"""Sparse probes: planted labels are found, absent ones are not, and figures equal their definitions."""

import numpy as np
import pytest

from sae.evaluate.interpretability import UnitFirings
from sae.evaluate.probing import (
    DENSE,
    DenseColumns,
    Score,
    SparseColumns,
    Task,
    fit_logistic,
    letter_task,
    run_probes,
    scores_table,
    split_contexts,
    summarize,
)

N = 3000


@pytest.fixture
def label() -> np.ndarray:
    return np.random.default_rng(0).choice(4, N, p=[0.6, 0.25, 0.14, 0.01])


@pytest.fixture
def fitted() -> np.ndarray:
    return split_contexts(np.arange(N) // 10, 0)


def firings_of(acts: np.ndarray) -> UnitFirings:
    row, unit = np.nonzero(acts)
    return UnitFirings(unit.astype(np.int32), row.astype(np.int32), acts[row, unit].astype(np.float32))


def by_key(scores: list[Score]) -> dict[tuple[str, str, int | None], Score]:
    return {(score.name, score.units_of, score.k): score for score in scores}


def test_a_planted_unit_is_chosen_and_tells_its_class_perfectly(label: np.ndarray, fitted: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    acts = rng.random((N, 12)) * (rng.random((N, 12)) < 0.2)
    acts[:, 7] = np.where(label == 2, 0.5 + 3 * rng.random(N), 0)
    noise = rng.standard_normal((N, 5)).astype(np.float32)
    columns = {"latents": SparseColumns(firings_of(acts), N, 12), "neurons": DenseColumns(noise)}
    scores = by_key(run_probes(Task("planted", ("a", "b", "c", "rare"), label), columns, fitted))
    assert {name for name, _, _ in scores} == {"a", "b", "c"}, "too few rows of the fourth to split"
    found = scores["c", "latents", 1]
    assert found.units == [7]
    assert found.accuracy == found.balanced_accuracy == found.f1 == 1
    for kind, k in (("neurons", 1), ("neurons", 5), (DENSE, None)):
        assert scores["c", kind, k].balanced_accuracy == pytest.approx(0.5, abs=0.08)
    assert scores["a", "latents", 5].n_rows == (~fitted).sum()


def test_five_units_tell_what_no_single_one_does(fitted: np.ndarray) -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((N, 8)).astype(np.float32)
    label = (x[:, :3].sum(axis=1) > 0).astype(np.int64)
    scores = by_key(run_probes(Task("sum", ("low", "high"), label), {"neurons": DenseColumns(x)}, fitted))
    assert scores["high", "neurons", 1].accuracy < 0.8
    assert scores["high", "neurons", 5].accuracy > 0.98
    assert set(scores["high", "neurons", 5].units) >= {0, 1, 2}
    assert scores["high", DENSE, None].accuracy > 0.97


def test_the_choice_is_the_largest_difference_of_means_on_the_fitted_half(
    label: np.ndarray, fitted: np.ndarray
) -> None:
    x = np.random.default_rng(3).standard_normal((N, 9)).astype(np.float32)
    scores = run_probes(Task("any", ("a", "b", "c", "d"), label), {"neurons": DenseColumns(x)}, fitted)
    for score in scores:
        if score.k is None:
            continue
        c = "abcd".index(score.name)
        difference = np.abs(x[fitted & (label == c)].mean(axis=0) - x[fitted & (label != c)].mean(axis=0))
        assert score.units == np.argsort(-difference)[: score.k].tolist()


def test_sparse_and_dense_columns_are_the_same_numbers() -> None:
    rng = np.random.default_rng(4)
    acts = (rng.random((40, 6)) * (rng.random((40, 6)) < 0.3)).astype(np.float32)
    label = rng.integers(-1, 3, 30)
    sparse, dense = SparseColumns(firings_of(acts), 30, 6), DenseColumns(acts[:30])
    assert sparse.shape == dense.shape
    np.testing.assert_allclose(sparse.class_sums(label, 3), dense.class_sums(label, 3), rtol=1e-6)
    units = np.array([4, 0, 5])
    np.testing.assert_array_equal(sparse.columns(units), dense.columns(units))


def test_logistic_fit_is_where_the_gradient_vanishes() -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((400, 3)) * [1, 10, 0.1] + [0, 5, 1]
    positive = x[:, 0] + 0.1 * x[:, 1] + rng.standard_normal(400) > 1
    probe = fit_logistic(x, positive)
    weight = np.where(positive, 0.5 / positive.sum(), 0.5 / (~positive).sum())
    scale = x.std(axis=0)

    def loss(w: np.ndarray) -> float:
        margin = np.where(positive, 1, -1) * (x @ w[1:] + w[0])
        return float(weight @ np.log1p(np.exp(-margin)) + 1e-4 * ((w[1:] * scale) ** 2).sum() / 2)

    for i in range(4):
        step = np.zeros(4)
        step[i] = 1e-3 / ([1, *scale][i])
        assert loss(probe) < min(loss(probe + step), loss(probe - step))


def test_logistic_fit_of_separable_or_constant_columns_is_finite() -> None:
    positive = np.arange(100) < 10
    perfect = fit_logistic(np.stack([positive.astype(float), np.zeros(100)], axis=1), positive)
    assert np.isfinite(perfect).all()
    assert ((positive * perfect[1] + perfect[0] > 0) == positive).all()


def test_contexts_are_never_divided() -> None:
    context = np.random.default_rng(6).integers(0, 40, 1000)
    fitted = split_contexts(context, 0)
    assert not set(context[fitted]) & set(context[~fitted])
    assert len(set(context[fitted])) == 20
    assert (split_contexts(context, 1) != fitted).any()


def test_letters_are_those_of_tokens_that_start_with_one() -> None:
    texts = {0: b" Self", 1: b"\n\t", 2: b"self", 3: b"9a", 4: "é".encode(), 5: b"\xff", 6: b"  zip"}
    task = letter_task(np.array([6, 0, 1, 2, 3, 4, 5, 0]), texts)
    names = [task.classes[c] if c >= 0 else None for c in task.label]
    assert names == ["z", "s", None, "s", None, None, None, "s"]


def test_rows_outside_the_task_count_nowhere(label: np.ndarray, fitted: np.ndarray) -> None:
    x = np.random.default_rng(7).standard_normal((N, 4)).astype(np.float32)
    outside = np.arange(N) % 3 == 0
    # The rows outside would give class 1 away.
    x[outside, 2] = 50 * (label[outside] == 1)
    task = Task("some", ("a", "b", "c", "d"), np.where(outside, -1, label))
    scores = by_key(run_probes(task, {"neurons": DenseColumns(x)}, fitted))
    assert scores["b", "neurons", 1].n_rows == (~fitted & ~outside).sum()
    assert scores["b", DENSE, None].balanced_accuracy == pytest.approx(0.5, abs=0.08)


def test_figures_follow_their_definitions_and_are_averaged_over_classes(label: np.ndarray, fitted: np.ndarray) -> None:
    x = np.random.default_rng(8).standard_normal((N, 3)).astype(np.float32)
    x[:, 0] += label == 1
    scores = run_probes(Task("shift", ("a", "b", "c", "d"), label), {"neurons": DenseColumns(x)}, fitted)
    score = by_key(scores)["b", "neurons", 1]
    assert score.units == [0]
    probe = fit_logistic(x[fitted, :1].astype(np.float64), label[fitted] == 1)
    answer, truth = x[~fitted, 0] * probe[1] + probe[0] > 0, label[~fitted] == 1
    hits = (answer & truth).sum()
    assert score.accuracy == pytest.approx((answer == truth).mean())
    assert score.balanced_accuracy == pytest.approx(
        (hits / truth.sum() + (~answer & ~truth).sum() / (~truth).sum()) / 2
    )
    precision, recall = hits / answer.sum(), hits / truth.sum()
    assert score.f1 == pytest.approx(2 * precision * recall / (precision + recall))
    rows = summarize(scores)
    assert [(row["units_of"], row["k"], row["n_classes"]) for row in rows] == [
        ("neurons", 1, 3),
        ("neurons", 5, 3),
        (DENSE, None, 3),
    ] or rows[1]["k"] == 3, "k is at most the number of units"
    ones = [s.f1 for s in scores if s.k == 1]
    assert rows[0]["f1"] == pytest.approx(np.mean(ones))
    table = scores_table(scores)
    assert table.num_rows == len(scores)
    assert table["k"].null_count == 3
