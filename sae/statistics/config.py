"""Which statistics and examples are kept per latent."""

from typing import ClassVar

from pydantic import Field

from sae.config import FrozenConfig, Ref, Spec
from sae.extract.config import Split


class StatisticsConfig(FrozenConfig):
    """One streaming pass over training and held-out rows."""

    n_top: int = Field(20, gt=0, le=10_000)
    """Strongest contexts kept per latent, at most one per document."""
    n_samples: int = Field(64, gt=0, le=1_000_000)
    """Uniform sample of a latent's firings, from which the quantile groups are drawn."""
    n_per_group: int = Field(5, gt=0, le=10_000)
    """Contexts shown per quantile group, as random firings, and as near misses."""
    context_tokens: int = Field(32, gt=1, le=65_536)
    """Tokens shown around the peak."""
    n_associated: int = Field(5, gt=0, le=1000)
    """Tokens, previous tokens and syntax labels listed per latent, those with most firings."""
    n_coactive: int = Field(10, ge=0, le=10_000)
    """Latents listed that fire together with each latent."""
    n_sampled_rows: int = Field(65_536, ge=0, le=1 << 24)
    """Rows (about) whose firing latents are kept: a uniform sample, the same for every SAE on the hook point."""
    n_passages: int = Field(64, ge=0, le=10_000)
    """Contexts stored whole, with the strongest latents of every token."""
    n_neighbours: int = Field(10, ge=0, le=10_000)
    n_logits: int = Field(10, ge=0, le=10_000)
    n_neurons: int = Field(5, ge=0, le=1000)
    """Dimensions of the hook point listed per latent, those nearest to its decoder row."""
    dense_above: float = Field(0.1, gt=0, lt=1)
    """Firing frequency above which a latent is flagged dense."""
    duplicate_above: float = Field(0.9, gt=0, le=1)
    """Cosine of two decoder rows above which a latent is flagged as a duplicate."""


class StatisticsSpec(Spec):
    """The statistics of one SAE: one partial result per part, merged in a tree into the tables."""

    stage: ClassVar[str] = "statistics"
    code_version: ClassVar[int] = 2

    config: StatisticsConfig
    sae: Ref
    snapshots: dict[Split, Ref]
    tokens: tuple[Ref, ...] = ()
    subject: Ref | None = None
    hook_point: str
    seed: int

    @property
    def inputs(self) -> dict[str, str]:
        """Adds the snapshots, which lie in a dict."""
        return super().inputs | {f"snapshot_{split}": ref for split, ref in self.snapshots.items()}
