"""Near misses: rows that carry a latent's most frequent token and on which it is silent. They show what a token's
name alone does not explain."""

import numpy as np

from sae.architectures.base import SAE
from sae.progress import Progress, silent
from sae.statistics.firings import Firings, StatisticsPart, context_key, iter_blocks
from sae.statistics.kept import rank_in_run
from sae.store.storage.filesystem import Storage


def find_near_misses(
    storage: Storage,
    sae: SAE,
    parts: list[StatisticsPart],
    top_token: np.ndarray,
    places: Firings,
    n: int,
    *,
    progress: Progress = silent,
) -> Firings:
    """Up to n near misses of every latent, drawn from the random places kept for its token; value 0.

    Fewer where the latent fires on nearly all places of its token.

    Args:
        top_token: the token on which each latent fires most, -1 for none. [d_sae]
        places: random rows of every token (their `latent` is the token), sorted by token, then by chance.

    Returns: sorted by latent, then by chance.
    """
    latents = np.flatnonzero(top_token >= 0)
    first, last = (np.searchsorted(places.latent, top_token[latents], side=side) for side in ("left", "right"))
    size = last - first
    latent = np.repeat(latents, size)
    place = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size) + np.repeat(first, size)
    fired = _firing_pairs(storage, sae, parts, places, np.unique(place), progress)
    is_silent = ~np.isin(place * np.int64(sae.d_sae) + latent, fired)
    latent, place = latent[is_silent], place[is_silent]
    kept = rank_in_run(latent) < n
    found = places.take(place[kept])
    return Firings(latent[kept].astype(np.int32), found.value, found.context, found.pos, found.doc)


def _firing_pairs(
    storage: Storage,
    sae: SAE,
    parts: list[StatisticsPart],
    places: Firings,
    used: np.ndarray,
    progress: Progress,
) -> np.ndarray:
    """place * d_sae + latent for every latent that fires on one of the `used` places. int64"""
    used = used[np.lexsort((places.pos[used], places.context[used]))]
    context, pos = places.context[used], places.pos[used].astype(np.int64)
    found = [np.empty(0, np.int64)]
    for number, part in enumerate(parts):
        progress(number, len(parts), "parts", "near misses")
        contexts = part.contexts(storage)
        if contexts is None or len(contexts) == 0:
            continue
        first, last = context_key(part.segment, part.split, contexts.seq[[0, -1]])
        here = slice(np.searchsorted(context, first), np.searchsorted(context, last, side="right"))
        if here.start == here.stop:
            continue
        n_tokens = contexts.tokens.shape[1]
        wanted = np.zeros(contexts.tokens.shape, bool)
        wanted[context[here] - first, pos[here]] = True
        keys = (context[here] - first) * n_tokens + pos[here]
        for block in iter_blocks(storage, sae, part, contexts, wanted):
            key = (block.rows.context - first) * n_tokens + block.rows.pos
            place = used[here][np.searchsorted(keys, key)]
            found.append(place[block.row] * np.int64(sae.d_sae) + block.latent)
    return np.concatenate(found)
