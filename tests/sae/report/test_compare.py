"""Matching of dictionaries against dense naive computations, and against answers known by construction."""

from typing import Any

import numpy as np
import pytest

from sae.report import matching
from sae.report.compare import CLASSES, Comparison, compare_arrays
from sae.report.matching import NONE, Firings, match_decoders, match_firings, phi, rows_together


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def directions(n: int, d: int, seed: int) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(n, d)))


def firings_of(dense: np.ndarray) -> Firings:
    """dense: [rows, latents] bool"""
    return Firings(np.nonzero(dense)[1], np.concatenate([[0], dense.sum(axis=1).cumsum()]), dense.shape[1])


def compared(
    decoders: tuple[np.ndarray, np.ndarray] | None, dense: tuple[np.ndarray, np.ndarray] | None, **live: np.ndarray
) -> Comparison:
    given: Any = decoders or [rows.T for rows in dense or ()]
    alive = tuple(live.get(side, np.ones(len(rows), bool)) for side, rows in zip("ab", given, strict=True))
    firings = (firings_of(dense[0]), firings_of(dense[1])) if dense else None
    return compare_arrays(decoders, firings, alive, np.random.default_rng(0))  # type: ignore[arg-type]


def classes(found: Comparison, side: int) -> list[str]:
    return [CLASSES[int(code)] for code in found.columns[side]["class"]]


@pytest.fixture(params=[matching.BLOCK_ELEMENTS, 300], ids=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "BLOCK_ELEMENTS", request.param)


@pytest.mark.usefixtures("blocks")
def test_best_cosines_equal_those_of_the_whole_matrix() -> None:
    a, b = directions(70, 12, 0), directions(110, 12, 1)
    live_a, live_b = np.arange(70) % 7 > 0, np.arange(110) % 5 > 0
    of_a, of_b = match_decoders(a, b, live_a, live_b)
    cosines = np.where(live_a[:, None] & live_b, a @ b.T, -np.inf)
    for found, whole, live in ((of_a, cosines, live_a), (of_b, cosines.T, live_b)):
        np.testing.assert_array_equal(found.index[live], whole.argmax(axis=1)[live])
        np.testing.assert_allclose(found.score[live], whole.max(axis=1)[live], atol=1e-6)
        assert (found.index[~live] == NONE).all()
        assert np.isnan(found.score[~live]).all()


@pytest.mark.usefixtures("blocks")
def test_best_correlations_equal_those_of_dense_columns() -> None:
    rng = np.random.default_rng(3)
    hidden = rng.random((400, 30)) < 0.1
    a = hidden[:, rng.integers(0, 30, 60)] ^ (rng.random((400, 60)) < 0.02)
    b = hidden[:, rng.integers(0, 30, 90)] ^ (rng.random((400, 90)) < 0.03)
    a[:, :2] = False  # never fires
    a[:, 2] = np.arange(400) < 3  # too rarely
    of_a, of_b = match_firings(firings_of(a), firings_of(b))
    with np.errstate(invalid="ignore", divide="ignore"):
        dense = np.corrcoef(a.T, b.T)[:60, 60:]
    together = a.T.astype(int) @ b.astype(int)
    enough = (a.sum(axis=0)[:, None] >= matching.MIN_FIRINGS) & (b.sum(axis=0) >= matching.MIN_FIRINGS)
    dense = np.where((together > 0) & enough, dense, -np.inf)
    for found, whole in ((of_a, dense), (of_b, dense.T)):
        there = np.isfinite(whole.max(axis=1))
        np.testing.assert_allclose(found.score[there], whole.max(axis=1)[there], atol=1e-12)
        np.testing.assert_allclose(whole[there, found.index[there]], whole.max(axis=1)[there], atol=1e-12)
        assert (found.index[~there] == NONE).all()
    n_a, n_b = rows_together(firings_of(a), firings_of(b), of_a.index, of_b.index)
    known = of_a.index != NONE
    np.testing.assert_array_equal(n_a[known], together[known, of_a.index[known]])
    assert not n_a[~known].any()
    known = of_b.index != NONE
    np.testing.assert_array_equal(n_b[known], together[of_b.index[known], known])


def test_phi_is_the_correlation_worked_by_hand() -> None:
    # 4 of 10, 5 of 10, 3 together: (10 * 3 - 4 * 5) / sqrt(4 * 6 * 5 * 5) = 10 / sqrt(600).
    assert phi(10, np.array(4), np.array(5), np.array(3)) == pytest.approx(10 / 600**0.5)
    assert np.isnan(phi(10, np.array(10), np.array(5), np.array(5)))


