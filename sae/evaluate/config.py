"""What is measured on held-out rows, and against which controls."""

from typing import ClassVar

from pydantic import Field

from sae.architectures.config import SAEConfig
from sae.config import FrozenConfig, Ref, Spec
from sae.train.config import TrainConfig


class UntrainedControl(FrozenConfig):
    """The same pipeline on the untrained subject: token identities show there too, contextual meaning does not."""

    n_tokens: int = Field(260_000, gt=0)
    """Training tokens of the control; smaller is fine."""


class Concept(FrozenConfig):
    """A named set of rows that some latent should fire on, and on nothing else (inline activations)."""

    name: str
    rows: tuple[int, ...]
    union: bool = False
    """Looked for as the union of two latents first; one latent of its own counts too."""


class Replicates(FrozenConfig):
    """Train the same recipe from other seeds and count how often every concept is found."""

    n_seeds: int = Field(20, gt=0, le=10_000)
    first_seed: int = 1000
    others: dict[str, TrainConfig] = Field(default_factory=dict)
    """Label -> another recipe to count beside it."""


class EvaluationConfig(FrozenConfig):
    """Evaluation on held-out documents."""

    n_contexts: int | None = Field(512, gt=0)
    """Held-out contexts for the cross-entropy measurements. None: all. Reconstruction uses all held-out rows."""
    n_bootstrap: int = Field(1000, ge=0, le=1_000_000)
    """Bootstrap draws (over contexts) behind each 95 % interval."""
    min_fires: int = Field(20, gt=0)
    """Units that fire less often get no interpretability score."""
    n_probe_rows: int = Field(1 << 16, ge=0)
    """Rows behind the sparse probes, half of them to fit on. 0: no probes."""
    untrained: UntrainedControl | None = UntrainedControl()
    """Only for the embedded subject."""
    concepts: tuple[Concept, ...] = ()
    """For inline activations: what must be found, with FVU <= 0.05 and L0 <= 3.5."""
    replicates: Replicates | None = None


class EvaluationSpec(Spec):
    """The evaluation of one SAE."""

    stage: ClassVar[str] = "evaluations"
    code_version: ClassVar[int] = 3

    config: EvaluationConfig
    sae: Ref
    architecture: SAEConfig
    train_snapshot: Ref
    heldout_snapshot: Ref | None
    tokens: tuple[Ref, ...] = ()
    subject: Ref | None = None
    hook_point: str
    seed: int
