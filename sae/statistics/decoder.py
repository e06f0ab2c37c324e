"""What the decoder alone says about latents: which point the same way, and which tokens they promote."""

from typing import NamedTuple

import torch
from torch import Tensor

from sae.progress import Progress, silent

BLOCK_ELEMENTS = 1 << 24
"""Elements of the largest temporary matrix (64 MiB of float32)."""


class Ranked(NamedTuple):
    """Indices and their values, best first, per latent."""

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

    Memory: blocks of rows; never [d_sae, d_sae].
    """
    d_sae = len(W_dec)
    n = min(n, d_sae - 1)
    unit = torch.nn.functional.normalize(W_dec.float(), dim=1)
    index = torch.empty((d_sae, n), dtype=torch.int64)
    value = torch.empty((d_sae, n))
    block = max(1, BLOCK_ELEMENTS // d_sae)
    for start in range(0, d_sae, block):
        rows = torch.arange(start, min(start + block, d_sae))
        cosines = unit[rows] @ unit.T
        cosines[torch.arange(len(rows)), rows] = -torch.inf
        value[rows], index[rows] = cosines.topk(n, dim=1)
        progress(start + len(rows), d_sae, "latents", "neighbours")
    return Ranked(index, value.clamp(-1, 1))


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
    to_logits = to_logits.float()
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
    return Ranked(index, unit.gather(1, index))
