"""Rule labels: the one token, previous token, syntax label or position that says best where a latent fires.

A rule is found by counting, not understood: it always stands with its precision and recall.
"""

from typing import NamedTuple

import numpy as np

from sae.statistics.cooccurrence import Association

MIN_PRECISION = 0.5
"""A rule must hold on at least this share of the latent's firings."""
MIN_LIFT = 2.0
"""And be at least this many times as frequent there as among all rows: what is common everywhere explains nothing."""


class Rules(NamedTuple):
    """The best rule of every latent. Parallel arrays [d_sae]."""

    kind: np.ndarray
    """Index into the names of the associations; -1: no rule. int64"""
    code: np.ndarray
    """Token id, label, or bin of positions. int64"""
    precision: np.ndarray
    """NaN without a rule, as are the others. float64"""
    recall: np.ndarray
    lift: np.ndarray


def best_rules(associations: list[Association], d_sae: int) -> Rules:
    """For every latent the pair with the largest F1 = 2 P R / (P + R) among those that qualify as rules.

    F1 prefers the specific: a latent for `self` is not labelled "name", although all its firings are on names.
    Of equal pairs the first association's.
    """
    kind = np.repeat(np.arange(len(associations)), [len(each.pairs) for each in associations])
    latent, code, precision, recall, lift = (
        np.concatenate(columns)
        for columns in zip(
            *((each.pairs.latent, each.pairs.code, each.precision, each.recall, each.lift) for each in associations),
            strict=True,
        )
    )
    good = np.flatnonzero((precision >= MIN_PRECISION) & (lift >= MIN_LIFT))
    f1 = 2 * precision[good] * recall[good] / (precision[good] + recall[good])
    order = good[np.lexsort((code[good], kind[good], -f1, latent[good]))]
    chosen, first = np.unique(latent[order], return_index=True)
    order = order[first]
    rules = Rules(np.full(d_sae, -1), np.full(d_sae, -1), *(np.full(d_sae, np.nan) for _ in range(3)))
    for target, source in zip(rules, (kind, code, precision, recall, lift), strict=True):
        target[chosen] = source[order]
    return rules
