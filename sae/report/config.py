"""What the report shows."""

from typing import ClassVar

from pydantic import Field

from sae.config import FrozenConfig, Ref, Spec


class ReportConfig(FrozenConfig):
    """Options of the report; another value re-renders the report and nothing else."""

    title: str = "SAE report"
    chunk_bytes: int = Field(256 << 10, gt=0, le=1 << 28)
    """Target size of a file of latent pages."""
    index_bytes: int = Field(64 << 20, ge=0)
    """Above this there is no index of words, and the search box says so; 0 switches it off."""
    n_random: int = Field(12, ge=0, le=10_000)
    """Random live latents on the overview."""
    seed: int = 0
    """Of the default (shuffled) order of the latents."""


class ReportedSAE(FrozenConfig):
    """One SAE of the report and what is known about it."""

    name: str
    family: str
    """All of its recipe but how sparse it is made, and its seed: whose curve it is a point of."""
    sparsity: str
    """How sparse it is made: `k 24`, `l1 0.5`."""
    sae: Ref
    evaluation: Ref
    statistics: Ref
    labels: Ref | None = None
    """A model's explanations of some of its latents."""
    untrained_evaluation: Ref | None = None
    """The evaluation of the same recipe on the untrained subject."""


class ReportSpec(Spec):
    """One report over the SAEs of a sweep."""

    stage: ClassVar[str] = "reports"
    code_version: ClassVar[int] = 5

    config: ReportConfig
    saes: tuple[ReportedSAE, ...]

    @property
    def inputs(self) -> dict[str, str]:
        """Adds what each SAE brings."""
        found: dict[str, str] = {}
        for i, entry in enumerate(self.saes):
            roles = ("sae", "evaluation", "statistics", "labels", "untrained_evaluation")
            found |= {f"{role}[{i}]": getattr(entry, role) for role in roles if getattr(entry, role)}
        return found
