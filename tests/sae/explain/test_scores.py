"""Scores and intervals against values worked by hand."""

import itertools

import pytest

from sae.explain.scores import METRICS, Counts, Score, count_answers, scores
from sae.intervals import wilson_interval


def test_answers_are_counted_by_truth_and_what_has_no_answer_is_in_no_count() -> None:
    pairs = [(True, True), (True, False), (False, True), (False, False), (False, False), (True, None), (False, None)]
    assert count_answers(pairs) == (Counts(1, 1, 2, 1), 2)


def test_scores_match_worked_values() -> None:
    found = scores(Counts(true_positive=6, false_positive=2, true_negative=6, false_negative=2))
    six_of_eight = (0.75, 0.40928, 0.92852)
    assert found["precision"] == pytest.approx(six_of_eight, abs=2e-5)
    assert found["recall"] == pytest.approx(six_of_eight, abs=2e-5)
    assert found["accuracy"] == pytest.approx((0.75, 0.50500, 0.89815), abs=5e-5)
    # (1.959964^2 / 2n terms) of 6 of 10 give [.31267, .83182]; 2J / (1 + J) of those and of .6.
    assert found["f1"] == pytest.approx((0.75, 0.47639, 0.90819), abs=2e-5)
    # .75 -+ sqrt(2) / 2 times the distances .34072 and .17852
    assert found["balanced_accuracy"] == pytest.approx((0.75, 0.50907, 0.87623), abs=2e-5)


def test_scores_that_are_not_defined_are_none() -> None:
    assert scores(Counts()) == dict.fromkeys(METRICS)
    nothing_said_to_match = scores(Counts(true_negative=5, false_negative=5))
    assert nothing_said_to_match["precision"] is None
    assert nothing_said_to_match["f1"] == pytest.approx((0, 0, nothing_said_to_match["f1"].high))  # type: ignore[union-attr]
    only_firing = scores(Counts(true_positive=4, false_negative=1))
    assert only_firing["balanced_accuracy"] is None
    assert only_firing["recall"] is not None


def test_every_interval_holds_its_value_inside_zero_and_one() -> None:
    for counts in itertools.product(range(4), repeat=4):
        for name, score in scores(Counts(*counts)).items():
            assert score is None or 0 <= score.low <= score.value <= score.high <= 1, (counts, name)


def test_all_right_is_not_certain() -> None:
    found = scores(Counts(true_positive=16, true_negative=16))
    assert found["balanced_accuracy"] == Score(1.0, pytest.approx(1 - 0.19361 / 2**0.5, abs=1e-4), 1.0)
    assert wilson_interval(16, 16) == (pytest.approx(0.80639, abs=1e-4), 1.0)
    assert wilson_interval(0, 0) == (0.0, 1.0)
