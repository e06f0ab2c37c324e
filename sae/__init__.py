"""Sparse autoencoders on a language model's activations: extraction, training, statistics, report.

A pure library: it knows nothing of Prefect. `flows/` and `tasks/` run it as a pipeline.

    import sae
    model = sae.train(x, sae.TrainConfig(sae=sae.TopKConfig(d_sae=2048, k=32)))   # or sae.load("runs/saes/3f1c…")
    x_hat = model.decode(model.encode(x))

The names below are imported when they are first used: `import sae` alone costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae.api import load, train
    from sae.architectures import SAE, BatchTopKConfig, SAEConfig, StandardConfig, TopKConfig
    from sae.pipeline_config import PipelineConfig
    from sae.train.config import TrainConfig

__all__ = [
    "SAE",
    "BatchTopKConfig",
    "PipelineConfig",
    "SAEConfig",
    "StandardConfig",
    "TopKConfig",
    "TrainConfig",
    "load",
    "train",
]

_HOMES = {
    "SAE": "sae.architectures",
    "BatchTopKConfig": "sae.architectures",
    "PipelineConfig": "sae.pipeline_config",
    "SAEConfig": "sae.architectures",
    "StandardConfig": "sae.architectures",
    "TopKConfig": "sae.architectures",
    "TrainConfig": "sae.train.config",
    "load": "sae.api",
}


def __getattr__(name: str) -> Any:
    if name == "train":  # the package of that name, which can be called
        return importlib.import_module("sae.train")
    if name not in _HOMES:
        raise AttributeError(f"module 'sae' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
