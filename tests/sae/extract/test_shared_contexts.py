"""Parts of several sets divided into runs: every part once, and each run's on the same contexts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.extract.part_group import WantedParts, share_contexts
from sae.store.snapshots import part_sets


@st.composite
def sets_on_one_split(draw: st.DrawFn) -> list[WantedParts]:
    n_contexts, batch = draw(st.integers(1, 5000)), draw(st.integers(1, 40))
    sets = []
    for power in draw(st.lists(st.integers(0, 8), min_size=1, max_size=4)):
        size = batch << power
        n_parts = -(-n_contexts // size)
        sets.append(WantedParts(size, n_parts, draw(st.integers(0, n_parts))))
    return sets


@given(sets_on_one_split(), st.integers(1, 20))
def test_every_wanted_part_is_in_one_run_with_the_parts_on_its_contexts(sets: list[WantedParts], n_runs: int) -> None:
    found: dict[int, list[int]] = {index: [] for index in range(len(sets))}
    for shared in share_contexts(sets):
        for units in shared.runs(n_runs):
            for unit in units:
                starts, stops = set(), set()
                for index, parts in zip(shared.sets, unit, strict=True):
                    found[index] += parts
                    if parts:
                        starts.add(parts.start * sets[index].contexts_per_part)
                        stops.add(parts.stop * sets[index].contexts_per_part)
                assert len(starts) == 1
                assert max(stops) - min(starts) <= max(each.contexts_per_part for each in sets)
    assert found == {index: list(range(each.wanted)) for index, each in enumerate(sets)}
    assert len(share_contexts(sets)) <= 1  # a power of two of batches: all lie within each other


def test_runs_are_as_many_as_asked_for_unless_there_are_fewer_units() -> None:
    (shared,) = share_contexts([WantedParts(8, 100, 100)])
    assert [len(units) for units in shared.runs(8)] == [12] * 8 + [4]
    assert [len(units) for units in shared.runs(1000)] == [1] * 100
    assert max(len(units) for units in shared.runs(1)) == 16


def test_groups_of_large_sets_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_sets, "MAX_GROUPS", 4)
    narrow, wide = WantedParts(8, 12, 12), WantedParts(4, 24, 21)  # groups of 3 and 6
    (shared,) = share_contexts([narrow, wide])
    assert shared.sets == [0, 1]
    assert shared.units == [
        [range(3), range(6)],
        [range(3, 6), range(6, 12)],
        [range(6, 9), range(12, 18)],
        [range(9, 12), range(18, 21)],
    ]
    assert [len(units) for units in shared.runs(1)] == [1] * 4
    # Groups of 3 and 4 parts: none lies within the other, and each set is extracted by itself.
    assert [each.sets for each in share_contexts([narrow, WantedParts(4, 16, 16)])] == [[0], [1]]
