"""Finished rows to a part file, with the figures that a part's record carries."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae.store.part.encoding import Encoding, decode
from sae.store.part.writer import Rows, write_part
from sae.store.snapshots.snapshot import encode_vector

SUM_VALUES = 1 << 17
"""Values summed at once: as float64 they stay in a core's own cache."""


class Moments:
    """Sums over rows that are added block by block.

    In float64: float32 drifts over millions of rows, and cancels where the mean is large.
    """

    def __init__(self, n_rows: int, d_in: int, encoding: Encoding) -> None:
        self._encoding, self._n_added = encoding, 0
        self.sum, self.sum_sq, self._part = torch.zeros((3, d_in), dtype=torch.float64)
        """Of the values, and of their squares, per dimension. [d_in]"""
        self.sq_norms = torch.empty(n_rows, dtype=torch.float64)
        """Square of every row's Euclidean norm. [rows]"""
        step = max(1, min(n_rows, SUM_VALUES // d_in))
        self._single, self._double = torch.empty((step, d_in)), torch.empty((step, d_in), dtype=torch.float64)

    def add(self, act: np.ndarray) -> None:
        """Add the next rows. act: stored values. [rows, d_in] of `stored_dtype`"""
        for block in torch.from_numpy(act).split(len(self._single)):
            n_rows = len(block)
            wide = self._double[:n_rows]
            # By way of float32: faster than at once.
            wide.copy_(decode(block, self._encoding, out=self._single[:n_rows]))
            self.sum += torch.sum(wide, 0, out=self._part)
            wide.mul_(wide)
            self.sum_sq += torch.sum(wide, 0, out=self._part)
            torch.sum(wide, 1, out=self.sq_norms[self._n_added : self._n_added + n_rows])
            self._n_added += n_rows


def write_rows(
    path: Path, act: Rows, identity: np.ndarray, row_group_rows: int, encoding: Encoding, *, durable: bool = False
) -> dict[str, Any]:
    """Write one part and describe it.

    Args:
        act: stored values, in stored order. [rows, d_in] of `stored_dtype`
        identity: seq, pos and token of every row. [3, rows] int32
        encoding: what the stored values mean.
        durable: as write_part takes it: on a local root, where the file is moved to its place.

    Returns: the metrics of the part's record. What adds up over parts begins with `n_` or `sum`; vectors are base64 of
        little-endian float64. n_rows, d_in and layout (PartLayout); of the values as they are read back: sum and
        sum_sq_by_dim (of the values and of their squares, per dimension), sum_sq (of the squared norms), sum_norm (of
        the norms) and median_norm.
    """
    (seq, pos, token), (n_rows, d_in) = identity, act.shape
    found = Moments(n_rows, d_in, encoding)
    layout = write_part(
        path,
        act,
        seq,
        pos,
        token,
        row_group_rows=row_group_rows,
        encoding=encoding,
        durable=durable,
        alongside=found.add,
    )
    norms = found.sq_norms.sqrt_().numpy()
    return {
        "n_rows": n_rows,
        "d_in": d_in,
        "layout": layout.model_dump(mode="json"),
        "sum": encode_vector(found.sum.numpy()),
        "sum_sq": float(found.sum_sq.sum()),
        "sum_sq_by_dim": encode_vector(found.sum_sq.numpy()),
        "sum_norm": float(norms.sum()),
        "median_norm": float(np.median(norms)),
    }
