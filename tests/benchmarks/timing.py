"""Two things timed in turn, so that a machine whose speed drifts does not favour either."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    ours: str
    reference: str
    ratios: tuple[float, ...]
    """Our speed over the reference's, pair by pair."""

    def __str__(self) -> str:
        ratio = f"{statistics.median(self.ratios):.2f}"
        spread = f"{min(self.ratios):.2f}-{max(self.ratios):.2f}"
        return f"{self.what:<62} {self.ours:>16} {self.reference:>16} {ratio:>7}  {spread:<11} {len(self.ratios)} pairs"


@dataclass(frozen=True)
class Cost:
    """One line of the table for work that has no reference: what it took."""

    what: str
    seconds: float
    n_bytes: int
    """Read or written."""
    peak_bytes: int
    """Most memory of the process that did it, libraries included."""

    def __str__(self) -> str:
        memory = f"peak {self.peak_bytes / 1e6:,.0f} MB"
        return f"{self.what:<62} {self.seconds:>14,.1f} s {self.n_bytes / 1e6:>13,.1f} MB {memory:>16}"


def compare(
    what: str,
    ours: Callable[[], object],
    reference: Callable[[], object],
    amount: float,
    unit: str,
    *,
    n_pairs: int = 7,
) -> Row:
    """Time `ours` and `reference` alternately after one warm-up of each.

    Args:
        amount: units of work that either does in one call.
    """
    ours()
    reference()
    times = [(_seconds(ours), _seconds(reference)) for _ in range(n_pairs)]
    mine, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    return Row(
        what,
        f"{amount / mine:,.0f} {unit}/s",
        f"{amount / theirs:,.0f} {unit}/s",
        tuple(b / a for a, b in times),
    )


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def resident_bytes(field: str) -> int:
    """VmRSS, what this process has in memory now, or VmHWM, the most it had.

    Not `ru_maxrss`: a child begins with that of the process that started it.
    """
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10
