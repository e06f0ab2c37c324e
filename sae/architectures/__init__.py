"""The architectures: one paper, one file. A new one is a file, a line in the table and a member of `SAEConfig`."""

from sae.architectures.base import SAE, SparseLatents
from sae.architectures.batch_topk import BatchTopKSAE
from sae.architectures.config import BatchTopKConfig, SAEConfig, StandardConfig, TopKConfig
from sae.architectures.standard import StandardSAE
from sae.architectures.topk import TopKSAE

__all__ = [
    "ARCHITECTURES",
    "SAE",
    "BatchTopKConfig",
    "SAEConfig",
    "SparseLatents",
    "StandardConfig",
    "TopKConfig",
    "build_sae",
]

ARCHITECTURES: dict[str, type[SAE]] = {
    "batch_topk": BatchTopKSAE,
    "standard": StandardSAE,
    "topk": TopKSAE,
}


def build_sae(config: SAEConfig, d_in: int) -> SAE:
    """An SAE for inputs of width `d_in`, with all weights zero."""
    return ARCHITECTURES[config.architecture](config, d_in)
