"""Error by position and by token class against plain loops over the rows."""

import numpy as np
import pytest

from sae.evaluate.breakdown import (
    GroupedErrors,
    Grouping,
    by_frequency,
    by_label,
    by_position,
    position_edges,
    position_names,
)
from sae.evaluate.rows import RowTexts


def texts(token: list[int], label: list[int] | None = None, position: list[int] | None = None) -> RowTexts:
    n = len(token)
    return RowTexts(
        token=np.array(token, np.int32),
        previous=np.zeros(n, np.int32),
        label=None if label is None else np.array(label, np.uint8),
        position=np.array(position or [0] * n, np.int32),
        context=np.zeros(n, np.int64),
    )


def test_fvu_of_every_group_equals_a_plain_loop_whatever_the_division_into_parts() -> None:
    rng = np.random.default_rng(0)
    n = 300
    context, group = rng.integers(0, 20, n), rng.integers(0, 3, n)
    error, deviation = rng.random(n), 1 + rng.random(n)
    grouping = Grouping("test", ("a", "b", "nothing", "c"), lambda rows: rows.token)
    group[group == 2] = 3
    whole, parts = GroupedErrors(grouping), GroupedErrors(grouping)
    whole.add(context, group, error, deviation)
    for chosen in (context < 8, context >= 8):
        _, index = np.unique(context[chosen], return_inverse=True)
        parts.add(index, group[chosen], error[chosen], deviation[chosen])
    found = whole.figures(100, 0)
    assert [figure["name"] for figure in found] == ["a", "b", "c"], "a group without rows is left out"
    for figure, g in zip(found, (0, 1, 3), strict=True):
        rows = [i for i in range(n) if group[i] == g]
        expected = sum(error[i] for i in rows) / sum(deviation[i] for i in rows)
        assert figure["n_rows"] == len(rows)
        assert figure["fvu"] == pytest.approx(expected)
        assert figure["fvu_interval"][0] < expected < figure["fvu_interval"][1]
        assert figure["error_share"] == pytest.approx(sum(error[i] for i in rows) / error.sum())
    for a, b in zip(found, parts.figures(0, 0), strict=True):
        assert (a["n_rows"], a["fvu"]) == (b["n_rows"], pytest.approx(b["fvu"]))


def test_groups_without_deviation_have_no_fvu() -> None:
    grouped = GroupedErrors(Grouping("test", ("a",), lambda rows: rows.token))
    grouped.add(np.zeros(2, np.int64), np.zeros(2, np.int64), np.ones(2), np.zeros(2))
    assert grouped.figures(10, 0)[0]["fvu"] is None
    assert GroupedErrors(grouped.grouping).figures(10, 0) == []


@pytest.mark.parametrize(
    ("n_tokens", "names"),
    [
        (1, ["0"]),
        (2, ["0", "1"]),
        (8, ["0", "1", "2-3", "4-7"]),
        (10, ["0", "1", "2-3", "4-7", "8-9"]),
        (128, ["0", "1", "2-3", "4-7", "8-15", "16-31", "32-63", "64-127"]),
    ],
)
def test_position_bins_double_and_cover_every_position(n_tokens: int, names: list[str]) -> None:
    assert list(position_names(position_edges(n_tokens))) == names
    grouping = by_position(n_tokens)
    assigned = grouping.assign(texts([0] * n_tokens, position=list(range(n_tokens))))
    for position, group in enumerate(assigned):
        low, _, high = grouping.groups[group].partition("-")
        assert int(low) <= position <= int(high or low)


def test_labels_are_their_own_groups() -> None:
    grouping = by_label(["name", "keyword"])
    assert grouping.assign(texts([5, 6, 7], [1, 0, 1])).tolist() == [1, 0, 1]


def test_tokens_lie_in_the_tenth_of_their_middle_row() -> None:
    # 100 rows: token 2 has 55 of them, token 0 has 25, token 3 has 15, token 1 has 5.
    grouping = by_frequency(np.array([25, 5, 55, 15]))
    assert grouping.assign(texts([2, 0, 3, 1])).tolist() == [2, 6, 8, 9]
    assert grouping.groups[0] == "tenth 1 (most frequent)"
    even = by_frequency(np.ones(20, np.int64))
    assert np.bincount(even.assign(texts(list(range(20))))).tolist() == [2] * 10
