"""Rows dealt to buckets, against dealing them one by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.errors import ConfigError
from sae.extract.deal import MAX_BUCKETS, Deal, count_buckets

part_rows = st.lists(st.integers(0, 40), min_size=1, max_size=8)


@given(part_rows, st.integers(1, 12), st.integers(1, 9), st.randoms(use_true_random=False))
def test_rows_lie_where_dealing_them_one_by_one_puts_them(part_rows, n_buckets, row_group_rows, random) -> None:
    next_bucket, held = random.randrange(n_buckets), [0] * n_buckets
    deal = Deal(part_rows, n_buckets, row_group_rows, next_bucket)
    for part, n_rows in enumerate(part_rows):
        order = list(range(n_rows))
        random.shuffle(order)
        bucket_of = {}
        for row in np.argsort(order).tolist():  # the row that is dealt first comes first
            bucket_of[row] = next_bucket
            held[next_bucket] += 1
            next_bucket = (next_bucket + 1) % n_buckets
        destination = deal.destination(part, np.array(order, np.int64))
        assert sorted(destination.tolist()) == list(range(n_rows))
        sizes = deal.row_groups(part)
        assert sum(sizes) == n_rows
        assert all(0 < size <= row_group_rows for size in sizes)
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
        seen = []
        for bucket in range(n_buckets):
            groups = deal.groups_of(part, bucket)
            seen += groups
            places = {place for group in groups for place in range(starts[group], starts[group + 1])}
            assert {row for row, each in bucket_of.items() if each == bucket} == {
                row for row in range(n_rows) if int(destination[row]) in places
            }
        assert sorted(seen) == list(range(len(sizes)))
    assert held == [deal.bucket_rows(bucket) for bucket in range(n_buckets)]


@given(part_rows, st.integers(1, 12))
def test_every_bucket_has_an_equal_share_of_every_part_and_of_the_whole(part_rows, n_buckets) -> None:
    deal = Deal(part_rows, n_buckets, 10**6, n_buckets // 2)
    for part in range(len(part_rows)):
        sizes = deal.row_groups(part)
        pieces = [sum(sizes[group] for group in deal.groups_of(part, bucket)) for bucket in range(n_buckets)]
        assert max(pieces) - min(pieces) <= 1
    totals = [deal.bucket_rows(bucket) for bucket in range(n_buckets)]
    assert sum(totals) == sum(part_rows)
    assert max(totals) - min(totals) <= 1


@given(st.integers(1, 4000), st.integers(1, 100), st.integers(1, 2000))
def test_a_bucket_fits_its_part_and_none_is_empty(n_rows, row_bytes, part_bytes) -> None:
    n_buckets = count_buckets(n_rows, row_bytes, part_bytes)
    deal = Deal([n_rows], n_buckets, 1, 0)
    assert deal.bucket_rows(0) == 1 or deal.bucket_rows(0) * row_bytes <= part_bytes
    assert deal.bucket_rows(n_buckets - 1) > 0


def test_more_pieces_than_can_be_named_are_refused_with_the_size_that_would_do() -> None:
    with pytest.raises(ConfigError, match=r"10,000 parts.*up to 4,096.*Raise it to 192;"):
        count_buckets(10_000, 64, 127)
    assert count_buckets(10_000, 64, 192) <= MAX_BUCKETS
