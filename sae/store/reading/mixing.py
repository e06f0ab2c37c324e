"""How well an order mixes: the variance of batch means that is to be expected, over that of independent draws.

Rows of one context resemble each other. Let rho be the correlation of two rows of a context, averaged over
dimensions by their variance (the intraclass correlation), T the rows of a context, N those of the store and B those of
a batch. With p the probability that two different rows of a batch are of one context,

    Var(batch mean) / (sigma^2 / B) = 1 + (B - 1) (p rho + (1 - p) r),   r = -(1 + (T - 1) rho) / (N - T)

where r is the correlation of rows of different contexts: deviations from the store's mean sum to zero, so what the
pairs of a context share the others lack. Contexts are permuted before extraction, so no other context is nearer than
any other, documents of several contexts included. An order that draws rows anywhere in the store has
p = (T - 1) / (N - 1), which gives 1 - (B - 1) / (N - 1), a draw without replacement.

What remains is p. Rows of a part are permuted when it is written, so two of its P rows share a context with
probability (T - 1) / (P - 1) whatever row groups they are in, and p is that times the probability that two rows of a
batch are of one part. A batch takes equally many rows of every stream, at random from the row groups of its window:

    same row group   two of a stream's b = B / C rows, in a window of w row groups of G rows, permuted in runs of R:
                     (b - 1) / (B - 1) * (q + (1 - q) * (G / R - 1) / (w G / R - 1)),   q = (R - 1) / (b - 1)
                     where q is the probability that they are of one run
    same part        two row groups of a block of M parts of g row groups, whose order is random: (g - 1) / (M g - 1),
                     if both are in one block: windows reach D row groups far in the sequence, over a block's end

With long windows and many row groups in a part the excess is (B T / P) (1 / K + 1 / M) rho: K row groups in memory
weigh as much as K parts, because each holds rows of all contexts of its part. The short tail of an epoch is left out.
"""

import math

import numpy as np

from sae.store.reading.order import block_starts
from sae.store.reading.shuffle import ShuffleSizes

TIMES = 256
"""At which the pool of row groups in memory is looked at."""


def expected_variance(
    shuffle: ShuffleSizes,
    *,
    n_parts: int,
    part_rows: int,
    row_group_rows: int,
    batch_rows: int,
    context_rows: int,
    rho: float,
) -> float:
    """The expected variance of batch means over that of batches drawn independently from the same rows: 1 is perfect.

    Args:
        n_parts, part_rows, row_group_rows: of a store of equal parts; only their last row group may be shorter.
        context_rows: rows of a context; parts hold whole contexts.
        rho: correlation of two rows of a context.
    """
    n_rows = n_parts * part_rows
    if n_rows <= context_rows or batch_rows < 2:
        return 1.0
    same_context = _same_part(shuffle, n_parts, part_rows, row_group_rows, batch_rows) * (
        (context_rows - 1) / (part_rows - 1)
    )
    others = -(1 + (context_rows - 1) * rho) / (n_rows - context_rows)
    return 1 + (batch_rows - 1) * (same_context * rho + (1 - same_context) * others)


def _same_part(shuffle: ShuffleSizes, n_parts: int, part_rows: int, row_group_rows: int, batch_rows: int) -> float:
    """The probability that two rows of a batch are of one part."""
    per_part = math.ceil(part_rows / row_group_rows)
    group_rows = part_rows / per_part
    pools = _pools(n_parts * per_part, shuffle.streams(batch_rows), shuffle.groups_per_window(batch_rows))
    share, run_rows = batch_rows / shuffle.streams(batch_rows), shuffle.rows_per_run(batch_rows)
    same_stream, same_run = (share - 1) / (batch_rows - 1), (run_rows - 1) / max(share - 1, 1)
    group_runs = max(group_rows / run_rows, 1)
    found = []
    for pool in pools:
        n_groups = np.array([len(places) for places in pool if len(places)])
        other_run = np.mean((group_runs - 1) / np.maximum(n_groups * group_runs - 1, 1))
        same_group = same_stream * (same_run + (1 - same_run) * other_run)
        places = np.concatenate(pool)
        # How often two groups of the pool lie D apart, every stream having the same weight: an autocorrelation.
        weights = np.zeros(np.ptp(places) + 1)
        weights[places - places.min()] = np.repeat(1 / n_groups, n_groups)
        spectrum = np.fft.rfft(weights, 2 * len(weights))
        apart = np.fft.irfft(np.abs(spectrum) ** 2)[: len(weights)]
        distances = np.arange(1, len(weights))
        if len(distances) == 0:
            found.append(same_group)
            continue
        other_groups = np.average(_in_one_part(distances, n_parts, per_part, shuffle.block_parts), weights=apart[1:])
        found.append(same_group + (1 - same_group) * other_groups)
    return float(np.mean(found))


def _pools(n_groups: int, n_streams: int, per_window: int) -> list[list[np.ndarray]]:
    """Places in the sequence of the row groups that every stream has in memory, at times spread over an epoch."""
    n_in_stream = max(1, n_groups // n_streams)
    # Steps of the golden ratio: neither all at one place of a window nor all at one end of the epoch.
    golden = (math.sqrt(5) - 1) / 2
    times = range(n_in_stream) if n_in_stream <= TIMES else [int(n_in_stream * (i * golden % 1)) for i in range(TIMES)]
    pools = []
    for time in times:
        pool = []
        for stream in range(n_streams):
            first = math.ceil(per_window * (stream + 1) / n_streams)
            start = 0 if time < first else first + (time - first) // per_window * per_window
            stop = first if time < first else start + per_window
            pool.append(np.arange(start * n_streams + stream, min(stop * n_streams, n_groups), n_streams))
        pools.append(pool)
    return pools


def _in_one_part(distances: np.ndarray, n_parts: int, per_part: int, block_parts: int) -> np.ndarray:
    """The probability that two row groups so far apart in the sequence are of one part."""
    sizes, counts = np.unique(np.diff(block_starts(n_parts, block_parts)) * per_part, return_counts=True)
    chance = np.zeros(len(distances))
    for n_groups, n_blocks in zip(sizes.tolist(), counts.tolist(), strict=True):
        if n_groups > 1:
            pairs = n_blocks * np.maximum(n_groups - distances, 0)
            chance += pairs / np.maximum(n_parts * per_part - distances, 1) * (per_part - 1) / (n_groups - 1)
    return chance
