"""How many of the known true features a dictionary holds, and how many a random one would."""

import torch.nn.functional as F
from torch import Tensor, from_numpy

from sae.config import FrozenConfig
from sae.errors import InputError
from sae.philox import philox

RECOVERED_ABOVE = 0.95
"""Cosine from which a true feature counts as recovered."""
N_RANDOM = 20
"""Random dictionaries behind the baseline."""


class Recovery(FrozenConfig):
    """True features matched to decoder rows by their largest cosine."""

    n_features: int
    d_sae: int
    mmcs: float
    """Mean over true features of the largest cosine to a decoder row. In few dimensions chance is high: see
    `random_mmcs` before reading it."""
    min_cosine: float
    """Of the worst matched feature."""
    recovered: float
    """Share of the true features with a cosine above 0.95."""
    random_mmcs: float
    """The same for random unit directions, as many as d_sae: mean over 20 draws."""
    random_recovered: float
    latents: tuple[int, ...]
    """The best decoder row of each true feature. [n_features]"""
    cosines: tuple[float, ...]
    """[n_features]"""


def measure_recovery(true_directions: Tensor, W_dec: Tensor, seed: int = 0) -> Recovery:
    """Match true feature directions to decoder rows.

    Args:
        true_directions: any norm but zero. [n_features, d_in]
        W_dec: [d_sae, d_in]
        seed: of the random dictionaries.

    Raises: InputError when the widths differ.
    """
    if true_directions.shape[1] != W_dec.shape[1]:
        raise InputError(
            f"true directions of width {true_directions.shape[1]}, decoder rows of width {W_dec.shape[1]}: "
            f"they belong to other data"
        )
    true = F.normalize(true_directions.double(), dim=1)
    cosines, latents = (true @ F.normalize(W_dec.detach().double(), dim=1).T).max(dim=1)
    rng = philox("random dictionary", seed)
    chance = [
        (true @ F.normalize(from_numpy(rng.standard_normal(tuple(W_dec.shape))), dim=1).T).amax(dim=1)
        for _ in range(N_RANDOM)
    ]
    return Recovery(
        n_features=len(true),
        d_sae=len(W_dec),
        mmcs=float(cosines.mean()),
        min_cosine=float(cosines.min()),
        recovered=float((cosines > RECOVERED_ABOVE).double().mean()),
        random_mmcs=sum(float(c.mean()) for c in chance) / N_RANDOM,
        random_recovered=sum(float((c > RECOVERED_ABOVE).double().mean()) for c in chance) / N_RANDOM,
        latents=tuple(latents.tolist()),
        cosines=tuple(cosines.tolist()),
    )
