"""The map: decoder directions in two dimensions, with the measured share of true neighbours that it keeps.

t-SNE (van der Maaten & Hinton 2008) on the graph of nearest decoder rows, each edge weighing the same, started from two
principal components (Kobak & Berens 2019). The repulsion of all pairs is a convolution, computed on a grid by FFT
(Linderman et al. 2019, arXiv:1712.09005), so that a step costs the number of latents. No random draw and no sum whose
order depends on threads: the same decoder gives the same bytes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae.philox import philox
from sae.progress import Progress
from sae.report import chunks
from sae.report.inputs import SAEInputs
from sae.weights import WEIGHTS_FILE, load_sae

METHOD = "t-SNE on the graph of each decoder row's {n} nearest by cosine, started from two principal components"
NEIGHBOURS = 10
"""Of each latent: how many attract it, and how many count when the share kept is measured."""
MIN_LATENTS = 50
"""Fewer are a list, not a map."""
MEASURED = 2048
"""Latents, drawn with a seed, for which the share of neighbours kept is measured."""
GRID = 1 << 16
"""Steps of a coordinate on the page: finer than any screen."""

_STEPS, _EARLY = 600, 200
"""Steps of gradient descent, and how many of them exaggerate the attraction, so that clusters find each other."""
_EXAGGERATION = 12.0
_MOMENTUM_EARLY, _MOMENTUM = 0.5, 0.8
_MAX_STEP = 5.0
"""A latent that is the neighbour of very many would overshoot (openTSNE: max_step_norm)."""
_SPACING, _MAX_NODES = 0.4, 512
"""Of the grid of the repulsion, in units of the kernel's width; wider where the map outgrows the nodes."""


@dataclass(frozen=True)
class DecoderMap:
    """Where each latent lies, and how far to trust it."""

    xy: np.ndarray
    """[d_sae, 2] uint16, the longer side filling the range; y grows upwards."""
    method: str
    n_neighbours: int
    kept: float
    """Share of the true nearest neighbours by cosine that are among as many nearest in the map."""
    kept_by_components: float
    """The same for the first two principal components."""
    n_measured: int


def write_map(folder: Path, inputs: SAEInputs, seed: int, progress: Progress) -> bool:
    """Write data/<sae>/map.js and the columns map_x and map_y. Returns: whether this SAE has a map.

    It has none without weights, and where it has fewer than MIN_LATENTS latents or the statistics list no neighbours.
    """
    neighbours = neighbour_table(inputs)
    if neighbours is None or not (inputs.sae_folder / WEIGHTS_FILE).exists():
        return False
    found = decoder_map(load_sae(inputs.sae_folder).W_dec.float().numpy(), neighbours, seed, progress, inputs.key)
    base = f"data/{inputs.key}"
    for axis, name in enumerate("xy"):
        chunks.write_chunk(folder, f"{base}/col/map_{name}", chunks.encode_column(found.xy[:, axis].astype(np.uint32)))
    about: dict[str, Any] = {
        "schema": chunks.SCHEMA_VERSION,
        "method": found.method,
        "neighbours": found.n_neighbours,
        "kept": round(found.kept, 4),
        "keptByComponents": round(found.kept_by_components, 4),
        "measured": found.n_measured,
        "grid": GRID,
    }
    chunks.write_chunk(folder, f"{base}/map", chunks.encode_json(about))
    return True


def neighbour_table(inputs: SAEInputs) -> np.ndarray | None:
    """The nearest decoder rows of each latent, from the statistics. [d_sae, <= NEIGHBOURS]; None: nothing to draw."""
    lists = inputs.latents["neighbours"].combine_chunks()
    n_latents = len(lists)
    width = min((NEIGHBOURS, *lists.value_lengths().to_pylist()))
    if n_latents < MIN_LATENTS or width == 0:
        return None
    starts = np.concatenate([[0], np.cumsum(lists.value_lengths().to_numpy(zero_copy_only=False))[:-1]])
    flat = lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    return flat[starts[:, None] + np.arange(width)]


def decoder_map(
    W_dec: np.ndarray, neighbours: np.ndarray, seed: int, progress: Progress, name: str = "decoder"
) -> DecoderMap:
    """Lay the decoder out in two dimensions and measure how much of it that keeps.

    Args:
        W_dec: decoder rows; only their directions count. [d_sae, d_in] float32
        neighbours: nearest rows by cosine, without the row itself. [d_sae, n]
        seed: of the sample of latents on which the share kept is measured.
    """
    norms = np.linalg.norm(W_dec, axis=1, keepdims=True)
    unit = W_dec / np.where(norms > 0, norms, 1)
    components = principal_components(unit)
    xy = layout(components, neighbours, progress, name)
    sample = np.sort(philox("map sample", seed).permutation(len(unit))[:MEASURED])
    n = neighbours.shape[1]
    truth = _nearest(unit, sample, n, cosine=True)
    return DecoderMap(
        xy=_quantised(xy),
        method=METHOD.format(n=n),
        n_neighbours=n,
        kept=_overlap(truth, _nearest(xy, sample, n, cosine=False)),
        kept_by_components=_overlap(truth, _nearest(components, sample, n, cosine=False)),
        n_measured=len(sample),
    )


def principal_components(unit: np.ndarray) -> np.ndarray:
    """The rows' first two principal components. unit: [n, d] -> [n, 2] float64.

    Signs are fixed and the result is rounded: BLAS may differ in the last bits from one thread count to another, and
    the descent would make a different map of it.
    """
    centred = unit - unit.mean(axis=0, dtype=np.float64)
    axes = np.linalg.eigh(centred.T @ centred)[1][:, :-3:-1]
    if axes.shape[1] < 2:
        axes = np.concatenate([axes, np.zeros((len(axes), 2 - axes.shape[1]))], axis=1)
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), np.arange(2)] < 0, -1, 1)
    found: np.ndarray = np.round(centred @ axes, 6)
    return found


