"""BatchTopK (Bussmann, Leask, Nanda 2024, BatchTopK sparse autoencoders, arXiv:2412.06410)."""

from typing import NamedTuple

import torch
from torch import Tensor

from sae.architectures.base import SAE
from sae.architectures.config import BatchTopKConfig


class SelectedPairs(NamedTuple):
    """What a batch keeps, as parallel vectors sorted by row, then by latent."""

    values: Tensor
    """Pre-activations, all positive. [n], dtype of the SAE"""
    rows: Tensor
    """Row in the batch. int64 [n]"""
    latents: Tensor
    """int64 [n]"""


class BatchTopKSAE(SAE):
    """Training keeps k latents per row on average over the batch; inference looks at one row alone.

    z = W_enc (x - b_dec) + b_enc; x_hat = f W_dec + b_dec. Training: f = ReLU(z) where it is among the batch * k
    largest of the whole batch, else 0. Inference: JumpReLU, f = z where z > threshold, else 0.

    Attributes:
        threshold: one number for all latents, none negative; calibrated after training so that rows have k positive
            latents on average. 0 until then, where inference is ReLU. float32 []
    """

    config: BatchTopKConfig
    threshold: Tensor

    def __init__(self, config: BatchTopKConfig, d_in: int) -> None:
        super().__init__(config, d_in)
        self.register_buffer("threshold", torch.zeros(()))

    @property
    def subtracts_b_dec(self) -> bool:
        """Always."""
        return True

    @property
    def unit_decoder(self) -> bool:
        """Always."""
        return True

    def select_batch(self, pre_acts: Tensor) -> SelectedPairs:
        """The training rule: the positive ones among the batch * k largest pre-activations. pre_acts: [batch, d_sae]

        At most batch * k pairs; of equal values at the cut, it is not said which are kept. Gradients reach `values`.
        """
        flat = pre_acts.relu().flatten()
        kept = flat.topk(min(len(pre_acts) * self.config.k, len(flat)), sorted=False).indices
        # In order of rows: sums over them are then the same whatever order topk gives.
        kept = kept.sort().values
        values = flat[kept]
        positive = values.detach() > 0
        kept = kept[positive]
        return SelectedPairs(values[positive], kept // self.d_sae, kept % self.d_sae)

    def activate(self, pre_acts: Tensor) -> Tensor:
        """The inference rule: what exceeds the threshold; zero elsewhere."""
        return torch.where(pre_acts > self.threshold, pre_acts, torch.zeros_like(pre_acts))
