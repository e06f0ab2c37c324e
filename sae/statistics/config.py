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
    """Contexts shown per quantile group, and as random firings."""
    context_tokens: int = Field(32, gt=1, le=65_536)
    """Tokens shown around the peak."""
    n_neighbours: int = Field(10, ge=0, le=10_000)
    n_logits: int = Field(10, ge=0, le=10_000)
    dense_above: float = Field(0.1, gt=0, lt=1)
    """Firing frequency above which a latent is flagged dense."""


class StatisticsSpec(Spec):
    """The statistics of one SAE: one partial result per part, and the merged tables."""

    stage: ClassVar[str] = "statistics"
    code_version: ClassVar[int] = 1

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
