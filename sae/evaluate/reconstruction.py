"""Reconstruction of every measured row in one streaming pass: FVU, L0, dead latents, shrinkage, error by group."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sae.architectures.base import SAE
from sae.evaluate.bootstrap import ratio_interval
from sae.evaluate.breakdown import GroupedErrors, Grouping
from sae.evaluate.config import EvaluationSpec
from sae.evaluate.interpretability import UnitFirings
from sae.evaluate.rows import RowTexts, concatenate_texts, part_contexts, row_texts
from sae.metrics import FiringCounts, ReconstructionSums, ShrinkageSums
from sae.progress import Progress, silent
from sae.store.reading.blocks import iter_rows
from sae.store.snapshots.snapshot import Snapshot
from sae.store.storage.filesystem import Storage

L0_RULES = {"batch_topk": "threshold", "topk": "topk", "standard": "relu"}
"""Architecture -> the inference rule that its L0 belongs to, where the two have different names."""


@dataclass(frozen=True)
class Reconstruction:
    """What one pass over a snapshot's rows found."""

    sums: ReconstructionSums
    shrinkage: ShrinkageSums
    counts: FiringCounts
    context_error: np.ndarray
    """Sum of ||x - x_hat||^2 of each context (given activations: of each row). [n] float64"""
    context_deviation: np.ndarray
    """Sum of ||x - mean||^2, the mean over all measured rows. [n] float64"""
    groups: tuple[GroupedErrors, ...]
    firings: UnitFirings
    """Of the first `keep_rows` rows."""
    texts: RowTexts | None
    """Of the same rows; None without text."""


@torch.inference_mode()
def measure_reconstruction(
    storage: Storage,
    sae: SAE,
    snapshot: Snapshot,
    keep_rows: int = 0,
    groupings: Sequence[Grouping] = (),
    *,
    progress: Progress = silent,
) -> Reconstruction:
    """Encode and decode all rows of a snapshot.

    Args:
        keep_rows: firings and texts of the first so many rows are kept, in file order. Above 0 only with text.
        groupings: divide the error by each of these. Only with text.
    """
    sums, counts = ReconstructionSums(), FiringCounts(sae.d_sae)
    shrinkage = ShrinkageSums(torch.tensor(snapshot.mean))
    grouped = tuple(GroupedErrors(grouping) for grouping in groupings)
    errors, deviations = [], []
    firings, texts = FiringsKeeper(keep_rows), []
    for part in range(len(snapshot.parts)):
        contexts = part_contexts(storage, snapshot, part) if keep_rows or groupings else None
        part_seq, part_error, part_deviation = [], [], []
        part_groups: list[list[np.ndarray]] = [[] for _ in grouped]
        for block in iter_rows(storage, snapshot, [part]):
            act = block.act.astype(np.float32)
            x = torch.from_numpy(act)
            sparse = sae.encode_sparse(x.to(sae.W_enc.device))
            x_hat = sae.decode_sparse(sparse, len(x)).cpu()
            sparse = sparse.to("cpu")
            if contexts is not None:
                about = row_texts(contexts, part, block)
                if sums.n_rows < keep_rows:
                    texts.append(about)
                for kept, groups in zip(part_groups, grouped, strict=True):
                    kept.append(groups.grouping.assign(about))
            firings.add(sparse.latent.numpy(), sparse.row.numpy(), sparse.value.numpy(), len(x))
            sums.add(x, x_hat)
            shrinkage.add(x, x_hat)
            counts.add_sparse(sparse, len(x))
            part_seq.append(block.seq)
            part_error.append(np.square(act - x_hat.numpy(), dtype=np.float64).sum(axis=1))
            part_deviation.append(np.square(act - snapshot.mean).sum(axis=1))
            progress(sums.n_rows, snapshot.n_rows, "rows", f"FVU {sums.fvu:.3f}")
        if part_seq:
            # A context's rows all lie in one part.
            _, context = np.unique(np.concatenate(part_seq), return_inverse=True)
            error, deviation = np.concatenate(part_error), np.concatenate(part_deviation)
            errors.append(np.bincount(context, error))
            deviations.append(np.bincount(context, deviation))
            for groups, kept in zip(grouped, part_groups, strict=True):
                groups.add(context, np.concatenate(kept), error, deviation)
    return Reconstruction(
        sums=sums,
        shrinkage=shrinkage,
        counts=counts,
        context_error=np.concatenate(errors),
        context_deviation=np.concatenate(deviations),
        groups=grouped,
        firings=firings.all(),
        texts=concatenate_texts(texts, keep_rows) if keep_rows else None,
    )


class FiringsKeeper:
    """The firings of the first `max_rows` rows, block by block."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.n_rows = 0
        self._unit, self._row = [np.empty(0, np.int32)], [np.empty(0, np.int32)]
        self._value = [np.empty(0, np.float32)]

    def add(self, unit: np.ndarray, row: np.ndarray, value: np.ndarray, n_rows: int) -> None:
        """Keep what lies in the first rows. Parallel [n], in order of `row`, which counts from this block's first."""
        n_kept = int(np.searchsorted(row, max(self.max_rows - self.n_rows, 0)))
        self._unit.append(unit[:n_kept].astype(np.int32))
        self._row.append((row[:n_kept] + self.n_rows).astype(np.int32))
        self._value.append(value[:n_kept].astype(np.float32))
        self.n_rows += n_rows

    def all(self) -> UnitFirings:
        """In order of their rows."""
        return UnitFirings(np.concatenate(self._unit), np.concatenate(self._row), np.concatenate(self._value))


def reconstruction_figures(spec: EvaluationSpec, sae: SAE, found: Reconstruction) -> dict[str, Any]:
    """The part of evaluation.json that this pass gives."""
    n_draws, seed = spec.config.n_bootstrap, spec.seed
    return {
        "fvu": found.sums.fvu,
        "fvu_interval": ratio_interval(found.context_error, found.context_deviation, n_draws, "fvu", seed),
        "fvu_legacy": {
            "mean_of_batches": found.sums.fvu_mean_of_batches,
            "centred_per_batch": found.sums.fvu_centred_per_batch,
        },
        "shrinkage": {
            "gamma": found.shrinkage.gamma,
            "gamma_centred": found.shrinkage.gamma_centred,
            "norm_ratio": found.shrinkage.norm_ratio,
            "mean_cosine": found.shrinkage.mean_cosine,
            "formula": "gamma = E ||x_hat||^2 / E [x . x_hat], the g that minimises E ||x_hat / g - x||^2 "
            "(arXiv:2404.16014); centred: of x - mean and x_hat - mean",
        },
        "l0": found.counts.l0,
        "l0_rule": L0_RULES.get(sae.config.architecture, sae.config.architecture),
        "n_latents": sae.d_sae,
        "n_dead": found.counts.n_dead,
        "dead_fraction": found.counts.dead_fraction,
        "dead_rule": f"never fired on the {found.counts.n_rows:,} measured rows",
        "error_by": {groups.grouping.name.replace(" ", "_"): groups.figures(n_draws, seed) for groups in found.groups},
    }
