"""Pre-activations tile by tile, and what is selected from them: the [batch, d_sae] matrix is never made."""

from collections.abc import Iterator

import torch
from torch import Tensor

TILE_ROWS = 512
"""At this height a tile of the usual widths stays in a CPU's caches until its rows are selected, and the library still
reaches its full speed."""
GPU_TILE_BYTES = 1 << 28
"""A GPU is filled by higher tiles; beyond this they take memory and save no time."""
SLABS = 8
"""Latents that share one maximum in the first stage of `top_k`."""


def tile_rows(row_bytes: int, device: str) -> int:
    """Rows of a tile.

    Args:
        row_bytes: of a row's pre-activations.
        device: its type.
    """
    return TILE_ROWS if device == "cpu" else max(TILE_ROWS, GPU_TILE_BYTES // row_bytes)


def iter_pre_acts(
    x_in: Tensor, W_enc: Tensor, b_enc: Tensor, dtype: torch.dtype | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their pre-activations [..., tile rows, d_sae], all in one buffer: each is gone when the next is made.

    Args:
        x_in: what the encoder sees. [..., batch, d_in]
        dtype: of the product; None: that of `x_in`.
    """
    n_rows, dtype = x_in.shape[-2], dtype or x_in.dtype
    W_enc, b_enc = W_enc.to(dtype), b_enc.to(dtype)
    height = tile_rows(b_enc.nbytes, W_enc.device.type)
    buffer = W_enc.new_empty(*W_enc.shape[:-2], min(height, n_rows), W_enc.shape[-2])
    for start in range(0, n_rows, height):
        rows = slice(start, min(start + height, n_rows))
        tile = x_in[..., rows, :].to(dtype)
        yield rows, _affine(tile, W_enc, b_enc, out=buffer[..., : rows.stop - start, :])


def _affine(x_in: Tensor, W_enc: Tensor, b_enc: Tensor, out: Tensor) -> Tensor:
    if x_in.device.type == "cuda" and x_in.ndim == 2:
        return torch.addmm(b_enc, x_in, W_enc.T, out=out)  # in one pass over what comes out, which on a CPU it is not
    return torch.matmul(x_in, W_enc.mT, out=out).add_(b_enc.unsqueeze(-2))


def top_k(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their latents, in no order. [rows, d_sae] -> two of [rows, k]

    Exact: a row's k largest lie in the k slabs with the largest maxima. Slab s holds the latents that are s modulo
    d_sae / SLABS, so that all maxima are one vectorised pass. Where latents tie for the last place, which are taken is
    decided by that row alone; the values are those of torch.topk.
    """
    n_rows, d_sae = pre_acts.shape
    n_slabs = d_sae // SLABS
    if d_sae % SLABS or n_slabs <= 2 * k:
        values, latents = pre_acts.topk(k, dim=1, sorted=False)
        return values, latents
    maxima = pre_acts.view(n_rows, SLABS, n_slabs).amax(dim=1)
    slabs = maxima.topk(k, dim=1, sorted=False).indices
    members = torch.arange(0, d_sae, n_slabs, device=pre_acts.device).unsqueeze(1)
    candidates = (slabs.unsqueeze(1) + members).view(n_rows, SLABS * k)
    values, chosen = pre_acts.gather(1, candidates).topk(k, dim=1, sorted=False)
    return values, candidates.gather(1, chosen)


def select_topk(
    x_in: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations of each row and their latents, in no order. Both [batch, k].

    Args:
        dtype: of the product and of the values; None: that of `x_in`.
    """
    values = torch.empty(len(x_in), k, dtype=dtype or x_in.dtype, device=x_in.device)
    latents = torch.empty(len(x_in), k, dtype=torch.int64, device=x_in.device)
    for rows, pre_acts in iter_pre_acts(x_in, W_enc, b_enc, dtype):
        values[rows], latents[rows] = top_k(pre_acts, k)
    return values, latents


def select_batch_topk(
    x_in: Tensor, W_enc: Tensor, b_enc: Tensor, n: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The n largest positive pre-activations of the whole batch, sorted by row, then latent: values, rows, latents.

    Fewer than n where no more are positive. What ties for the last place is taken in this order, whatever the tiles.
    The n-th largest of the tiles so far is a lower bound for the n-th largest of all, so of each tile only what exceeds
    it is kept: a short list beside batch * d_sae values.
    """
    d_sae, bound = len(W_enc), 0.0
    values = torch.empty(0, dtype=dtype or x_in.dtype, device=x_in.device)
    places = torch.empty(0, dtype=torch.int64, device=x_in.device)
    for rows, pre_acts in iter_pre_acts(x_in, W_enc, b_enc, dtype):
        flat = pre_acts.view(-1)
        first = 0.0 if bound else _reached_by(pre_acts, n)
        passing = (flat >= first if first else flat > bound).nonzero().squeeze(1)
        values = torch.cat((values, flat[passing]))
        places = torch.cat((places, passing.add_(rows.start * d_sae)))
        if len(values) >= n:
            values, places, bound = _largest(values, places, n)
    return values, places // d_sae, places % d_sae


def _reached_by(pre_acts: Tensor, n: int) -> float:
    """A number that n of them reach, close to their n-th largest: the n-th largest maximum of a slab; 0.0: unknown."""
    n_rows, d_sae = pre_acts.shape
    if d_sae % SLABS or n_rows * d_sae // SLABS < n:
        return 0.0
    maxima = pre_acts.view(n_rows, SLABS, -1).amax(dim=1).flatten()
    return max(_nth_largest(maxima, n), 0.0)


def _largest(values: Tensor, places: Tensor, n: int) -> tuple[Tensor, Tensor, float]:
    """The n largest, in the order given, which also decides between equal ones; and the smallest of them."""
    bound = _nth_largest(values, n)
    above, tied = values > bound, values == bound
    n_tied = n - int(above.sum())
    kept = above.logical_or_(tied.logical_and_(tied.cumsum(dim=0) <= n_tied))
    return values[kept], places[kept], bound


def _nth_largest(values: Tensor, n: int) -> float:
    # Not kthvalue: on a GPU it is twenty times as slow, and where values descend it takes the square of their number.
    return float(values.topk(n, sorted=False).values.min())