def layout(start: np.ndarray, neighbours: np.ndarray, progress: Progress, name: str = "decoder") -> np.ndarray:
    """t-SNE from `start` with equal affinities along the edges of the neighbour graph.

    Args:
        start: [n, 2]
        neighbours: [n, k]; the graph is made symmetric: each edge attracts both its ends.

    Returns: [n, 2] float64.
    """
    n, k = neighbours.shape
    rate = n / _EXAGGERATION  # Belkina et al. 2019, doi:10.1038/s41467-019-13055-y: needs no adaptive gains
    y = 1e-2 * start / max(float(start[:, 0].std()), 1e-12)
    velocity = np.zeros_like(y)
    ends = neighbours.ravel()
    for step in range(_STEPS):
        early = step < _EARLY
        away = y[neighbours] - y[:, None]
        pull = away / (1 + (away * away).sum(axis=2, keepdims=True))
        attraction = pull.sum(axis=1) - np.stack(
            [np.bincount(ends, pull[:, :, axis].ravel(), minlength=n) for axis in (0, 1)], axis=1
        )
        push, total = repulsion(y)
        gradient = 4 * ((_EXAGGERATION if early else 1.0) / (2 * n * k) * attraction + push / total)
        velocity = (_MOMENTUM_EARLY if early else _MOMENTUM) * velocity + rate * gradient
        size = np.sqrt((velocity * velocity).sum(axis=1, keepdims=True))
        velocity *= _MAX_STEP / np.maximum(size, _MAX_STEP)
        y = y + velocity
        if step % 25 == 0:
            progress(step, _STEPS, "steps of the map", name)
    return y


def repulsion(y: np.ndarray) -> tuple[np.ndarray, float]:
    """Sums over all pairs, with q = 1 / (1 + distance^2): sum_j q_ij^2 (y_i - y_j) for each i, and sum_ij q_ij.

    Charges are spread over 3 x 3 nodes of a grid (quadratic interpolation), convolved with the kernel there, and read
    back from the same nodes. y: [n, 2] -> [n, 2] and a number.
    """
    low = y.min(axis=0)
    extent = float((y.max(axis=0) - low).max())
    spacing = max(_SPACING, extent / (_MAX_NODES - 4))
    size = int(extent / spacing) + 4
    place = (y - low) / spacing + 1
    node = np.rint(place).astype(np.int64)
    t = place - node
    taps = np.stack([t * (t - 1) / 2, 1 - t * t, t * (t + 1) / 2])
    nodes = np.concatenate([(node[:, 0] + i - 1) * size + node[:, 1] + j - 1 for i in range(3) for j in range(3)])
    weights = np.concatenate([taps[i, :, 0] * taps[j, :, 1] for i in range(3) for j in range(3)])
    padded = 1 << (2 * size - 1).bit_length()
    along = np.minimum(np.arange(padded), padded - np.arange(padded)) * spacing
    kernel = 1 / (1 + along[:, None] ** 2 + along[None] ** 2)
    first, second = np.fft.rfft2(kernel), np.fft.rfft2(kernel * kernel)

    def spread(charge: np.ndarray) -> np.ndarray:
        grid = np.bincount(nodes, weights * np.tile(charge, 9), minlength=size * size)
        return np.fft.rfft2(grid.reshape(size, size), s=(padded, padded))

    def read(transformed: np.ndarray) -> np.ndarray:
        grid = np.fft.irfft2(transformed, s=(padded, padded))[:size, :size].ravel()
        values: np.ndarray = (grid[nodes] * weights).reshape(9, -1).sum(axis=0)
        return values

    ones = spread(np.ones(len(y)))
    total = float(read(ones * first).sum()) - len(y)
    around = read(ones * second)
    push = np.stack([y[:, axis] * around - read(spread(y[:, axis]) * second) for axis in (0, 1)], axis=1)
    return push, max(total, 1e-9)


def _nearest(points: np.ndarray, sample: np.ndarray, n: int, *, cosine: bool) -> np.ndarray:
    """The n nearest points of each sampled one, without itself. points: [rows, d] -> [len(sample), n]

    Memory: a block of rows against all points.
    """
    data = torch.from_numpy(np.ascontiguousarray(points, dtype=np.float64 if points.shape[1] == 2 else np.float32))
    squares = (data * data).sum(dim=1)
    found = np.empty((len(sample), n), np.int64)
    block = max(1, (1 << 24) // len(points))
    for start in range(0, len(sample), block):
        rows = torch.from_numpy(sample[start : start + block])
        closeness = data[rows] @ data.T
        if not cosine:
            closeness = 2 * closeness - squares
        closeness[torch.arange(len(rows)), rows] = -torch.inf
        found[start : start + block] = closeness.topk(n, dim=1).indices.numpy()
    return found


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Mean share of the entries of a row of `a` that are in the same row of `b`. [rows, n] each"""
    return float((a[:, :, None] == b[:, None, :]).any(axis=2).mean())


def _quantised(xy: np.ndarray) -> np.ndarray:
    """Coordinates as uint16, both axes at one scale, the shorter one centred."""
    low, high = xy.min(axis=0), xy.max(axis=0)
    span = max(float((high - low).max()), 1e-12)
    centred = (xy - (low + high) / 2) / span + 0.5
    return np.round(centred * (GRID - 1)).clip(0, GRID - 1).astype(np.uint16)
