"""Finished rows to a part file, with the figures that a part's record carries."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sae.store.part.encoding import Encoding, decode
from sae.store.part.writer import write_part
from sae.store.snapshots.snapshot import encode_vector

SUM_VALUES = 1 << 17
"""Values summed at once: they stay in a core's own cache as float64."""


class Moments(NamedTuple):
    """Sums over rows, in float64: float32 drifts over millions of rows, and cancels where the mean is large."""

    sum: np.ndarray
    """[d_in]"""
    sum_sq: np.ndarray
    """Of the squares, per dimension. [d_in]"""
    norms: np.ndarray
    """Euclidean norm of every row. [rows]"""


def write_rows(
    path: Path, act: np.ndarray, identity: np.ndarray, row_group_rows: int, encoding: Encoding
) -> dict[str, Any]:
    """Write one part and describe it.

    Args:
        act: stored values, in stored order. [rows, d_in] of `stored_dtype`
        identity: seq, pos and token of every row. [3, rows] int32
        encoding: what the stored values mean.

    Returns: the metrics of the part's record. What adds up over parts begins with `n_` or `sum`; vectors are base64 of
        little-endian float64. n_rows, d_in and layout (PartLayout); of the values as they are read back: sum and
        sum_sq_by_dim (of the values and of their squares, per dimension), sum_sq (of the squared norms), sum_norm (of
        the norms) and median_norm.
    """
    seq, pos, token = identity
    layout = write_part(path, act, seq, pos, token, row_group_rows=row_group_rows, encoding=encoding)
    found = moments(act, encoding)
    return {
        "n_rows": len(act),
        "d_in": act.shape[1],
        "layout": layout.model_dump(mode="json"),
        "sum": encode_vector(found.sum),
        "sum_sq": float(found.sum_sq.sum()),
        "sum_sq_by_dim": encode_vector(found.sum_sq),
        "sum_norm": float(found.norms.sum()),
        "median_norm": float(np.median(found.norms)),
    }


def moments(act: np.ndarray, encoding: Encoding) -> Moments:
    """The moments of stored rows, in one pass over them.

    Args:
        act: stored values. [rows, d_in] of `stored_dtype`
    """
    n_rows, d_in = act.shape
    stored = torch.from_numpy(act)
    total, total_sq = torch.zeros(d_in, dtype=torch.float64), torch.zeros(d_in, dtype=torch.float64)
    sq_norms = torch.empty(n_rows, dtype=torch.float64)
    step = max(1, SUM_VALUES // d_in)
    single, double = torch.empty((step, d_in)), torch.empty((step, d_in), dtype=torch.float64)
    for start in range(0, n_rows, step):
        block = stored[start : start + step]
        wide = double[: len(block)]
        wide.copy_(decode(block, encoding, out=single[: len(block)]))  # by way of float32: faster than at once
        total += wide.sum(0)
        wide.mul_(wide)
        total_sq += wide.sum(0)
        torch.sum(wide, 1, out=sq_norms[start : start + step])
    return Moments(total.numpy(), total_sq.numpy(), sq_norms.sqrt_().numpy())
