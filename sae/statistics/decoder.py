"""What the decoder alone says about latents: which point the same way, and which tokens they promote."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sae.progress import Progress, silent

BLOCK_ELEMENTS = 1 << 24
"""Elements of the largest temporary matrix (64 MiB of float32)."""


class Ranked(NamedTuple):
    """Indices and their values, best first, per latent, on the CPU."""

    indices: Tensor
    """[d_sae, n] int64"""
    value: Tensor
    """[d_sae, n] float32"""


@torch.inference_mode()
def nearest_decoders(W_dec: Tensor, n: int, progress: Progress = silent) -> Ranked:
    """The n latents whose decoder rows have the largest cosine with each latent's, without itself.

    Args:
        W_dec: decoder rows; a row of zeros has cosine 0 with all others. [d_sae, d_in]
        n: cut to d_sae - 1.

    Memory: two blocks of BLOCK_ELEMENTS; never [d_sae, d_sae], and no second decoder.
    """
    d_sae, found = len(W_dec), []
    for rows in blocks(slice(0, d_sae), d_sae):
        found.append(nearest_to(W_dec, rows, n))
        progress(rows.stop, d_sae, "latents", "neighbours")
    return Ranked(*map(torch.cat, zip(*found, strict=True)))


@torch.inference_mode()
def nearest_to(W_dec: Tensor, rows: slice, n: int, device: torch.device | None = None) -> Ranked:
    """`nearest_decoders` of some latents, as many as `blocks` gives at once. Both [rows, n]

    Args:
        device: where they are compared; None: where they are. Blocks of decoder rows are brought there one by one.
    """
    d_sae, n_rows, device = len(W_dec), rows.stop - rows.start, device or W_dec.device
    these, cosines = _unit(W_dec[rows].to(device)), torch.empty(n_rows, d_sae, device=device)
    for some in blocks(slice(0, d_sae), W_dec.shape[1]):
        torch.mm(these, _unit(W_dec[some].to(device)).T, out=cosines[:, some])
    own = torch.arange(n_rows, device=device)
    cosines[own, own + rows.start] = -torch.inf
    value, index = cosines.topk(min(n, d_sae - 1), dim=1)
    return Ranked(index.cpu(), value.clamp_(-1, 1).cpu())


def blocks(rows: slice, width: int) -> Iterator[slice]:
    """Intervals of `rows`, each of BLOCK_ELEMENTS numbers at most when a row has `width`."""
    block = max(1, BLOCK_ELEMENTS // width)
    for start in range(rows.start, rows.stop, block):
        yield slice(start, min(start + block, rows.stop))


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.float(), dim=1)


@torch.inference_mode()
def logit_effects(W_dec: Tensor, to_logits: Tensor, n: int, progress: Progress = silent) -> tuple[Ranked, Ranked]:
    """The n tokens whose logits a unit of each latent raises most, and those it lowers most, by the direct path.

    Each latent's effects are taken about their mean over the vocabulary, which no probability depends on.

    Args:
        W_dec: [d_sae, d_in]
        to_logits: `sae.subject.hooks.direct_logit_matrix`. [d_in, vocab]
        n: cut to the vocabulary.
    """
    d_sae, n_vocab = len(W_dec), to_logits.shape[1]
    n = min(n, n_vocab)
    up = Ranked(torch.empty((d_sae, n), dtype=torch.int64), torch.empty((d_sae, n)))
    down = Ranked(torch.empty((d_sae, n), dtype=torch.int64), torch.empty((d_sae, n)))
    to_logits = to_logits.float().to(W_dec.device)
    block = max(1, BLOCK_ELEMENTS // n_vocab)
    for start in range(0, d_sae, block):
        rows = slice(start, min(start + block, d_sae))
        effects = W_dec[rows].float() @ to_logits
        effects -= effects.mean(dim=1, keepdim=True)
        for ranked, largest in ((up, True), (down, False)):
            ranked.value[rows], ranked.indices[rows] = effects.topk(n, dim=1, largest=largest)
        progress(min(start + block, d_sae), d_sae, "latents", "logits")
    return up, down


@torch.inference_mode()
def nearest_neurons(W_dec: Tensor, n: int) -> Ranked:
    """The n dimensions of the hook point along which each decoder row points most: cosines with the basis, signed.

    Args:
        W_dec: [d_sae, d_in]
        n: cut to d_in.
    """
    unit = torch.nn.functional.normalize(W_dec.float(), dim=1)
    index = unit.abs().topk(min(n, W_dec.shape[1]), dim=1).indices
    return Ranked(index.cpu(), unit.gather(1, index).cpu())
