"""A running mean of the weights over the steps of a run."""

import torch
from torch import Tensor

from sae.architectures import SAE
from sae.train.step import renormalise


class WeightAverage:
    """The exponential moving average of an SAE's parameters, bias-corrected like Adam's moments.

    After step t it is sum_s decay^(t-s) w_s / sum_s decay^(t-s), a mean of the weights after each step in which the
    initialisation has no part. Its state is that mean and the number of steps.

    Source: Gao et al. 2024, arXiv:2406.04093, appendix A.

    Attributes:
        tensors: the mean, by parameter.
    """

    def __init__(self, sae: SAE, decay: float) -> None:
        self._decay = decay
        self.tensors: dict[str, Tensor] = {name: p.detach().clone() for name, p in sae.named_parameters()}

    @torch.no_grad()
    def update(self, sae: SAE, step: int) -> None:
        """Count the weights after step number `step`, from 1."""
        weight = (1 - self._decay) / (1 - self._decay**step)
        torch._foreach_lerp_(list(self.tensors.values()), list(sae.parameters()), weight)

    @torch.no_grad()
    def restart(self, sae: SAE, latents: Tensor) -> None:
        """Forget what some latents were, because they start anew: their mean is what they are now. bool [d_sae]"""
        for name in ("W_enc", "W_dec", "b_enc"):
            self.tensors[name][latents] = sae.get_parameter(name)[latents]

    @torch.no_grad()
    def copy_to(self, sae: SAE) -> None:
        """Give an SAE the mean. The mean of unit rows is shorter than 1: those of a unit decoder get norm 1 again."""
        for name, parameter in sae.named_parameters():
            parameter.copy_(self.tensors[name])
        if sae.unit_decoder:
            renormalise(sae.W_dec)
