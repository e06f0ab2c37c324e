"""The merge tree: every part once, in order, and no task with more than FAN_IN children."""

import pytest

from sae.statistics.tree import FAN_IN, merge_levels, roots


@pytest.mark.parametrize("n_parts", [0, 1, FAN_IN, FAN_IN + 1, 18, 256, 257, 5000, 100_000])
def test_every_part_is_merged_once_and_in_order(n_parts: int) -> None:
    leaves = {part: [part] for part in range(n_parts)}
    numbers = []
    for level in merge_levels(n_parts):
        for node in level:
            assert 1 <= len(node.children) <= FAN_IN
            leaves[node.part] = [leaf for child in node.children for leaf in leaves.pop(child)]
            numbers.append(node.part)
    last = roots(n_parts)
    assert len(last) <= FAN_IN
    assert [leaf for part in last for leaf in leaves.pop(part)] == list(range(n_parts))
    assert leaves == {}
    assert numbers == list(range(n_parts, n_parts + len(numbers)))
