"""In which groups partial results are merged: a tree whose shape depends on the number of parts alone."""

from typing import NamedTuple

FAN_IN = 16
"""Partial results merged by one task."""


class Node(NamedTuple):
    """One merge task. Its result is stored as a further part of the artefact."""

    part: int
    children: range
    """Parts that it merges, in order."""


def merge_levels(n_parts: int) -> list[list[Node]]:
    """The merge tasks level by level; those of one level are independent of each other.

    What the last level leaves, FAN_IN parts at most, is merged with the tables: see `roots`.
    """
    levels: list[list[Node]] = []
    current = range(n_parts)
    while len(current) > FAN_IN:
        starts = range(current.start, current.stop, FAN_IN)
        nodes = [
            Node(current.stop + i, range(start, min(start + FAN_IN, current.stop))) for i, start in enumerate(starts)
        ]
        levels.append(nodes)
        current = range(current.stop, current.stop + len(nodes))
    return levels


def roots(n_parts: int) -> range:
    """The parts whose merge is the whole."""
    levels = merge_levels(n_parts)
    return range(levels[-1][0].part, levels[-1][-1].part + 1) if levels else range(n_parts)
