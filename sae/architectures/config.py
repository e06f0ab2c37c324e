"""The configs of the architectures: what decides the forward pass and the loss."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from sae.config import FrozenConfig


class Resampling(FrozenConfig):
    """When dead latents start anew, and from what (Bricken et al. 2023). The paper's numbers, scaled for short runs."""

    every_steps: int | None = Field(None, gt=0)
    """Steps between two resamplings. None: 25,000, or an eighth of the run if that is less."""
    n_times: int = Field(4, gt=0)
    silent_tokens: int | None = Field(None, gt=0)
    """A latent that has not fired for so many tokens starts anew. None: as many as lie in half of `every_steps` (the
    paper's 12,500 steps of 8192)."""
    n_inputs: int | None = Field(None, gt=0)
    """Inputs whose loss is measured, to draw from. None: 819,200, or an eighth of the tokens between two resamplings if
    that is less."""


class StandardConfig(FrozenConfig):
    """ReLU latents with an L1 penalty. By default Towards Monosemanticity (Bricken et al. 2023); Anthropic's April 2024
    update with `decoder="free"`. What else belongs to each is in docs/conformance.md."""

    sparsity: ClassVar[str] = "l1_coefficient"
    """The setting that makes it sparse: what a sweep varies along a curve."""

    architecture: Literal["standard"] = "standard"
    d_sae: int = Field(gt=0)
    l1_coefficient: float = Field(ge=0)
    """Lambda. It belongs to `reduction` and to the input scale of the training config."""
    l1_warmup_fraction: float = Field(0, ge=0, le=1)
    """Share of the steps, at the start, in which lambda rises linearly (April 2024: .05)."""
    decoder: Literal["unit", "free"] = "unit"
    """unit: rows of W_dec have norm 1 (the gradient along each row is removed before Adam). free: no constraint, the
    penalty weighs each latent by its row's norm, and the norms are folded into the encoder at the end. """
    reduction: Literal["sum", "mean"] = "sum"
    """sum: squared error and L1 summed over dimensions and latents, mean over rows (the papers). mean: both are means
    over all elements (a common first attempt), and latents are not weighed by decoder norm."""
    resampling: Resampling | None = None
    """Of dead latents (2023). None: they stay dead."""

    @model_validator(mode="after")
    def _of_one_form(self) -> "StandardConfig":
        if self.resampling and self.decoder == "free":
            raise ValueError('resampling belongs to decoder = "unit"; there is no rule for the norm of a free row')
        return self


DEFAULT_K_AUX = 256
DEFAULT_AUXK_COEFFICIENT = 0.01
"""A third of Gao et al.'s 1/32: with a short wait (`TrainConfig.auxk_after_tokens`) that kills more than it wakes."""
DEFAULT_WAKE_RATE = 0.3
"""The least that keeps latents in use for which the data has no feature; ten times as much costs a hundredth of FVU."""


class TopKConfig(FrozenConfig):
    """The k largest pre-activations of every row (Gao et al. 2024, arXiv:2406.04093)."""

    sparsity: ClassVar[str] = "k"
    """The setting that makes it sparse: what a sweep varies along a curve."""

    architecture: Literal["topk"] = "topk"
    d_sae: int = Field(gt=0)
    k: int = Field(gt=0)
    k_aux: int = Field(DEFAULT_K_AUX, ge=0)
    """Dead latents that learn to predict the residual, if so many are dead; 0 turns AuxK off."""
    auxk_coefficient: float = Field(DEFAULT_AUXK_COEFFICIENT, ge=0)
    wake_rate: float = Field(DEFAULT_WAKE_RATE, ge=0)
    """By how many learning rates b_enc of a dead latent (`TrainConfig.dead_after_tokens`) rises in each step, until it
    fires; by ten times as many of their peak while they fall. 0 leaves it."""

    @model_validator(mode="after")
    def _k_fits(self) -> "TopKConfig":
        _check_k(self.k, self.k_aux, self.d_sae)
        return self


class BatchTopKConfig(FrozenConfig):
    """k latents per row on average over a batch (Bussmann et al. 2024, arXiv:2412.06410)."""

    sparsity: ClassVar[str] = "k"
    """The setting that makes it sparse: what a sweep varies along a curve."""

    architecture: Literal["batch_topk"] = "batch_topk"
    d_sae: int = Field(gt=0)
    k: int = Field(gt=0)
    """Positive latents per row, on average: in training over each batch, at inference over the rows on which the
    threshold was calibrated."""
    k_aux: int = Field(DEFAULT_K_AUX, ge=0)
    """Dead latents that learn to predict the residual, if so many are dead; 0 turns AuxK off."""
    auxk_coefficient: float = Field(DEFAULT_AUXK_COEFFICIENT, ge=0)
    wake_rate: float = Field(DEFAULT_WAKE_RATE, ge=0)
    """By how many learning rates b_enc of a dead latent (`TrainConfig.dead_after_tokens`) rises in each step, until it
    fires; by ten times as many of their peak while they fall. 0 leaves it."""

    @model_validator(mode="after")
    def _k_fits(self) -> "BatchTopKConfig":
        _check_k(self.k, self.k_aux, self.d_sae)
        return self


def _check_k(k: int, k_aux: int, d_sae: int) -> None:
    if k > d_sae:
        raise ValueError(f"k = {k} is larger than d_sae = {d_sae}")
    if k_aux > max(d_sae, DEFAULT_K_AUX):
        raise ValueError(f"k_aux = {k_aux} is larger than d_sae = {d_sae}")


SAEConfig = Annotated[BatchTopKConfig | StandardConfig | TopKConfig, Field(discriminator="architecture")]
