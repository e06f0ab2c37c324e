"""Intervals of shares."""

import math

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
