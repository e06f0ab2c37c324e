"""Which rows are shown as a latent's examples."""

from typing import NamedTuple

import numpy as np

from sae.statistics.firings import Firings
from sae.statistics.kept import rank_in_run
from sae.statistics.quantiles import SHARES

GROUPS = ("top", "q3", "q2", "q1", "q0", "random", "miss")
"""Groups of examples, in the order they are stored. q3 holds the strongest quarter of the firings, q0 the weakest;
`miss` holds rows on which the latent is silent although they carry its token. Latents without quantiles have no
quarters, and `random` then holds all their firings."""
N_QUARTERS = len(SHARES) + 1


class Examples(NamedTuple):
    """Chosen firings, sorted by latent, group and rank."""

    firings: Firings
    group: np.ndarray
    """Index into GROUPS. [n] int64"""
    rank: np.ndarray
    """Place in the group: by strength, for `random` and `miss` by chance. [n] int32"""


def choose_examples(top: Firings, sample: Firings, misses: Firings, edges: np.ndarray, n_per_group: int) -> Examples:
    """The strongest firings, some of every quarter, some at random, and near misses.

    Args:
        top: one firing per document, sorted by latent, strongest first.
        sample: uniform sample of the firings of every latent, sorted by latent, then by random priority.
        misses: sorted by latent, then by chance.
        edges: quartile edges of every latent's activations; NaN: no quarters. [d_sae, 3]
        n_per_group: how many of each quarter, and at random.
    """
    priority = rank_in_run(sample.latent)
    size = _run_lengths(sample.latent)
    quarter = (sample.value[:, None] > edges[sample.latent]).sum(axis=1)
    # Quarters take the lowest priorities and `random` the highest: both are fair draws and rarely meet.
    by_quarter = np.lexsort((priority, quarter, sample.latent))
    drawn = rank_in_run(sample.latent[by_quarter].astype(np.int64) * N_QUARTERS + quarter[by_quarter])
    from_quarters = by_quarter[(drawn < n_per_group) & np.isfinite(edges[sample.latent[by_quarter], 0])]
    at_random = np.flatnonzero(size - priority <= n_per_group)

    firings = Firings.concatenate([top, sample.take(from_quarters), sample.take(at_random), misses])
    group = np.concatenate(
        [
            np.full(len(top), GROUPS.index("top")),
            GROUPS.index("q0") - quarter[from_quarters],
            np.full(len(at_random), GROUPS.index("random")),
            np.full(len(misses), GROUPS.index("miss")),
        ]
    )
    by_chance = group >= GROUPS.index("random")
    chance = np.zeros(len(firings), np.int64)
    chance[by_chance] = np.concatenate([priority[at_random], rank_in_run(misses.latent)])
    strength = np.where(by_chance, np.float32(0), -firings.value)
    order = np.lexsort((firings.pos, firings.context, chance, strength, group, firings.latent))
    firings, group = firings.take(order), group[order]
    rank = rank_in_run(firings.latent.astype(np.int64) * len(GROUPS) + group).astype(np.int32)
    return Examples(firings, group, rank)


def _run_lengths(sorted_keys: np.ndarray) -> np.ndarray:
    """How many elements equal each element of a sorted array. [n] int64"""
    _, inverse, counts = np.unique(sorted_keys, return_inverse=True, return_counts=True)
    return counts[inverse]
