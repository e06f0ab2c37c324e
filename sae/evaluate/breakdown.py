"""Where the SAE fails: error by position in the context, and by token class."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sae.evaluate.bootstrap import ratio_intervals
from sae.evaluate.rows import RowTexts

N_DECILES = 10


@dataclass(frozen=True)
class Grouping:
    """A way to divide rows into named groups."""

    name: str
    """What it divides by: position, syntax label or token frequency."""
    groups: tuple[str, ...]
    assign: Callable[[RowTexts], np.ndarray]
    """Group of every row. [n] integers"""


@dataclass
class GroupedErrors:
    """Reconstruction error of every group, summed per context, so that contexts can be redrawn."""

    grouping: Grouping
    n_rows: np.ndarray = field(init=False)
    """[groups] int64"""
    _error: list[np.ndarray] = field(default_factory=list)
    _deviation: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.n_rows = np.zeros(len(self.grouping.groups), np.int64)

    def add(self, context: np.ndarray, group: np.ndarray, error: np.ndarray, deviation: np.ndarray) -> None:
        """Count the rows of whole contexts.

        Args:
            context: index among the contexts of this call. [n]
            group: [n]
            error: ||x - x_hat||^2 [n] float64
            deviation: ||x - mean||^2 [n] float64
        """
        n_groups = len(self.n_rows)
        shape = (int(context.max(initial=-1)) + 1, n_groups)
        place = context * n_groups + group
        self.n_rows += np.bincount(group, minlength=n_groups)
        for kept, values in ((self._error, error), (self._deviation, deviation)):
            kept.append(np.bincount(place, values, minlength=shape[0] * n_groups).reshape(shape))

    def figures(self, n_draws: int, *key: str | int) -> list[dict[str, Any]]:
        """FVU of every group that has rows: its share of the error over its share of the deviation from the mean of
        all rows, so that the groups, weighed by their deviation, give the FVU of the whole."""
        n_groups = len(self.n_rows)
        error, deviation = (np.concatenate([np.zeros((0, n_groups)), *kept]) for kept in (self._error, self._deviation))
        intervals = ratio_intervals(error, deviation, n_draws, self.grouping.name, *key)
        errors, deviations = error.sum(axis=0), deviation.sum(axis=0)
        return [
            {
                "name": name,
                "n_rows": int(self.n_rows[i]),
                "fvu": float(errors[i] / deviations[i]) if deviations[i] > 0 else None,
                "fvu_interval": intervals[i],
                "error_share": float(errors[i] / errors.sum()) if errors.sum() > 0 else None,
            }
            for i, name in enumerate(self.grouping.groups)
            if self.n_rows[i]
        ]


def position_edges(n_tokens: int) -> np.ndarray:
    """First positions of bins that double in width, and the end: 0, 1, 2, 4, ..., n_tokens. int64"""
    powers = 1 << np.arange(max(n_tokens - 1, 1).bit_length())
    return np.concatenate([[0], powers[powers < n_tokens], [n_tokens]])


def position_names(edges: np.ndarray) -> tuple[str, ...]:
    """`1`, `2-3`, `4-7`, ...: what the bins are called."""
    bins = itertools.pairwise(edges.tolist())
    return tuple(f"{low}" if high - low == 1 else f"{low}-{high - 1}" for low, high in bins)


def by_position(n_tokens: int) -> Grouping:
    """Bins of the position in contexts of `n_tokens`."""
    edges = position_edges(n_tokens)
    return Grouping(
        "position", position_names(edges), lambda texts: np.searchsorted(edges, texts.position, side="right") - 1
    )


def by_label(names: Sequence[str]) -> Grouping:
    """Syntax labels. Every row has one."""

    def assign(texts: RowTexts) -> np.ndarray:
        assert texts.label is not None, "a corpus with label names has labels"
        return texts.label.astype(np.int64)

    return Grouping("syntax label", tuple(names), assign)


def by_frequency(counts: np.ndarray) -> Grouping:
    """Tenths of the rows by how frequent their token is; a token lies in the tenth of its middle row.

    Args:
        counts: rows of every token id. [vocab]
    """
    order = np.argsort(-counts, kind="stable")
    middle = np.cumsum(counts[order]) - counts[order] / 2
    decile = np.empty(len(counts), np.int64)
    decile[order] = np.minimum(N_DECILES * middle / max(int(counts.sum()), 1), N_DECILES - 1)
    names = tuple(
        f"tenth {i + 1}" + {0: " (most frequent)", N_DECILES - 1: " (rarest)"}.get(i, "") for i in range(N_DECILES)
    )
    return Grouping("token frequency", names, lambda texts: decile[texts.token])
