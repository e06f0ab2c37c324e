"""Activation sets on which training is compared: two synthetic dictionaries whose features are known, and given rows.

All rows are scaled to a mean squared element of 1, which is about what every peer's own normalisation gives.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sae.philox import philox

D_IN = 256
BLOCK_ROWS = 16_384


@dataclass(frozen=True)
class ActivationSet:
    """Rows to train on, rows to measure on, and the true features where they are known."""

    name: str
    train: Tensor
    """[rows, d_in]"""
    heldout: Tensor
    """[rows, d_in]"""
    features: Tensor | None = None
    """Unit rows. [n_features, d_in]"""


def dictionary(n_rows: int, n_heldout: int) -> ActivationSet:
    """Independent features in random directions; the most frequent is about 70 times as frequent as the rarest.

    x = sum of size * feature + noise; presence by a power law of the rank, sizes 1 + Exp(1) halved, noise of 2 % of the
    row's size.
    """
    n_features, mean_present = 1536, 24.0
    rng = philox("benchmark dictionary", n_features, D_IN)
    features = _unit(rng.standard_normal((n_features, D_IN)))
    frequency = (np.arange(n_features) + 8.0) ** -0.8
    frequency *= mean_present / frequency.sum()

    def present(n: int) -> np.ndarray:
        return rng.random((n, n_features), dtype=np.float32) < np.minimum(frequency, 0.5)

    return _drawn("dictionary", present, features, rng, n_rows, n_heldout)


def hierarchy(n_rows: int, n_heldout: int) -> ActivationSet:
    """Features of two levels: a child is present only where its parent is, and leans towards it (cosine .4).

    The rows' mean is not zero, as in residual streams.
    """
    n_parents, n_children, mean_parents = 64, 15, 6.0
    rng = philox("benchmark hierarchy", n_parents, n_children, D_IN)
    parents = _unit(rng.standard_normal((n_parents, D_IN)))
    own = _unit(rng.standard_normal((n_parents, n_children, D_IN)))
    children = _unit(own + 0.45 * parents[:, None])
    features = np.concatenate([parents, children.reshape(-1, D_IN)])
    likely = rng.dirichlet(np.full(n_children, 0.5), size=n_parents).astype(np.float32)

    def present(n: int) -> np.ndarray:
        parent = rng.random((n, n_parents), dtype=np.float32) < mean_parents / n_parents
        child = rng.random((n, n_parents, n_children), dtype=np.float32) < np.minimum(2 * likely, 0.8)
        child &= parent[:, :, None]
        return np.concatenate([parent, child.reshape(n, -1)], axis=1)

    offset = 3 * _unit(rng.standard_normal((1, D_IN)))
    return _drawn("hierarchy", present, features, rng, n_rows, n_heldout, offset)


def given(name: str, train: Path, heldout: Path, n_rows: int) -> ActivationSet:
    """Rows of two .npy files as `sae-pipeline store export` writes them, drawn in a random order, each once at most.

    Raises: ValueError when there are fewer than `n_rows`.
    """
    rows = np.load(train, mmap_mode="r")
    if len(rows) < n_rows:
        raise ValueError(
            f"{train} has {len(rows):,} rows, {n_rows:,} are asked for. Extract more (activations.n_tokens)."
        )
    order = philox("benchmark rows", name).permutation(len(rows))[:n_rows]
    x = torch.from_numpy(rows[order]).float()
    scale = x.square().mean().rsqrt()
    return ActivationSet(name, x * scale, torch.from_numpy(np.load(heldout)).float() * scale)


def _unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def _drawn(
    name: str,
    present: Callable[[int], np.ndarray],
    features: np.ndarray,
    rng: np.random.Generator,
    n_rows: int,
    n_heldout: int,
    offset: np.ndarray | float = 0.0,
) -> ActivationSet:
    blocks = []
    for start in range(0, n_rows + n_heldout, BLOCK_ROWS):
        n = min(BLOCK_ROWS, n_rows + n_heldout - start)
        sizes = 0.5 + 0.5 * rng.standard_exponential((n, len(features)), dtype=np.float32)
        rows = (present(n) * sizes) @ features + offset
        rows += 0.02 * np.linalg.norm(rows, axis=1, keepdims=True) / D_IN**0.5 * rng.standard_normal(rows.shape)
        blocks.append(torch.from_numpy(rows.astype(np.float32)))
    x = torch.cat(blocks)
    x *= x[:n_rows].square().mean().rsqrt()
    return ActivationSet(name, x[:n_rows], x[n_rows:], F.normalize(torch.from_numpy(features), dim=1))
