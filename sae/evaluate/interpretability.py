"""How many units one token or one syntax label explains: an automatic score with three stated definitions.

A unit is a latent, or a dimension of the hook point itself (a "raw neuron"); it fires where it is positive. Only
units that fire at least `min_fires` times on the measured rows are scored. The candidates are: the token the unit
fires on, the token before it in the context, and the syntax label of the token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from sae.evaluate.rows import RowTexts
from sae.progress import Progress, silent

KINDS = ("token", "previous token", "label")
MAX_BASE_RATE = 0.35
"""Labels that more rows than this carry explain nothing."""
BLOCK_BINS = 1 << 23
"""Bins of the largest temporary table (64 MiB)."""


@dataclass(frozen=True)
class Definition:
    """When a unit counts as explained."""

    token_share: float
    """Of the activations looked at, what share must one token (current or previous) have."""
    label_share: float
    """The same for one syntax label."""
    strongest_one_in: int | None = None
    """Look at the strongest 1 in so many of a unit's firings (rounded up), each counting 1."""
    n_strongest: int | None = None
    """Or at so many of the strongest, each counting 1. With neither: at all firings, weighed by activation."""

    def n_looked_at(self, n_fires: np.ndarray) -> np.ndarray:
        """How many of the strongest firings count, for units that fire `n_fires` times. [n_units] int64"""
        if self.strongest_one_in is not None:
            return -(-n_fires // self.strongest_one_in)
        return n_fires if self.n_strongest is None else np.minimum(n_fires, self.n_strongest)

    @property
    def weighed(self) -> bool:
        """Whether firings count by their activation."""
        return self.strongest_one_in is None and self.n_strongest is None

    def describe(self) -> str:
        """The definition in words, for the report."""
        if self.strongest_one_in is not None:
            what = f"of the strongest {1 / self.strongest_one_in:.0%} of a unit's firings"
        elif self.n_strongest is not None:
            what = f"of a unit's {self.n_strongest} strongest firings (flatters units that fire often)"
        else:
            what = "of a unit's whole activation mass"
        return (
            f"one token, current or previous, has at least {self.token_share:.0%} {what}, or one syntax label at "
            f"least {self.label_share:.0%} (labels on fewer than {MAX_BASE_RATE:.0%} of the rows)"
        )


DEFINITIONS = {
    "top_tenth": Definition(token_share=0.8, label_share=0.9, strongest_one_in=10),
    "mass": Definition(token_share=0.5, label_share=0.8),
    "top_20": Definition(token_share=0.8, label_share=0.9, n_strongest=20),
}


class UnitFirings(NamedTuple):
    """Where units are positive. Parallel arrays [n]; firings of one unit in order of their rows."""

    unit: np.ndarray
    """int32"""
    row: np.ndarray
    """Index into the row texts. int32"""
    value: np.ndarray
    """float32, above zero"""


class Names(NamedTuple):
    """How candidates are called."""

    tokens: Callable[[np.ndarray], list[str]]
    """Token ids -> text."""
    labels: list[str] | None


class Winners(NamedTuple):
    """The best candidate of every unit under one definition. [n_units]"""

    kind: np.ndarray
    """Index into KINDS. int8"""
    code: np.ndarray
    """Token id or label. int64"""
    share: np.ndarray
    """float64"""
    passes: np.ndarray
    """bool"""


class UnitScores(NamedTuple):
    """The scores of a run of units."""

    n_fires: np.ndarray
    """int64 [n_units]"""
    winners: dict[str, Winners]
    """By name of the definition; meaningless for units that fire too rarely."""


def score_units(firings: UnitFirings, n_units: int, texts: RowTexts, *, progress: Progress = silent) -> UnitScores:
    """Find each unit's best candidate under every definition.

    Args:
        firings: of units 0 to n_units - 1.
    """
    # Positive floats order like their bits: one stable sort gives unit, then strength, then row.
    bits = firings.value.astype(np.float32, copy=False).view(np.uint32)
    order = np.argsort(
        (firings.unit.astype(np.uint64) << np.uint64(32)) | (np.uint32(0xFFFFFFFF) - bits), kind="stable"
    )
    unit, row = firings.unit[order].astype(np.int64), firings.row[order]
    value = firings.value[order].astype(np.float64)
    n_fires = np.bincount(unit, minlength=n_units)
    rank = np.arange(len(unit)) - np.repeat(np.cumsum(n_fires) - n_fires, n_fires)
    candidates = _candidates(texts)
    winners = {}
    for name, definition in DEFINITIONS.items():
        looked_at = rank < definition.n_looked_at(n_fires)[unit]
        weight = value[looked_at] if definition.weighed else None
        winners[name] = _best(unit[looked_at], row[looked_at], weight, n_units, candidates, definition)
        progress(len(winners), len(DEFINITIONS), "definitions", "interpretability")
    return UnitScores(n_fires, winners)


def concatenate(scores: list[UnitScores]) -> UnitScores:
    """The scores of consecutive runs of units as one."""
    winners = {
        name: Winners(*(np.concatenate(column) for column in zip(*(s.winners[name] for s in scores), strict=True)))
        for name in DEFINITIONS
    }
    return UnitScores(np.concatenate([s.n_fires for s in scores]), winners)


def summarize(scores: UnitScores, min_fires: int) -> dict[str, Any]:
    """Units that qualify, and the share of them that each definition explains (None without any)."""
    scored = scores.n_fires >= min_fires
    n_units = int(scored.sum())
    shares = {name: float(w.passes[scored].mean()) if n_units else None for name, w in scores.winners.items()}
    return {"n_units": n_units, **shares}


def scores_table(scores: UnitScores, min_fires: int, names: Names) -> pa.Table:
    """One row per unit; what was not scored is null."""
    n_units = len(scores.n_fires)
    scored = scores.n_fires >= min_fires
    columns: dict[str, pa.Array] = {
        "unit": pa.array(np.arange(n_units), pa.int32()),
        "n_fires": pa.array(scores.n_fires, pa.int64()),
    }
    for name, winners in scores.winners.items():
        known = scored & (winners.share > 0)
        texts = np.full(n_units, None, object)
        is_token = known & (winners.kind != KINDS.index("label"))
        texts[is_token] = names.tokens(winners.code[is_token])
        for unit in np.flatnonzero(known & ~is_token):
            texts[unit] = names.labels[winners.code[unit]] if names.labels else str(winners.code[unit])
        kinds = np.array(KINDS, object)[winners.kind]
        columns |= {
            f"{name}_kind": pa.array(kinds, pa.string(), mask=~known),
            f"{name}_name": pa.array(texts, pa.string(), mask=~known),
            f"{name}_share": pa.array(winners.share, pa.float64(), mask=~scored),
            f"{name}_passes": pa.array(winners.passes, pa.bool_(), mask=~scored),
        }
    return pa.table(columns)


class _Candidates(NamedTuple):
    """What each row offers for one kind."""

    code: np.ndarray
    """Index into `ids`, or 0 for nothing. [rows] int64"""
    ids: np.ndarray
    """Token ids or labels; ids[0] stands for nothing."""
    threshold: str
    """Which field of the definition applies."""


def _candidates(texts: RowTexts) -> list[_Candidates]:
    found = []
    for column in (texts.token, texts.previous):
        ids, code = np.unique(column, return_inverse=True)
        code = np.where(column < 0, 0, code + 1)
        found.append(_Candidates(code, np.concatenate([[-1], ids]), "token_share"))
    label = texts.label if texts.label is not None else np.empty(0, np.uint8)
    share = np.bincount(label) / max(len(label), 1)
    code = np.where(share[label] < MAX_BASE_RATE, label.astype(np.int64) + 1, 0)
    found.append(_Candidates(code, np.arange(-1, len(share)), "label_share"))
    return found


def _best(
    unit: np.ndarray,
    row: np.ndarray,
    weight: np.ndarray | None,
    n_units: int,
    candidates: list[_Candidates],
    definition: Definition,
) -> Winners:
    """The candidate with the largest share relative to its threshold; of equals, the first kind."""
    total = np.maximum(np.bincount(unit, weight, minlength=n_units), np.finfo(np.float64).tiny)
    winners = Winners(np.zeros(n_units, np.int8), np.full(n_units, -1), np.zeros(n_units), np.zeros(n_units, bool))
    relative = np.zeros(n_units)
    for kind, candidate in enumerate(candidates):
        if len(candidate.code) == 0:
            continue
        index, amount = _heaviest(unit, candidate.code[row], weight, n_units, len(candidate.ids))
        share = np.minimum(amount / total, 1)
        threshold = getattr(definition, candidate.threshold)
        better = share / threshold > relative
        winners.kind[better] = kind
        winners.code[better] = candidate.ids[index[better]]
        winners.share[better] = share[better]
        # The sum of all weights may round above or below the sum of one candidate's.
        winners.passes[better] = share[better] >= threshold - 1e-12
        relative[better] = share[better] / threshold
    return winners


def _heaviest(
    unit: np.ndarray, code: np.ndarray, weight: np.ndarray | None, n_units: int, n_codes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Per unit, the code (above 0) with the largest total weight, and that weight. `unit` is sorted."""
    index, amount = np.zeros(n_units, np.int64), np.zeros(n_units)
    block = max(1, BLOCK_BINS // n_codes)
    for start in range(0, n_units, block):
        stop = min(start + block, n_units)
        inside = slice(*np.searchsorted(unit, [start, stop]))
        flat = (unit[inside] - start) * n_codes + code[inside]
        some = None if weight is None else weight[inside]
        table = np.bincount(flat, some, minlength=(stop - start) * n_codes).reshape(-1, n_codes)
        table[:, 0] = 0
        index[start:stop] = table.argmax(axis=1)
        amount[start:stop] = table[np.arange(stop - start), index[start:stop]]
    return index, amount
