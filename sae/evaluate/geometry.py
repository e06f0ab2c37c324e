"""The decoder's directions: duplicates, how many dimensions they span, and what random directions would give."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sae.architectures.base import SAE
from sae.evaluate.controls import random_directions
from sae.metrics import BLOCK_ELEMENTS, max_cosines
from sae.philox import philox

DUPLICATE_ABOVE = 0.9
"""Cosine from which two decoder rows count as duplicates."""
MAX_COMPARED = 4096
"""Decoder rows, drawn at random, whose nearest other row is looked for among all."""


@torch.inference_mode()
def decoder_geometry(sae: SAE, seed: int) -> dict[str, Any]:
    """Figures of the decoder, and of as many random directions under `random`."""
    compared = np.sort(philox("compared rows", seed).permutation(sae.d_sae)[:MAX_COMPARED])
    random = random_directions(sae.d_sae, sae.d_in, seed).to(sae.W_dec.device)
    norms = sae.W_dec.norm(dim=1)
    n_rows = max(1, BLOCK_ELEMENTS // sae.d_in)
    pairs = ((sae.W_enc[i : i + n_rows].contiguous(), sae.W_dec[i : i + n_rows]) for i in range(0, sae.d_sae, n_rows))
    own_cosines = torch.cat([F.cosine_similarity(encoders, decoders, dim=1) for encoders, decoders in pairs])
    return {
        "n_compared": len(compared),
        "duplicate_above": DUPLICATE_ABOVE,
        "decoder": directions_figures(sae.W_dec, compared),
        "random": directions_figures(random, compared),
        "encoder_decoder_cosine": float(own_cosines.double().mean()),
        "norm_min": float(norms.min()),
        "norm_max": float(norms.max()),
        "d_in": sae.d_in,
    }


def directions_figures(W: Tensor, compared: np.ndarray) -> dict[str, Any]:
    """How alike directions are and how evenly they fill the space; their norms do not count.

    The participation ratio of the eigenvalues l of the directions' second moments, (sum l)^2 / sum l^2, is the number
    of dimensions that directions as uneven would fill evenly: at most the smaller of n and d_in.

    Args:
        W: [n, d_in]
        compared: which of them to look for a nearest other of. [m]
    """
    own = torch.from_numpy(compared.astype(np.int64)).to(W.device)
    unit = F.normalize(W.float(), dim=1)
    best = max_cosines(unit[own], unit, own).double()
    # The sum of squared eigenvalues is the squared norm of the matrix: no decomposition is needed.
    moments = unit.T @ unit if W.shape[1] <= len(W) else unit @ unit.T
    trace, sum_sq = float(moments.diagonal().double().sum()), float(moments.double().square().sum())
    return {
        "mean_max_cosine": float(best.mean()),
        "duplicate_share": float((best > DUPLICATE_ABOVE).double().mean()) if len(W) > 1 else None,
        "participation_ratio": trace**2 / sum_sq if sum_sq else None,
    }
