"""Intervals against values worked by hand."""

import math

import pytest

from sae.intervals import mean_interval, wilson_interval


def test_wilson_interval_matches_the_worked_value() -> None:
    # 10 of 100: Wilson (1927) gives .0552 to .1744.
    assert wilson_interval(10, 100) == pytest.approx((0.05523, 0.17437), abs=2e-5)
    assert wilson_interval(0, 0) == (0, 1)


@pytest.mark.parametrize(("n", "quantile"), [(3, 4.3027), (4, 3.1824), (11, 2.2281), (31, 2.0423), (1001, 1.9623)])
def test_interval_of_a_mean_is_student_s(n: int, quantile: float) -> None:
    values = [0.0, 1.0] * (n // 2) + [0.5] * (n % 2)
    low, high = mean_interval(values) or (0, 0)
    mean = sum(values) / n
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    assert (low + high) / 2 == pytest.approx(mean)
    assert (high - low) / 2 == pytest.approx(quantile * deviation / math.sqrt(n), rel=0.008)


def test_two_values_give_no_interval() -> None:
    assert mean_interval([0.2, 0.4]) is None
