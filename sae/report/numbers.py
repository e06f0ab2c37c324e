"""How numbers are written on the page: three digits, no leading zero, units with a space. numbers.js does the same."""

import math
from decimal import ROUND_HALF_UP, Context, Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sae.intervals import wilson_interval

NOT_AVAILABLE = "n/a"


def decimal(value: float | None, digits: int = 3) -> str:
    """Three significant digits: `.195`, `24.0`, `1,204`. None or NaN: n/a."""
    if value is None or not math.isfinite(value):
        return NOT_AVAILABLE
    if value == 0:
        return "0"
    size = int(f"{value:.{digits - 1}e}".partition("e")[2])
    if size >= digits:
        return f"{_rounded(value, 0):,}"
    if size < -4:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-")
    text = f"{_rounded(value, max(0, digits - 1 - size))}"
    return text.replace("0.", ".", 1) if abs(value) < 1 and text.lstrip("-").startswith("0.") else text


def _rounded(value: float, places: int) -> Decimal:
    """Ties away from zero, as toFixed of JavaScript; Python's own formatting rounds them to even."""
    return Decimal(value).quantize(Decimal(1).scaleb(-places), ROUND_HALF_UP, Context(prec=400))


def percent(share: float | None, digits: int = 3) -> str:
    """A share of one as a percentage: `43.1 %`."""
    if share is None or not math.isfinite(share):
        return NOT_AVAILABLE
    return f"{decimal(100 * share, digits)} %"


def compact(count: int) -> str:
    """A count in thousands or millions: `860 k`, `1.02 M`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def interval(bounds: list[float] | tuple[float, float] | None) -> str:
    """A 95 % interval: `.192 to .198`; empty when there is none."""
    if not bounds or any(b is None or not math.isfinite(b) for b in bounds):
        return ""
    return f"{decimal(bounds[0])} to {decimal(bounds[1])}"


def data_size(n_bytes: int) -> str:
    """Bytes for people: `248 kB`."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n_bytes >= size:
            return f"{n_bytes / size:.3g} {unit}"
    return f"{n_bytes} B"


def short(value: Any) -> float:
    """The shortest decimal that gives the same float32: exact, and a third of the characters."""
    return float(str(np.float32(value)))


def shorts(values: pa.Array) -> pa.Array:
    """`short` of every value of an array of float32, or of lists of float32, seven times as fast; nulls stay."""
    if not pa.types.is_list(values.type):
        return values.cast(pa.string()).cast(pa.float64())
    offsets = pc.subtract(values.offsets, values.offsets[0])
    return pa.ListArray.from_arrays(offsets, shorts(values.flatten()))


def wilson(n_found: int, n_tried: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927); for none found, [0, the one-sided upper bound].

    Firings of one document are not independent, so the true interval of a firing frequency is wider.
    """
    if n_found == 0 and n_tried > 0:
        return 0.0, 1 - 0.05 ** (1 / n_tried)
    return wilson_interval(n_found, n_tried)
