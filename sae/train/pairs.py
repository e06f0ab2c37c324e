"""The (row, latent) pairs of a batch, few beside batch * d_sae: decoding and gradients over them alone.

Everything is one operation, `embedding_bag`: sums of matrix rows by weight, with no [pairs, d_in] buffer. A row's
reconstruction is a bag of latents, a latent's gradient is a bag of rows.
"""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from sae.architectures import SAE
from sae.train.collectives import Collectives


class Pairs:
    """Pairs sorted by row. row, latent: int64 [pairs]"""

    def __init__(self, row: Tensor, latent: Tensor, n_rows: int, d_sae: int) -> None:
        self.row, self.latent = row, latent
        self._n_rows, self._d_sae = n_rows, d_sae

    @classmethod
    def of_rows(cls, values: Tensor, latents: Tensor, kept: Tensor | None, d_sae: int) -> tuple["Pairs", Tensor]:
        """The pairs of candidates of every row, and their values [pairs].

        Args:
            values, latents: [rows, k]
            kept: which of them are pairs. bool [rows, k]; None: all.
        """
        n_rows, k = latents.shape
        if kept is not None:
            return cls(kept.nonzero()[:, 0], latents[kept], n_rows, d_sae), values[kept]
        row = torch.arange(n_rows, device=latents.device).repeat_interleave(k)
        return cls(row, latents.flatten(), n_rows, d_sae), values.flatten()

    @cached_property
    def _row_starts(self) -> Tensor:
        return torch.searchsorted(self.row, torch.arange(self._n_rows, device=self.row.device))

    def decode(self, values: Tensor, W_dec: Tensor) -> Tensor:
        """Per row, the sum of value * W_dec[latent]. [pairs], [d_sae, d_in] -> [rows, d_in]"""
        return F.embedding_bag(self.latent, W_dec, self._row_starts, mode="sum", per_sample_weights=values)

    def dots(self, matrix: Tensor, vectors: Tensor) -> Tensor:
        """Per pair, dot(matrix[latent], vectors[row]): `decode`'s derivative. [d_sae, d_in], [rows, d_in] -> [pairs]"""
        # Asked for as a derivative, it would have the sums made first.
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            vectors, matrix, self.latent, self._row_starts, self.row, mode=0
        )

    @cached_property
    def _by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        # Stable: the sums below add up in row order, whatever the sorting algorithm.
        latent, order = self.latent.sort(stable=True)
        starts = torch.searchsorted(latent, torch.arange(self._d_sae + 1, device=latent.device))
        return order, self.row[order], starts

    def sums(self, weights: Tensor, vectors: Tensor) -> Tensor:
        """Per latent, the sum of weight * vectors[row]. [pairs], [rows, d_in] -> [d_sae, d_in]"""
        order, rows, starts = self._by_latent
        return F.embedding_bag(
            rows, vectors, starts, mode="sum", per_sample_weights=weights[order], include_last_offset=True
        )

    def totals(self, weights: Tensor) -> Tensor:
        """Per latent, the sum of the weights. [pairs] -> [d_sae]"""
        order, _, starts = self._by_latent
        return torch.segment_reduce(weights[order], "sum", offsets=starts)


def encoder_gradients(sae: SAE, d_b_dec: Tensor, shared: Collectives) -> None:
    """Set the gradient of b_dec, which also reaches the loss through the encoder's input where it is subtracted there.

    Args:
        d_b_dec: through the decoder. [..., d_in]
    """
    if sae.subtracts_b_dec and sae.b_enc.grad is not None:
        d_b_dec = d_b_dec - shared.sum_latents((sae.b_enc.grad.unsqueeze(-2) @ sae.W_enc).squeeze(-2))
    sae.b_dec.grad = d_b_dec
