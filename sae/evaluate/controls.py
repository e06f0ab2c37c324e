"""Other ways to write an activation as a few coordinates, at the SAE's own sparsity: what its figures are held against.

- `neurons`: the k dimensions of the hook point that lie farthest from their mean.
- `pca`: the k principal coordinates of largest magnitude; components of the training rows.
- `random`: of as many random unit directions as the SAE has latents, the k with the largest positive projection, times
  one scale per row that is best for that row. (Least squares over the k directions gains .01 FVU at d_in = 512.)

All three are told the mean of the training rows.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sae.evaluate.interpretability import UnitFirings
from sae.evaluate.reconstruction import FiringsKeeper
from sae.philox import philox
from sae.progress import Progress, silent
from sae.store.reading.blocks import iter_rows
from sae.store.snapshots.snapshot import Snapshot
from sae.store.storage.filesystem import Storage

NAMES = ("neurons", "pca", "random")
MAX_PCA_ROWS = 1 << 17
"""Training rows behind the principal components."""
MAX_PCA_WIDTH = 8192
"""Wider hook points get no PCA: its matrix has d_in^2 float64 and takes d_in^3 operations."""


class Code(NamedTuple):
    """Rows written with k units each."""

    x_hat: Tensor
    """[rows, d_in]"""
    unit: Tensor
    """int64 [rows, k]"""
    value: Tensor
    """Not negative; a unit of value 0 does not fire. [rows, k]"""


class Control(Protocol):
    """Writes rows with a few units."""

    n_units: int
    mean: Tensor
    """On the device of all its tensors. [d_in]"""

    def code(self, x: Tensor) -> Code:
        """x: on that device. [rows, d_in] float32"""


class Coordinates:
    """The k coordinates of largest magnitude in an orthonormal basis, about the mean.

    A coordinate has two sides, which are units of their own: unit 2c is coordinate c above the mean, 2c + 1 below.
    """

    def __init__(self, mean: Tensor, k: int, basis: Tensor | None = None) -> None:
        """basis: directions as columns [d_in, d_in]; None: the dimensions themselves."""
        self.mean, self.basis = mean, basis
        self.k = min(k, len(mean))
        self.n_units = 2 * len(mean)

    def code(self, x: Tensor) -> Code:
        """As Control.code."""
        coordinates = self.all(x)
        chosen = coordinates.abs().topk(self.k, dim=1, sorted=False).indices
        value = coordinates.gather(1, chosen)
        kept = torch.zeros_like(coordinates).scatter_(1, chosen, value)
        x_hat = self.mean + (kept if self.basis is None else kept @ self.basis.T)
        return Code(x_hat, 2 * chosen + (value < 0), value.abs())

    def all(self, x: Tensor) -> Tensor:
        """Every coordinate, signed. [rows, d_in]"""
        centred = x - self.mean
        return centred if self.basis is None else centred @ self.basis


class RandomDictionary:
    """TopK over random unit directions, with the best single scale per row."""

    def __init__(self, mean: Tensor, k: int, n_units: int, seed: int) -> None:
        self.mean, self.n_units = mean, n_units
        self.k = min(k, n_units)
        self.directions = random_directions(n_units, len(mean), seed).to(mean.device)

    def code(self, x: Tensor) -> Code:
        """As Control.code."""
        centred = x - self.mean
        value, unit = (centred @ self.directions.T).topk(self.k, dim=1, sorted=False)
        value = value.relu()
        summed = F.embedding_bag(unit, self.directions, mode="sum", per_sample_weights=value)
        norm_sq = summed.square().sum(dim=1, keepdim=True)
        scale = (centred * summed).sum(dim=1, keepdim=True) / norm_sq.clamp_min(torch.finfo(norm_sq.dtype).tiny)
        return Code(self.mean + scale * summed, unit, value)


class ControlFindings(NamedTuple):
    """What one pass over the rows found."""

    n_rows: int
    squared_error: dict[str, float]
    """Control -> sum of ||x - x_hat||^2."""
    squared_deviation: float
    """Sum of ||x - mean||^2, the mean of the whole snapshot."""
    firings: dict[str, UnitFirings]
    """Of `pca` and `random`; in order of their rows."""


def k_of(l0: float) -> int:
    """The controls' sparsity beside an SAE of that L0: rounded up, at least 1."""
    return max(1, math.ceil(l0 - 1e-9))