def test_a_permuted_copy_is_matched_one_to_one_with_mmcs_1() -> None:
    a = directions(200, 32, 0)
    order = np.random.default_rng(1).permutation(200)
    dense = np.random.default_rng(2).random((500, 200)) < 0.05
    found = compared((a, a[order]), (dense, dense[:, order]))
    assert classes(found, 0) == classes(found, 1) == ["matched"] * 200
    np.testing.assert_array_equal(found.columns[1]["match"], order)
    np.testing.assert_array_equal(found.columns[1]["partner"], order)
    for side in found.about["sides"]:
        assert side["cosine"]["mean"] == pytest.approx(1, abs=1e-5)
        assert side["phi"]["mean"] == pytest.approx(1)
        assert side["cosine"]["above"][0][1] == 1
        assert (side["mutual"], side["agree"]) == (200, 200)
        assert side["cosine"]["chanceMean"] < 0.7


def split_case() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Latent 0 of a is latents 0 and 1 of b, each with half of its firings; the others are themselves."""
    rng = np.random.default_rng(0)
    a = np.eye(40, 64, dtype=np.float32)
    b = np.concatenate([unit(a[:1] + 0.3 * np.eye(1, 64, 50)), unit(a[:1] + 0.3 * np.eye(1, 64, 51)), a[1:]])
    fires = rng.random((600, 40)) < 0.1
    half = rng.random(600) < 0.5
    parts = np.stack([fires[:, 0] & half, fires[:, 0] & ~half], axis=1)
    return (a, b), (fires, np.concatenate([parts, fires[:, 1:]], axis=1))


def test_a_latent_that_became_two_is_a_split_and_backwards_a_merger() -> None:
    decoders, dense = split_case()
    found = compared(decoders, dense)
    assert classes(found, 0) == ["parent"] + ["matched"] * 39
    assert classes(found, 1) == ["part"] * 2 + ["matched"] * 39
    back = compared(decoders[::-1], dense[::-1])
    assert classes(back, 0) == classes(found, 1)
    assert classes(back, 1) == classes(found, 0)
    by_firing = compared(None, dense)
    assert by_firing.about["way"] == "firing"
    assert classes(by_firing, 0) == classes(found, 0)
    assert "cosine" not in by_firing.about["sides"][0]


def test_a_part_that_fires_elsewhere_is_no_part() -> None:
    decoders, dense = split_case()
    dense[1][:, 1] = ~dense[0][:, 0] & (np.random.default_rng(5).random(600) < 0.1)
    found = compared(decoders, dense)
    assert classes(found, 0)[0] == "matched"
    assert classes(found, 1)[:2] == ["matched", "near"]


def test_latents_without_counterpart_and_dead_ones_have_their_own_classes() -> None:
    a = np.eye(6, 32, dtype=np.float32)
    b = np.concatenate([a[:4], np.eye(2, 32, 20, dtype=np.float32)])
    found = compared((a, b), None, a=np.array([True] * 5 + [False]))
    assert classes(found, 0) == ["matched"] * 4 + ["only", "dead"]
    assert classes(found, 1) == ["matched"] * 4 + ["only"] * 2
    assert found.about["sides"][0]["classes"] == {
        "dead": 1,
        "only": 1,
        "near": 0,
        "matched": 4,
        "parent": 0,
        "part": 0,
    }
    assert found.about["rows"] == 0


def test_random_dictionaries_are_at_the_baseline_in_both_ways_of_matching() -> None:
    rng = np.random.default_rng(7)
    dense = rng.random((2000, 300)) < 0.03, rng.random((2000, 500)) < 0.03
    found = compared((directions(300, 48, 0), directions(500, 48, 1)), dense)
    for side in found.about["sides"]:
        for way in ("cosine", "phi"):
            assert side[way]["mean"] == pytest.approx(side[way]["chanceMean"], rel=0.05)
        assert sum(side["cosine"]["chance"]) == pytest.approx(sum(side["cosine"]["histogram"]), abs=1)
    assert set(classes(found, 0)) <= {"only", "near"}


def test_the_classes_of_both_sides_agree_on_random_dictionaries() -> None:
    for seed in range(20):
        a, b = directions(60, 4, seed), directions(90, 4, seed + 100)
        found = compared((a, b), None)
        back = compared((b, a), None)
        assert classes(found, 0) == classes(back, 1)
        assert classes(found, 1) == classes(back, 0)
        for side, other in ((0, 1), (1, 0)):
            column, of_other = found.columns[side], found.columns[other]
            n_linked = np.bincount(of_other["match"][of_other["linked"]], minlength=len(column["match"]))
            for latent, name in enumerate(classes(found, side)):
                assert (name == "parent") == (n_linked[latent] >= 2)
                if name == "matched":
                    assert classes(found, other)[column["match"][latent]] == "matched"
                    assert of_other["match"][column["match"][latent]] == latent
                if name == "part":
                    assert classes(found, other)[column["match"][latent]] == "parent"
