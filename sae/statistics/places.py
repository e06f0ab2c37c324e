"""The text at the places of firings, read from the token tables."""

from typing import NamedTuple

import numpy as np

from sae.statistics.firings import NO_TOKEN, Firings, StatisticsPart, context_key
from sae.store.storage.filesystem import Storage


class Texts(NamedTuple):
    """What stands at each place. Parallel arrays [n]."""

    token: np.ndarray
    """int32"""
    previous: np.ndarray
    """The token before it, NO_TOKEN at the start of a context. int32"""


def texts_at(storage: Storage, parts: list[StatisticsPart], firings: Firings) -> Texts:
    """Look the firings' tokens up. Nothing is encoded."""
    texts = Texts(*(np.full(len(firings), NO_TOKEN, np.int32) for _ in Texts._fields))
    order = np.argsort(firings.context, kind="stable")
    context = firings.context[order]
    for part in parts:
        contexts = part.contexts(storage)
        if contexts is None or len(contexts) == 0:
            continue
        first, last = context_key(part.segment, part.split, contexts.seq[[0, -1]])
        here = order[np.searchsorted(context, first) : np.searchsorted(context, last, side="right")]
        row, pos = firings.context[here] - first, firings.pos[here]
        texts.token[here] = contexts.tokens[row, pos]
        texts.previous[here] = np.where(pos > 0, contexts.tokens[row, np.maximum(pos - 1, 0)], NO_TOKEN)
    return texts
