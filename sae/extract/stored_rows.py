"""The rows of a part in the order they are stored, picked from the order they were computed in as they are written."""

import itertools

import numpy as np
import torch
from torch import Tensor

from sae.store.part.encoding import Encoding, encode_as, stored_dtype
from sae.store.part.writer import BLOCKS_IN_USE

PICKED_BYTES = 1 << 18
"""Picked at once to find bounds: they stay in a core's own cache."""


class StoredRows:
    """What `write_part` takes in place of an array: its rows are picked and encoded when they are sliced.

    So a part is permuted without a copy of it, and its values are hashed, summed and written while the cache has them.

    Args:
        held: the rows in the order they were computed, among others. [tokens, d_in]
        order: where in `held` each row is. [rows] int64
        encoding: of the stored values. What is held is stored as it is, unless that is int8.
    """

    def __init__(self, held: Tensor, order: np.ndarray, encoding: Encoding) -> None:
        self._held, self._order, self._encoding = held, order, encoding
        self.shape, self.dtype = (len(order), held.shape[1]), stored_dtype(encoding.dtype)
        self._blocks = [held[:0]] * BLOCKS_IN_USE
        self._turns = itertools.cycle(range(BLOCKS_IN_USE))

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Stored values, good until the second next are asked for. [rows, d_in] of `stored_dtype`"""
        order, turn = self._order[rows], next(self._turns)
        if len(self._blocks[turn]) < len(order):
            self._blocks[turn] = torch.empty((len(order), self.shape[1]), dtype=self._held.dtype)
        block = _pick(self._held, order, self._blocks[turn][: len(order)])
        if self._encoding.dtype == "int8":
            return encode_as(block, self._encoding)
        return (block.view(torch.uint16) if block.dtype == torch.bfloat16 else block).numpy()


def bounds(held: Tensor, order: np.ndarray) -> tuple[Tensor, Tensor]:
    """Least and greatest value of every dimension of some rows. [d_in] each

    Args:
        held, order: as StoredRows takes them.
    """
    low, high = torch.full_like(held[0], torch.inf), torch.full_like(held[0], -torch.inf)
    step = max(1, PICKED_BYTES // (held.shape[1] * held.itemsize))
    block = torch.empty((step, held.shape[1]), dtype=held.dtype)
    for start in range(0, len(order), step):
        some = order[start : start + step]
        picked = _pick(held, some, block[: len(some)])
        low, high = torch.minimum(low, picked.amin(0)), torch.maximum(high, picked.amax(0))
    return low, high


def _pick(held: Tensor, order: np.ndarray, out: Tensor) -> Tensor:
    np.take(_as_items(held), order, out=_as_items(out), mode="clip")  # the default mode takes into a buffer of its own
    return out


def _as_items(rows: Tensor) -> np.ndarray:
    """Rows as one item each, which are copied whole. [rows] of void"""
    items = rows.view(torch.uint8).numpy()
    return items.view(f"V{items.shape[1]}")[:, 0]
