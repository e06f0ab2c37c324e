"""What replacing the activations costs the model: next-token loss, and KL divergence from the untouched model."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.architectures.base import SAE
from sae.progress import Progress, silent
from sae.store.text.contexts import PADDING, Contexts
from sae.store.text.left_out import NOTHING, LeftOut
from sae.subject.hooks import splice

VARIANTS = ("clean", "sae", "zero", "mean")
"""The untouched model; the reconstruction, zero, or the mean activation in place of the activations."""
BATCH_ELEMENTS = 1 << 24
"""Logits of one forward pass (64 MiB of float32); four such tensors are alive at once."""
Replace = Callable[[Tensor], Tensor]


class ContextLosses(NamedTuple):
    """Next-token losses and divergences, summed over each context."""

    n_targets: np.ndarray
    """Tokens predicted in each context: those that follow another and are not padding. [n] int64"""
    losses: dict[str, np.ndarray]
    """Variant -> sum of the losses in nats. [n] float64"""
    kl: dict[str, np.ndarray]
    """Variant but clean -> sum of KL(clean || variant) in nats. [n] float64"""
    bin_targets: np.ndarray
    """`n_targets` by bin of the position that predicts. [n, bins] int64"""
    bin_increase: np.ndarray
    """Loss with the SAE minus the clean loss, by the same bins. [n, bins] float64"""

    def mean(self, variant: str) -> float:
        """Nats per token over all contexts."""
        return float(self.losses[variant].sum() / self.n_targets.sum())

    def mean_kl(self, variant: str) -> float:
        """Nats per token over all contexts."""
        return float(self.kl[variant].sum() / self.n_targets.sum())


@torch.inference_mode()
def measure_cross_entropy(
    model: Any,
    hook_point: str,
    sae: SAE,
    mean: np.ndarray,
    contexts: Contexts,
    left_out: LeftOut = NOTHING,
    *,
    others: Mapping[str, Replace] | None = None,
    position_edges: np.ndarray | None = None,
    progress: Progress = silent,
) -> ContextLosses:
    """Run the model on every context in each variant.

    Activations are replaced only where training saw some: at padding and what was left out the model's own stay.

    Args:
        model, sae: on one device, unless the SAE says otherwise.
        mean: activation of the mean ablation. [d_in]
        left_out: which activations were not stored (special tokens, attention sinks).
        others: further variants, name -> what takes the place of activations [rows, d_in] (float32), on the model's
            device.
        position_edges: first positions of bins, and the end; None: one bin.
    """
    is_left_out = np.isin(contexts.tokens, np.array(left_out.token_ids, np.int64))
    tokens = torch.from_numpy(contexts.tokens.astype(np.int64)).to(model.device)
    present = torch.from_numpy(contexts.docs != PADDING).to(model.device)
    replaced = present & ~torch.from_numpy(is_left_out).to(model.device)
    mean_act = torch.from_numpy(mean.astype(np.float32)).to(model.device)
    replacements: dict[str, Replace] = {
        "sae": sae,
        "zero": torch.zeros_like,
        "mean": mean_act.expand_as,
        **(others or {}),
    }
    edges = np.array([0, tokens.shape[1]]) if position_edges is None else position_edges
    in_bin = _bin_matrix(edges, tokens.shape[1] - 1)
    n = len(contexts)
    losses = {variant: np.zeros(n) for variant in ("clean", *replacements)}
    kl = {variant: np.zeros(n) for variant in replacements}
    bin_increase = np.zeros((n, len(edges) - 1))
    batch = max(1, BATCH_ELEMENTS // (tokens.shape[1] * model.config.get_text_config().vocab_size))
    for start in range(0, n, batch):
        rows = slice(start, start + batch)
        predicted = present[rows, 1:].double()
        clean = _log_probabilities(model, tokens[rows])
        clean_loss = _losses(clean, tokens[rows]) * predicted
        losses["clean"][rows] = clean_loss.sum(dim=1).cpu().numpy()
        clean_probabilities = clean.exp()
        for variant, replace in replacements.items():
            with splice(model, hook_point, _only_at(replaced[rows], replace, left_out)):
                found = _log_probabilities(model, tokens[rows])
            loss = _losses(found, tokens[rows]) * predicted
            losses[variant][rows] = loss.sum(dim=1).cpu().numpy()
            divergence = -found.sub_(clean).mul_(clean_probabilities).sum(dim=2).double()
            kl[variant][rows] = (divergence * predicted).sum(dim=1).cpu().numpy()
            if variant == "sae":
                bin_increase[rows] = (loss - clean_loss).cpu().numpy() @ in_bin
        progress(min(start + batch, n), n, "contexts")
    predicts = (contexts.docs[:, 1:] != PADDING).astype(np.int64)
    n_targets, bin_targets = predicts.sum(axis=1), predicts @ in_bin.astype(np.int64)
    return ContextLosses(n_targets, losses, kl, bin_targets, bin_increase)


def _bin_matrix(edges: np.ndarray, n_positions: int) -> np.ndarray:
    """1 where a position lies in a bin. [n_positions, bins] float64"""
    bins = np.searchsorted(edges, np.arange(n_positions), side="right") - 1
    return np.eye(len(edges) - 1)[bins]


def _only_at(mask: Tensor, replace: Replace, left_out: LeftOut) -> Replace:
    """`replace` for the positions of `mask` [batch, T] but sinks; the others keep their activations."""

    def replaced(act: Tensor) -> Tensor:
        changed, chosen = act.clone(), mask & left_out.is_within(act)
        changed[chosen] = replace(act[chosen].float()).to(act.dtype)
        return changed

    return replaced


def _log_probabilities(model: Any, tokens: Tensor) -> Tensor:
    """Of the next token, at every position but the last. [batch, T - 1, vocab] float32"""
    return model(input_ids=tokens, use_cache=False).logits[:, :-1].float().log_softmax(dim=2)


def _losses(log_probabilities: Tensor, tokens: Tensor) -> Tensor:
    """Next-token loss at every position but the last. [batch, T - 1] float64"""
    return -log_probabilities.gather(2, tokens[:, 1:, None]).squeeze(2).double()