def make_controls(
    storage: Storage, train: Snapshot, l0: float, d_sae: int, seed: int, device: torch.device | str = "cpu"
) -> dict[str, Control]:
    """The controls of one SAE; `pca` is missing where the hook point is too wide for it."""
    mean, k = torch.tensor(train.mean, dtype=torch.float32, device=device), k_of(l0)
    controls: dict[str, Control] = {"neurons": Coordinates(mean, k)}
    if train.d_in <= MAX_PCA_WIDTH:
        controls["pca"] = Coordinates(mean, k, principal_directions(storage, train, device=device))
    controls["random"] = RandomDictionary(mean, k, d_sae, seed)
    return controls


def random_directions(n: int, d_in: int, seed: int) -> Tensor:
    """Unit vectors, uniform over the sphere. [n, d_in] float32"""
    drawn = philox("random directions", seed).standard_normal((n, d_in), dtype=np.float32)
    return F.normalize(torch.from_numpy(drawn), dim=1)


def principal_directions(
    storage: Storage, snapshot: Snapshot, max_rows: int = MAX_PCA_ROWS, device: torch.device | str = "cpu"
) -> Tensor:
    """Principal directions of a snapshot's first rows about its mean, the strongest first, as columns.

    Returns: on the device. [d_in, d_in] float32
    """
    mean = torch.tensor(snapshot.mean, dtype=torch.float32, device=device)
    moments = torch.zeros((snapshot.d_in, snapshot.d_in), dtype=torch.float64, device=device)
    n_rows = 0
    for block in iter_rows(storage, snapshot):
        centred = torch.from_numpy(block.act[: max_rows - n_rows].astype(np.float32)).to(device) - mean
        moments += (centred.T @ centred).double()
        n_rows += len(centred)
        if n_rows >= max_rows:
            break
    return torch.linalg.eigh(moments).eigenvectors.flip(1).float()


@torch.inference_mode()
def measure_controls(
    storage: Storage,
    controls: Mapping[str, Control],
    snapshot: Snapshot,
    max_rows: int,
    keep_rows: int = 0,
    *,
    progress: Progress = silent,
) -> ControlFindings:
    """Reconstruct the first `max_rows` rows of a snapshot with every control.

    Args:
        keep_rows: firings of the first so many rows are kept.
    """
    (device,) = {control.mean.device for control in controls.values()}
    mean = torch.tensor(snapshot.mean, dtype=torch.float32, device=device)
    errors, deviation = dict.fromkeys(controls, 0.0), 0.0
    firings = {name: FiringsKeeper(keep_rows) for name in controls if name != "neurons"}
    n_rows, total = 0, min(max_rows, snapshot.n_rows)
    for block in iter_rows(storage, snapshot):
        x = torch.from_numpy(block.act[: max_rows - n_rows].astype(np.float32)).to(device)
        deviation += _sum_of_squares(x - mean)
        for name, control in controls.items():
            found = control.code(x)
            errors[name] += _sum_of_squares(x - found.x_hat)
            if name in firings and keep_rows:
                row, column = torch.nonzero(found.value > 0, as_tuple=True)
                unit, value = found.unit[row, column], found.value[row, column]
                unit, row, value = unit.cpu(), row.cpu(), value.cpu()
                firings[name].add(unit.numpy(), row.numpy(), value.numpy(), len(x))
        n_rows += len(x)
        progress(n_rows, total, "rows", "controls")
        if n_rows >= max_rows:
            break
    return ControlFindings(n_rows, errors, deviation, {name: keeper.all() for name, keeper in firings.items()})


def control_figures(found: ControlFindings, l0: float) -> dict[str, Any]:
    """The part of evaluation.json about the controls' reconstruction."""
    errors, deviation = found.squared_error, found.squared_deviation
    return {
        "k": k_of(l0),
        "n_rows": found.n_rows,
        "definitions": {
            "neurons": "the k dimensions farthest from their mean are kept, the others set to it",
            "pca": "the k principal coordinates of largest magnitude are kept (components of the training rows)",
            "random": "TopK over as many random unit directions as there are latents, one best scale per row",
        },
        "fvu": {name: errors[name] / deviation if name in errors and deviation else None for name in NAMES},
    }


def _sum_of_squares(rows: Tensor) -> float:
    """Rows in float32, their sum in float64."""
    return float(rows.square().sum(dim=1).double().sum())
