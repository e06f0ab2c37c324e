"""Intervals of shares and means."""

import math
import statistics
from collections.abc import Sequence

Z_95 = 1.959964
"""Standard normal quantile of a two-sided 95 % interval."""


def wilson_interval(n: int, total: int) -> tuple[float, float]:
    """95 % interval of a share of which `n` of `total` were seen; [0, 1] where nothing was.

    Source: Wilson 1927, without continuity correction.
    """
    if total == 0:
        return 0.0, 1.0
    share, z = n / total, Z_95
    centre = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # At 0 and at 1 rounding must not leave the share itself outside.
    low = 0.0 if n == 0 else max(0.0, (centre - half) / scale)
    high = 1.0 if n == total else min(1.0, (centre + half) / scale)
    return low, high


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean of what `values` were drawn from at random, by Student's t; None below three values.

    Source: the quantile of t by its expansion about the normal one (Abramowitz and Stegun 26.7.5), within 0.8 %.
    """
    n, z = len(values), Z_95
    if n < 3:
        return None
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92_160,
    )
    quantile = z + sum(term / (n - 1) ** power for power, term in enumerate(terms, 1))
    mean, half = statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(n)
    return mean - half, mean + half
