"""What a notebook needs, without Prefect: `sae.load` and `sae.train`. Use them as `import sae`."""

import contextlib
import os
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from sae.architectures import SAE
from sae.device import choose_device
from sae.errors import ConfigError
from sae.pipeline_config import ExecutionConfig, PipelineConfig
from sae.plan import make_plan
from sae.progress import Progress, show_bar
from sae.saved import load, parse_address
from sae.store.artefacts.records import is_intact
from sae.store.snapshots.snapshot import SnapshotSpec
from sae.store.storage.filesystem import Storage
from sae.train.config import SAESpec, TrainConfig
from sae.train.in_memory import train_run_in_memory
from sae.train.loop import train_saes
from sae.train.pretrained import resolve_initial

__all__ = ["load", "train"]


@overload
def train(config: PipelineConfig, /, *, progress: Progress | None = None) -> SAE: ...


@overload
def train(
    x: Tensor | np.ndarray | str | os.PathLike[str], /, config: TrainConfig, *, progress: Progress | None = None
) -> SAE: ...


def train(x: Any, /, config: TrainConfig | None = None, *, progress: Progress | None = None) -> SAE:
    """Train one SAE and return it.

    Args:
        x: rows in memory [rows, d_in], any float dtype, a tensor (trained on its device) or an array; the address of
            stored activations, `<root>/activations/<fingerprint>`; or, alone, a PipelineConfig with one SAE whose
            activations the extract flow has stored in `execution.root`.
        progress: called as training goes on. None: a bar.

    On stored activations the SAE is committed to the root, so the same call finds it there, and one that was
    interrupted goes on from its last checkpoint. It is trained on a GPU where there is one that works, unless the
    PipelineConfig's `execution.device` says otherwise.

    Raises: ConfigError when the arguments do not fit; StoreError when the activations are not there; TrainingError
        when they have no variance, or the loss stops being finite.
    """
    with show_bar("training") if progress is None else contextlib.nullcontext(progress) as report:
        if isinstance(x, PipelineConfig):
            if config is not None:
                raise ConfigError("sae.train(config) with a PipelineConfig takes no second config: it has its own saes")
            return _train_planned(x, report)
        if not isinstance(config, TrainConfig):
            raise ConfigError(
                f"sae.train(x, config): config is {_kind(config)}, expected a TrainConfig, as in "
                f"sae.train(x, sae.TrainConfig(sae=sae.TopKConfig(d_sae=2048, k=32)))"
            )
        if isinstance(x, str | os.PathLike):
            return _train_stored(os.fspath(x), config, report)
        return train_run_in_memory(_rows(x), config, progress=report).result()


def _train_planned(config: PipelineConfig, progress: Progress) -> SAE:
    if len(config.saes) != 1:
        raise ConfigError(
            f"sae.train returns one SAE, and the config is a sweep of {len(config.saes)}. Train it with "
            f"`sae-pipeline train FILE`, from one read, and sae.load each; or give a config with one of its saes."
        )
    (spec,) = make_plan(config).saes
    return _train_spec(config.execution, spec, progress)


def _train_stored(address: str, config: TrainConfig, progress: Progress) -> SAE:
    place = parse_address(address)
    if place is None or place.stage != SnapshotSpec.stage:
        raise ConfigError(
            f"sae.train({address!r}, config): no activations have this address; theirs is "
            f"<root>/{SnapshotSpec.stage}/<fingerprint>. `sae-pipeline store info --root ROOT` lists them."
        )
    spec = SAESpec(config=config, snapshot=place.ref, order_seed=0, initial=resolve_initial(config))
    return _train_spec(ExecutionConfig(root=place.root), spec, progress)


def _train_spec(execution: ExecutionConfig, spec: SAESpec, progress: Progress) -> SAE:
    storage, every = Storage(execution.root), execution.checkpoint_every_steps
    if not is_intact(storage, spec.ref):
        device = choose_device(execution.device)
        train_saes(storage, [spec], checkpoint_every_steps=every, device=device, progress=progress)
    return load(storage.uri(spec.ref))


def _rows(x: Any) -> Tensor:
    if not isinstance(x, Tensor | np.ndarray):
        raise ConfigError(
            f"sae.train(x, config): x is {_kind(x)}, expected rows [rows, d_in] as a tensor or an array, or the "
            f"address of stored activations"
        )
    if isinstance(x, Tensor):
        return x
    try:
        # A copy only of what torch cannot look at in place: read-only memory, negative strides.
        return torch.from_numpy(np.require(x, requirements=["C", "W"]))
    except TypeError as err:
        raise ConfigError(f"sae.train(x, config): x is an array of {x.dtype}, expected floats") from err


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
