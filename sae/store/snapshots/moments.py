"""Sums over parts that add up: a part's record holds sums over its rows, and those of many parts are merged here.

What is added is known by its name in a record's metrics: `n_...` are counts, `sum...` are sums of floating-point
numbers, of one number or a vector a row. Vectors are base64 of little-endian float64.
"""

import base64
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


def encode_vector(values: np.ndarray) -> str:
    """A float64 vector as base64 of its little-endian bytes: exact and short in JSON."""
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f8").tobytes()).decode()


def decode_vector(text: str) -> np.ndarray:
    """The vector that `encode_vector` made a text of. [n] float64"""
    return np.frombuffer(base64.b64decode(text), dtype="<f8")


class Sums:
    """Counts and sums of several records, or of what was merged from them before, added up.

    Sums are added in the order given, in twice the precision of float64, and rounded once at the end. A count that a
    record lacks is 0; a sum that one of them lacks would be of some rows only and is left out.

    Source: Ogita, Rump and Oishi 2005, "Accurate sum and dot product", algorithm 4.4 (Sum2).
    """

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._sums: dict[str, tuple[np.ndarray, np.ndarray]] | None = None

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Add what a record's metrics hold."""
        for name, value in metrics.items():
            if name.startswith("n_") and isinstance(value, int):
                self._counts[name] = self._counts.get(name, 0) + value
        values = {name: _read(value) for name, value in metrics.items() if name.startswith("sum")}
        if self._sums is None:
            self._sums = {name: (value, np.zeros_like(value)) for name, value in values.items()}
        else:
            self._sums = {name: _add(*self._sums[name], values[name]) for name in self._sums if name in values}

    def merged(self) -> dict[str, Any]:
        """What a record of all their rows would hold under the same names."""
        totals = {name: total + error for name, (total, error) in (self._sums or {}).items()}
        return self._counts | {
            name: encode_vector(total) if total.ndim else float(total) for name, total in totals.items()
        }


def merge_sums(metrics: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The counts and sums of several records' metrics, as `Sums` merges them."""
    sums = Sums()
    for each in metrics:
        sums.add(each)
    return sums.merged()


def _read(value: str | float) -> np.ndarray:
    return decode_vector(value) if isinstance(value, str) else np.array(float(value))


def _add(total: np.ndarray, error: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A sum and what rounding has cost so far, with one more value."""
    new = total + value
    back = new - total
    return new, error + ((total - (new - back)) + (value - back))
