"""Counts and sums of records add up to those of all their rows."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.store.snapshots.moments import Sums, decode_vector, encode_vector, merge_sums

numbers = st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=40)


@given(numbers)
def test_sums_are_as_good_as_exact(values: list[float]) -> None:
    merged = merge_sums({"sum_sq": value, "sum": encode_vector(np.array([value, -value]))} for value in values)
    exact = sum(map(Fraction, values))
    bound = 2.0**-52 * abs(float(exact)) + (len(values) * 2.0**-52) ** 2 * math.fsum(map(abs, values))
    assert abs(Fraction(merged["sum_sq"]) - exact) <= Fraction(bound)
    assert decode_vector(merged["sum"]).tolist() == [merged["sum_sq"], -merged["sum_sq"]]


def test_what_plain_addition_loses_is_kept() -> None:
    values = [1e16, 1.0, -1e16, 1.0, 3.0]
    assert sum(values) != 5.0
    assert merge_sums({"sum_sq": value} for value in values) == {"sum_sq": 5.0}


def test_merging_in_groups_merges_all() -> None:
    rng = np.random.default_rng(0)
    records = [{"sum": encode_vector(rng.standard_normal(4)), "n_rows": int(rng.integers(9))} for _ in range(12)]
    groups = [merge_sums(records[start : start + 5]) for start in range(0, 12, 5)]
    once, twice = merge_sums(records), merge_sums(groups)
    assert once["n_rows"] == twice["n_rows"] == sum(record["n_rows"] for record in records)
    assert decode_vector(once["sum"]) == pytest.approx(decode_vector(twice["sum"]), rel=1e-14)


def test_a_sum_that_some_rows_are_not_in_is_left_out_and_a_missing_count_is_none() -> None:
    old, new = (
        {"sum": encode_vector(np.ones(2)), "n_rows": 2},
        {"sum": encode_vector(np.ones(2)), "sum_4": 1.0, "n_x": 3},
    )
    for records in ((old, new), (new, old)):
        assert merge_sums(records) == {"sum": encode_vector(np.full(2, 2.0)), "n_rows": 2, "n_x": 3}
    assert Sums().merged() == {}


def test_what_is_neither_count_nor_sum_is_not_merged() -> None:
    assert merge_sums([{"d_in": 3, "layout": {}, "n_what": "text", "n_rows": 1}]) == {"n_rows": 1}
