"""Scores of yes-or-no answers, with 95 % intervals.

Intervals are Wilson's (1927) or made from his, not bootstrapped: with some thirty answers, a bootstrap of answers that
are all right says [1, 1]. They take answers as independent; contexts of one document and answers to one request are
not, so true intervals are wider.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from sae.intervals import wilson_interval

METRICS = ("accuracy", "precision", "recall", "f1", "balanced_accuracy")


class Score(NamedTuple):
    """A share and its 95 % interval."""

    value: float
    low: float
    high: float


class Counts(NamedTuple):
    """Answers by what is true."""

    true_positive: int = 0
    false_positive: int = 0
    true_negative: int = 0
    false_negative: int = 0

    @property
    def total(self) -> int:
        """Answers."""
        return sum(self)


def count_answers(pairs: Iterable[tuple[bool, bool | None]]) -> tuple[Counts, int]:
    """Count (truth, answer) pairs. Returns: the counts, and how many had no answer and are in none of them."""
    counts = [0, 0, 0, 0]
    unparsed = 0
    for truth, answer in pairs:
        if answer is None:
            unparsed += 1
        else:
            counts[{(True, True): 0, (False, True): 1, (False, False): 2, (True, False): 3}[truth, answer]] += 1
    return Counts(*counts), unparsed


def scores(counts: Counts) -> dict[str, Score | None]:
    """Every metric of METRICS; None where it is not defined: nothing was said to match, nothing matches.

    Balanced accuracy is the mean of recall and specificity, its interval their two Wilson intervals joined (Newcombe
    1998, method 10). F1 = 2J / (1 + J) of the share J = TP / (TP + FP + FN), and so is its interval.
    """
    tp, fp, tn, fn = counts
    recall, specificity = _share(tp, tp + fn), _share(tn, tn + fp)
    jaccard = _share(tp, tp + fp + fn)
    return {
        "accuracy": _share(tp + tn, counts.total),
        "precision": _share(tp, tp + fp),
        "recall": recall,
        "f1": jaccard and Score(*(2 * edge / (1 + edge) for edge in jaccard)),
        "balanced_accuracy": _mean(recall, specificity) if recall and specificity else None,
    }


def _share(n: int, total: int) -> Score | None:
    return Score(n / total, *wilson_interval(n, total)) if total else None


def _mean(a: Score, b: Score) -> Score:
    value = (a.value + b.value) / 2
    return Score(
        value,
        value - math.hypot(a.value - a.low, b.value - b.low) / 2,
        value + math.hypot(a.high - a.value, b.high - b.value) / 2,
    )
