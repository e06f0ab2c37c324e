"""How an SAE is trained. Derived settings come with their formula and source."""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from sae.architectures.config import SAEConfig
from sae.config import FrozenConfig, Ref, Spec
from sae.store.reading.shuffle import ShuffleConfig

Beta = Annotated[float, Field(ge=0, lt=1)]
"""How much of a running mean each step keeps."""

LR, LR_TOKENS = 6.5e-3, 2**21
"""Best peak learning rate of 2,048 latents, and up to how many tokens it is."""


class Pretrained(FrozenConfig):
    """Fine-tuning: training starts from the weights of a finished SAE of the same sizes."""

    weights: str = Field(min_length=1)
    """`saes/<fingerprint>` of the same root, or what `sae.load` takes: another root's SAE, or a folder."""


class TrainConfig(FrozenConfig):
    """One SAE of a sweep."""

    sae: SAEConfig
    hook_point: str | None = None
    """Which of the activations' hook points (or given sets). None: the only one."""
    seed: int = 0
    """Initialisation. The order of the rows comes from the pipeline's seed, so SAEs of a sweep share their batches."""
    batch_rows: int = Field(2048, gt=0)
    """Rows (tokens) per optimizer step, summed over all ranks."""
    n_tokens: int | None = Field(None, gt=0)
    """Rows to train on, over as many epochs as that takes. None: one epoch."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate. None: 6.5e-3 * sqrt(2048 / d_sae), times sqrt(2^21 / tokens) for more tokens than 2^21."""
    warmup_fraction: float = Field(0.05, ge=0, le=1)
    """Share of the steps in which the learning rate rises linearly."""
    decay_fraction: float = Field(0.2, ge=0, le=1)
    """Share of the steps, at the end, in which it falls linearly to zero."""
    adam_betas: tuple[Beta, Beta] = (0.9, 0.999)
    max_grad_norm: float | None = Field(None, gt=0)
    """Longest gradient, the norm over all parameters together: a longer one is scaled down to it, after the projection
    on unit decoder rows and before Adam. None: not clipped."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """What is saved is the running mean of the weights, of which each step keeps this much, bias-corrected as Adam's
    moments are (Gao et al. 2024, use 0.999).
    None: the last weights. The curve is of the weights that are trained."""
    init: Literal["tied", "farthest_point", "density", "default", "kaiming", "small"] | Pretrained = "tied"
    """tied: random unit directions, encoder = 0.5 decoder^T. farthest_point: decoder rows are centred data directions
    far from each other, encoder = decoder^T. density: the same, densest directions about the median first. default:
    torch.nn.Linear's own initialisation. kaiming: both matrices uniform and independent, b_dec = the geometric median
    of the data (Bricken et al. 2023). small: random directions of norm 0.1, encoder = decoder^T, no biases (Anthropic,
    April 2024)."""
    input_scale: Literal["rms", "sqrt_d", "none"] = "rms"
    """rms: inputs are divided by the root mean square of the centred data's elements. sqrt_d: inputs have the norm
    sqrt(d_in) on average, as measured on the first 8192 rows (Anthropic, April 2024). Folded into the saved weights."""
    selection: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 (topk, batch_topk): the product that decides which latents are selected is made in bfloat16, and what it
    selects is computed again in float32. Losses and gradients are exact; near the k-th place the choice can differ."""
    auxk_after_tokens: int = Field(2_500, gt=0)
    """AuxK works on the latents that have not fired for this many tokens: two batches of the default size, so that it
    keeps rare latents as well as waking dead ones. Gao et al. 2024 wait for 10 M tokens, which never pass in a run of a
    million; docs/recipes.md has what a longer wait costs."""
    dead_after_tokens: int = Field(20_000, gt=0)
    """What figures and warnings call dead, and what is woken (`wake_rate`): a latent that has not fired for this many
    tokens."""

    @model_validator(mode="after")
    def _something_is_selected(self) -> "TrainConfig":
        if self.selection != "float32" and self.sae.architecture == "standard":
            raise ValueError(f'selection = "{self.selection}", but standard SAEs select nothing. Leave it "float32".')
        return self

    def peak_lr(self, n_tokens: int) -> float:
        """The learning rate in force for a run of so many tokens.

        It scales as 1/sqrt(d_sae) (Gao et al. 2024). The constant and how it falls with the length of the run were
        measured with TopK (docs/recipes.md); a larger one leaves latents dead.
        """
        if self.lr is not None:
            return self.lr
        longer = max(1.0, n_tokens / LR_TOKENS)
        return LR * math.sqrt(2048 / self.sae.d_sae / longer)


class TensorBoardLog(FrozenConfig):
    """Curves as event files, a folder per SAE: `pip install 'sae-pipeline[tensorboard]'`."""

    kind: Literal["tensorboard"] = "tensorboard"
    folder: str = Field("tensorboard", min_length=1)


class WandbLog(FrozenConfig):
    """Curves in Weights & Biases, a run per SAE: `pip install 'sae-pipeline[wandb]'`. Key, place and mode (offline)
    come from its own environment variables, WANDB_API_KEY, WANDB_DIR, WANDB_MODE."""

    kind: Literal["wandb"] = "wandb"
    project: str = Field("sae-pipeline", min_length=1)


TrainingLog = Annotated[TensorBoardLog | WandbLog, Field(discriminator="kind")]


class MeshConfig(FrozenConfig):
    """How many processes share one SAE, along two axes. It changes no result beyond rounding."""

    data: int = Field(1, gt=0)
    """Shares of the rows of every batch. It divides the number of streams that rows are read in."""
    latents: int = Field(1, gt=0)
    """Shares of the latents. It divides d_sae."""

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.data * self.latents

    def misfit(self, config: TrainConfig, where: str) -> str | None:
        """Why it cannot share an SAE's latents or its batches evenly; None: it can.

        Args:
            where: the SAE's place in the configuration, `saes.0`.
        """
        if config.sae.d_sae % self.latents:
            return f"{where}.sae.d_sae: {config.sae.d_sae} is no multiple of execution.mesh.latents = {self.latents}"
        if config.batch_rows % self.world:
            return (
                f"{where}.batch_rows: {config.batch_rows} is no multiple of execution.mesh's data * latents = "
                f"{self.world}"
            )
        n_streams = ShuffleConfig().streams(config.batch_rows)
        if n_streams % self.data:
            return (
                f"execution.mesh.data: {self.data} processes cannot share the {n_streams} streams that batches of "
                f"{where}.batch_rows = {config.batch_rows} are read in. Choose a divisor of {n_streams}"
            )
        return None


class SAESpec(Spec):
    """One trained SAE."""

    stage: ClassVar[str] = "saes"
    code_version: ClassVar[int] = 3

    config: TrainConfig
    snapshot: Ref
    order_seed: int
    calibration: Ref | None = None
    """Snapshot of the rows held out, on which a threshold is calibrated. None: on training rows, or there is none."""
    initial: str | None = None
    """With `init.weights`: the SAE of the same root, or a digest of its files."""
