"""TopK (Gao et al. 2024, Scaling and evaluating sparse autoencoders, arXiv:2406.04093)."""

import torch
from torch import Tensor

from sae.architectures.base import SAE, AmongLargest, SparseLatents
from sae.architectures.config import TopKConfig


class TopKSAE(SAE):
    """f = ReLU(TopK(W_enc (x - b_dec) + b_enc)); x_hat = f W_dec + b_dec. At most k latents of a row are positive."""

    config: TopKConfig

    @property
    def subtracts_b_dec(self) -> bool:
        """Always."""
        return True

    @property
    def unit_decoder(self) -> bool:
        """Always."""
        return True

    def select(self, pre_acts: Tensor) -> tuple[Tensor, Tensor]:
        """The k largest pre-activations of each row, after ReLU, and their latents. Both [..., k], in no order."""
        values, latents = pre_acts.topk(self.config.k, dim=-1, sorted=False)
        return values.relu(), latents

    def activate(self, pre_acts: Tensor) -> Tensor:
        """The k largest of each row, after ReLU; zero elsewhere."""
        values, latents = self.select(pre_acts)
        return torch.zeros_like(pre_acts).scatter(-1, latents, values)

    def encode_sparse(self, x: Tensor) -> SparseLatents:
        """The positive latents of rows [rows, d_in], without the dense [rows, d_sae]. Raises: as in `SAE`."""
        return self.encode_own(x, lambda values, k: None)

    def encode_own(self, x: Tensor, among_largest: AmongLargest) -> SparseLatents:
        """Of each row's k largest on all devices, those that are here and positive."""
        self._check_rows(x)
        k = self.config.k
        values, latents = self.pre_acts(x).topk(min(k, self.d_sae), dim=-1, sorted=False)
        kept = among_largest(values, k)
        values = values.relu() if kept is None else values.relu() * kept
        latents, order = latents.sort(dim=-1)
        values = values.gather(-1, order)
        row, column = torch.nonzero(values, as_tuple=True)
        return SparseLatents(row, latents[row, column], values[row, column])
