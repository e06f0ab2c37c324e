"""Figures of running the subject with something else in place of its activations."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sae.architectures.base import SAE
from sae.evaluate.bootstrap import Interval, ratio_interval, ratio_intervals
from sae.evaluate.breakdown import position_edges, position_names
from sae.evaluate.config import EvaluationSpec
from sae.evaluate.controls import Control
from sae.evaluate.cross_entropy import ContextLosses, Replace, measure_cross_entropy
from sae.metrics import ce_recovered
from sae.progress import Progress
from sae.store.artefacts import records
from sae.store.snapshots.snapshot import Snapshot
from sae.store.storage.filesystem import Storage
from sae.store.text.contexts import Contexts, read_contexts
from sae.store.text.left_out import read_left_out
from sae.subject.load import Subject


def cross_entropy_figures(
    storage: Storage,
    spec: EvaluationSpec,
    subject: Subject,
    sae: SAE,
    train: Snapshot,
    controls: Mapping[str, Control],
    progress: Progress,
) -> dict[str, Any] | None:
    """The part of evaluation.json about next-token prediction; None without a context to run."""
    contexts = _contexts_to_run(storage, spec)
    if len(contexts) == 0:
        return None
    edges = position_edges(contexts.tokens.shape[1])
    losses = measure_cross_entropy(
        subject.model,
        spec.hook_point,
        sae,
        train.mean,
        contexts,
        left_out=read_left_out(storage, train.parts[0].ref),
        others={name: _reconstruct(control) for name, control in controls.items()},
        position_edges=edges,
        progress=progress,
    )
    clean, spliced, zero, mean = (losses.mean(variant) for variant in ("clean", "sae", "zero", "mean"))
    counted = records.require_record(storage, spec.subject).metrics if spec.subject else {}
    increase = losses.losses["sae"] - losses.losses["clean"]
    return {
        "n_contexts": len(contexts),
        "n_targets": int(losses.n_targets.sum()),
        "clean": clean,
        "sae": spliced,
        "zero": zero,
        "mean": mean,
        "increase": spliced - clean,
        "increase_interval": _interval(increase, losses, spec, "increase"),
        "recovered_zero": ce_recovered(clean, spliced, zero),
        "recovered_mean": ce_recovered(clean, spliced, mean),
        "unigram": counted.get("unigram_loss"),
        "bigram": counted.get("bigram_loss"),
        "kl": losses.mean_kl("sae"),
        "kl_interval": _interval(losses.kl["sae"], losses, spec, "kl"),
        "kl_zero": losses.mean_kl("zero"),
        "kl_mean": losses.mean_kl("mean"),
        "controls": {
            name: {
                "increase": losses.mean(name) - clean,
                "increase_interval": _interval(losses.losses[name] - losses.losses["clean"], losses, spec, name),
                "kl": losses.mean_kl(name),
            }
            for name in controls
        },
        "increase_by_position": _by_position(losses, edges, spec),
    }


def _interval(numerator: np.ndarray, losses: ContextLosses, spec: EvaluationSpec, key: str) -> Interval:
    """Paired: all losses of a context are redrawn together."""
    return ratio_interval(numerator, losses.n_targets, spec.config.n_bootstrap, key, spec.seed)


def _by_position(losses: ContextLosses, edges: np.ndarray, spec: EvaluationSpec) -> list[dict[str, Any]]:
    """The increase at the positions that predict, in the bins of the reconstruction error."""
    n_targets, increase = losses.bin_targets.sum(axis=0), losses.bin_increase.sum(axis=0)
    intervals = ratio_intervals(
        losses.bin_increase, losses.bin_targets, spec.config.n_bootstrap, "increase by position", spec.seed
    )
    return [
        {
            "name": name,
            "n_targets": int(n_targets[i]),
            "increase": float(increase[i] / n_targets[i]),
            "increase_interval": intervals[i],
        }
        for i, name in enumerate(position_names(edges))
        if n_targets[i]
    ]


def _reconstruct(control: Control) -> Replace:
    return lambda act: control.code(act).x_hat


def _contexts_to_run(storage: Storage, spec: EvaluationSpec) -> Contexts:
    """The first contexts of every segment, in equal numbers: their stored order is random."""
    split = "train" if spec.heldout_snapshot is None else "heldout"
    wanted = spec.config.n_contexts
    share = None if wanted is None else -(-wanted // len(spec.tokens))
    pieces = [read_contexts(storage, ref, split, 0, share) for ref in spec.tokens]
    return Contexts(
        seq=np.concatenate([piece.seq for piece in pieces])[:wanted],
        tokens=np.concatenate([piece.tokens for piece in pieces])[:wanted],
        docs=np.concatenate([piece.docs for piece in pieces])[:wanted],
        labels=None,
    )
