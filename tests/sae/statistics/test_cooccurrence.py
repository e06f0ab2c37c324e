"""Precision, recall and lift against counting by hand; rules made of them."""

import numpy as np
import pytest

from sae.statistics import cooccurrence
from sae.statistics.cooccurrence import Association, Cooccurrence, Pairs, count_pairs
from sae.statistics.rules import best_rules


def counted(seed: int = 0) -> tuple[Cooccurrence, np.ndarray, np.ndarray]:
    """Counts over 400 random rows: the counter, the rows' codes (-1: none) and which latents fire. [400], [400, 6]"""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-1, 5, 400)
    fires = rng.random((400, 6)) < np.array([0.3, 0.1, 0.02, 0, 0.5, 0.05])
    fires[:, 5] |= codes == 3
    counter = Cooccurrence(6, 5)
    for rows in np.array_split(np.arange(400), 3):
        row, latent = np.nonzero(fires[rows])
        counter.add(codes[rows], row, latent)
    return counter, codes, fires


def test_pairs_equal_counting_by_hand() -> None:
    counter, codes, fires = counted()
    n_fired = fires.sum(axis=0)
    found = counter.associate(counter.top(2), n_fired, n_fired, len(codes))
    for latent in range(6):
        by_hand = sorted(((int((fires[:, latent] & (codes == c)).sum()), -c) for c in range(5)), reverse=True)[:2]
        by_hand = [(-c, n) for n, c in by_hand if n]
        mine = found.take(found.pairs.latent == latent)
        assert list(zip(mine.pairs.code.tolist(), mine.pairs.n_firings.tolist(), strict=True)) == by_hand
        for (code, n), precision, recall, lift in zip(by_hand, mine.precision, mine.recall, mine.lift, strict=True):
            assert precision == pytest.approx(n / n_fired[latent])
            assert recall == pytest.approx(n / (codes == code).sum())
            assert lift == pytest.approx((n / n_fired[latent]) / ((codes == code).sum() / len(codes)))


def test_a_sample_of_all_firings_gives_the_same_pairs() -> None:
    counter, codes, fires = counted()
    row, latent = np.nonzero(fires)
    n_fired = fires.sum(axis=0)
    exact = counter.associate(counter.top(2), n_fired, n_fired, len(codes))
    sampled = counter.associate(count_pairs(latent, codes[row], 5, 2), n_fired, n_fired, len(codes))
    for mine, theirs in zip([*exact.pairs, *exact[1:]], [*sampled.pairs, *sampled[1:]], strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_too_many_pairs_are_not_counted_but_rows_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cooccurrence, "MAX_PAIRS", 29)
    monkeypatch.setattr(cooccurrence, "FEW_CODES", 4)
    counter, codes, _ = counted()
    assert not counter.exact
    assert counter.counts.size == 0
    assert counter.rows.tolist() == [(codes == code).sum() for code in range(5)]


def association(rows: list[tuple[int, int, float, float, float]]) -> Association:
    """(latent, code, precision, recall, lift) of each pair."""
    latent, code, precision, recall, lift = (np.array(column) for column in zip(*rows, strict=True))
    return Association(Pairs(latent, code, np.ones(len(rows), np.int64)), precision, recall, lift)


def test_the_rule_has_the_best_f1_of_those_that_qualify() -> None:
    tokens = association(
        [(0, 7, 0.9, 0.8, 50.0), (1, 7, 0.45, 0.9, 50.0), (3, 2, 0.6, 0.1, 1.5), (4, 1, 0.5, 0.5, 2.0)]
    )
    labels = association([(0, 1, 1.0, 0.01, 3.0), (1, 1, 0.9, 0.02, 3.0), (4, 0, 0.5, 0.5, 2.0)])
    rules = best_rules([tokens, labels], 5)
    assert rules.kind.tolist() == [0, 1, -1, -1, 0]  # 2: nothing known, 3: no lift, 4: a tie
    assert rules.code[[0, 1]].tolist() == [7, 1]
    assert rules.precision[:2].tolist() == [0.9, 0.9]
    assert np.isnan(rules.recall[2:4]).all()
