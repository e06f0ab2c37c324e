"""The tokens around each example's peak, with the latent's activation on every one of them."""

from dataclasses import dataclass

import numpy as np

from sae.architectures.base import SAE
from sae.progress import Progress, silent
from sae.statistics.firings import Firings, StatisticsPart, context_key, iter_blocks
from sae.store.storage.filesystem import Storage
from sae.store.text.contexts import PADDING, Contexts

LEFT_SHARE = 0.75
"""Share of a window that lies before the peak: what made a causal model fire is there."""


@dataclass(frozen=True)
class Windows:
    """One window per example, in the examples' order. Positions outside the context are masked."""

    tokens: np.ndarray
    """[n, width] int32"""
    activations: np.ndarray
    """[n, width] float32"""
    inside: np.ndarray
    """Which of the width positions exist: one run per window. [n, width] bool"""
    n_left: int
    """Index of the peak among the width positions."""

    @property
    def peak(self) -> np.ndarray:
        """Index of the peak among the positions that exist. [n] int32"""
        return self.inside[:, : self.n_left].sum(axis=1).astype(np.int32)


def collect_windows(
    storage: Storage,
    sae: SAE,
    parts: list[StatisticsPart],
    examples: Firings,
    width: int,
    *,
    progress: Progress = silent,
) -> Windows:
    """Encode the rows around the examples once more and keep what their latents did there.

    Only rows that are shown are encoded. Memory: the windows, and the matching firings of one part.

    Args:
        examples: the firings at the peaks.
        width: tokens in a window; windows are cut at the ends of the context and at padding.
    """
    n_left = int(width * LEFT_SHARE)
    offsets = np.arange(width) - n_left
    windows = Windows(
        tokens=np.full((len(examples), width), -1, np.int32),
        activations=np.zeros((len(examples), width), np.float32),
        inside=np.zeros((len(examples), width), bool),
        n_left=n_left,
    )
    order = np.argsort(examples.context, kind="stable")
    sorted_context = examples.context[order]
    for number, part in enumerate(parts):
        progress(number, len(parts), "parts", "contexts of the examples")
        contexts = part.contexts(storage)
        if contexts is None:
            continue
        first, last = context_key(part.segment, part.split, contexts.seq[[0, -1]])
        here = order[np.searchsorted(sorted_context, first) : np.searchsorted(sorted_context, last, side="right")]
        if len(here) == 0:
            continue
        positions = examples.pos[here, None].astype(np.int64) + offsets
        rows = examples.context[here] - first
        windows.inside[here] = _fill_tokens(windows, contexts, here, rows, positions)
        shown = np.zeros(contexts.tokens.shape, bool)
        shown[
            np.broadcast_to(rows[:, None], positions.shape)[windows.inside[here]], positions[windows.inside[here]]
        ] = True
        keys, values = _matching_firings(storage, sae, part, contexts, examples.take(here), shown)
        wanted = _keys(examples.latent[here, None], rows[:, None], positions, contexts)
        place = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
        found = windows.inside[here] & (keys[place] == wanted) if len(keys) else np.zeros(wanted.shape, bool)
        windows.activations[here] = np.where(found, values[place] if len(keys) else 0, 0)
    progress(len(parts), len(parts), "parts", "contexts of the examples")
    # Another number of rows in the product may round otherwise: the peak keeps the value it was chosen by.
    windows.activations[:, n_left] = examples.value
    windows.inside[:, n_left] = True
    return windows


def _fill_tokens(
    windows: Windows, contexts: Contexts, here: np.ndarray, rows: np.ndarray, positions: np.ndarray
) -> np.ndarray:
    """Write the tokens of the windows; which positions exist. [len(here), width] bool"""
    n_tokens = contexts.tokens.shape[1]
    clipped = np.clip(positions, 0, n_tokens - 1)
    inside = (positions == clipped) & (contexts.docs[rows[:, None], clipped] != PADDING)
    windows.tokens[here] = np.where(inside, contexts.tokens[rows[:, None], clipped], -1)
    return inside


def _matching_firings(
    storage: Storage, sae: SAE, part: StatisticsPart, contexts: Contexts, examples: Firings, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Firings on the `wanted` rows in a (latent, context) that some example shows: sorted keys and activations."""
    first = context_key(part.segment, part.split, contexts.seq[:1])[0]
    pair_width = contexts.tokens.shape[1]
    shown = np.unique(_keys(examples.latent, examples.context - first, 0, contexts) // pair_width)
    keys, values = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    for block in iter_blocks(storage, sae, part, contexts, wanted):
        row = block.rows.context[block.row] - first
        key = _keys(block.latent, row, block.rows.pos[block.row], contexts)
        place = np.minimum(np.searchsorted(shown, key // pair_width), len(shown) - 1)
        match = shown[place] == key // pair_width
        keys.append(key[match])
        values.append(block.value[match])
    key, value = np.concatenate(keys), np.concatenate(values)
    order = np.argsort(key, kind="stable")
    return key[order], value[order]


def _keys(latent: np.ndarray, row: np.ndarray, pos: np.ndarray | int, contexts: Contexts) -> np.ndarray:
    """One number for (latent, context of the part, position). int64"""
    n_contexts, n_tokens = contexts.tokens.shape
    return (latent.astype(np.int64) * n_contexts + row) * n_tokens + pos
