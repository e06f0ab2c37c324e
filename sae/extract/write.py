"""Finished rows to a part file, with the figures that a part's record carries."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae.store.encoding import Encoding, decode
from sae.store.snapshot import encode_vector
from sae.store.writer import write_part

FLOAT16_MAX = 65504.0
SUM_ROWS = 4096
"""Rows summed at once in float64."""


def write_rows(
    path: Path, act: np.ndarray, identity: np.ndarray, row_group_rows: int, encoding: Encoding
) -> dict[str, Any]:
    """Write one part and describe it.

    Args:
        act: stored values, in stored order. [rows, d_in] of `stored_dtype`
        identity: seq, pos and token of every row. [3, rows] int32
        encoding: what the stored values mean.

    Returns: the metrics of the part's record: n_rows, d_in, layout (PartLayout), sum (per dimension, base64 of
        little-endian float64) and sum_sq (sum of squared norms), both of the values as they are read back.
    """
    seq, pos, token = identity
    layout = write_part(path, act, seq, pos, token, row_group_rows=row_group_rows, encoding=encoding)
    total, total_sq = moments(act, encoding)
    return {
        "n_rows": len(act),
        "d_in": act.shape[1],
        "layout": layout.model_dump(mode="json"),
        "sum": encode_vector(total),
        "sum_sq": total_sq,
    }


def moments(act: np.ndarray, encoding: Encoding) -> tuple[np.ndarray, float]:
    """Sum of the rows [d_in] and sum of their squared norms, in float64: float32 drifts over millions of rows."""
    total, total_sq = torch.zeros(act.shape[1], dtype=torch.float64), 0.0
    for start in range(0, len(act), SUM_ROWS):
        # torch converts float16 some ten times faster than numpy, and faster still by way of float32.
        block = decode(torch.from_numpy(act[start : start + SUM_ROWS]), encoding).double()
        total += block.sum(0)
        total_sq += float(torch.dot(block.view(-1), block.view(-1)))
    return total.numpy(), total_sq
