"""Sweeps made up from their configs: how well SAEs of some sizes and sparsities would do."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from synthetic import write_evaluation, write_sae, write_statistics

from sae.report.config import ReportConfig, ReportedSAE, ReportSpec
from sae.report.sweep import sweep_point
from sae.store.storage.filesystem import Storage
from sae.sweep_names import name_sweep
from sae.train.config import TrainConfig
from sae.train.grid import expand_grids

GRIDS: dict[int, dict[str, Any]] = {
    1: {},
    8: {"sae": {"architecture": ["topk", "batch_topk"], "k": [8, 16, 32, 64]}},
    24: {"sae": {"architecture": ["topk", "batch_topk"], "d_sae": [1024, 4096], "k": [16, 32, 64]}, "seed": [0, 1]},
    64: {
        "sae": {"architecture": ["topk", "batch_topk"], "d_sae": [1024, 4096, 16_384, 65_536], "k": [8, 16, 32, 64]},
        "seed": [0, 1],
    },
}
"""Number of SAEs -> a grid of so many."""


N_LATENTS = 24
"""Of each SAE, whatever its config says: what is looked at is the sweep."""


def sweep_configs(grid: dict[str, Any]) -> list[TrainConfig]:
    """The SAEs of a grid."""
    base = {"hook_point": "mlp", "sae": {"architecture": "topk", "d_sae": 1024, "k": 32}, "grid": grid}
    return [TrainConfig.model_validate(entry) for entry in expand_grids([base])]


def figures_of(config: TrainConfig) -> dict[str, float]:
    """FVU, CE increase and L0 of an SAE, as they would be about."""
    sae, noise = config.sae, np.random.default_rng([config.seed, config.sae.d_sae]).standard_normal(2)
    l0 = sae.k * (1 if sae.architecture == "topk" else 0.95 + 0.04 * noise[0])
    better = 0.93 if sae.architecture == "batch_topk" else 1
    fvu = 0.25 * better * (32 / l0) ** 0.35 * (2048 / sae.d_sae) ** 0.15 * (1 + 0.01 * noise[1])
    return {"fvu": fvu, "increase": fvu**1.5, "l0": l0}


def sweep_points(configs: Sequence[TrainConfig], measure: str = "fvu") -> list[dict[str, Any]]:
    """What a chart of the sweep is drawn from."""
    points = []
    for config, named in zip(configs, name_sweep(configs), strict=True):
        found = figures_of(config)
        interval = found[measure] - 0.004, found[measure] + 0.004
        points.append(sweep_point(*named, found["l0"], measure, found[measure], interval))
    return points


def sweep_spec(storage: Storage, configs: Sequence[TrainConfig], **options: Any) -> ReportSpec:
    """Write everything the report of a sweep needs, with few latents, and return its spec."""
    saes = [
        ReportedSAE(
            **named._asdict(),
            sae=write_sae(storage, named.name, N_LATENTS),
            evaluation=write_evaluation(storage, named.name, N_LATENTS, **figures_of(config)),
            statistics=write_statistics(storage, "shared", N_LATENTS),
        )
        for config, named in zip(configs, name_sweep(configs), strict=True)
    ]
    config = ReportConfig(title=f"A sweep of {len(saes)} SAEs", **({"chunk_bytes": 20_000} | options))
    return ReportSpec(config=config, saes=tuple(saes))
