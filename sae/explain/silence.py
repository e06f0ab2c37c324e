"""Windows of text with every latent's firings in them: where it can be *known* that a latent is silent.

The examples of other latents cannot tell: only their own latent's activations were kept. So a few hundred contexts
are drawn and encoded once, for all latents.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch

from sae.architectures.base import SAE
from sae.philox import philox
from sae.store.reading.reader import RowGroupReader
from sae.store.snapshots.snapshot import Snapshot
from sae.store.storage.filesystem import Storage

N_CONTEXTS = 256
"""Contexts drawn, one window each. A latent on one token in ten is silent on some nine windows of 32 tokens of them."""
MAX_PARTS = 4
"""Parts that are read for them: rows are permuted within a part, so a context costs a read of all of it."""
BLOCK_ROWS = 512
"""Rows encoded at once: 128 MiB of latents for an SAE of 65,536."""
LEFT_SHARE = 0.75
"""Share of a window before its centre, as for the windows of the examples."""


@dataclass(frozen=True)
class DrawnWindow:
    """Neighbouring tokens of one context, and the latents that fire on any of them."""

    part: int
    """Index in the snapshot."""
    seq: int
    pos: int
    """Of the token around which it was drawn."""
    token_ids: np.ndarray
    """[n] int32"""
    latents: frozenset[int]
    """Those that fire."""


@torch.inference_mode()
def draw_windows(storage: Storage, sae: SAE, snapshot: Snapshot, width: int, seed: int) -> list[DrawnWindow]:
    """A seeded sample of contexts, and from each the window around a random token, cut at its ends.

    A position without a stored row (a special token, padding) ends a window: nothing is known of it.

    Args:
        width: most tokens of a window.
    """
    filled = np.flatnonzero(snapshot.part_rows).tolist()
    chosen = sorted(philox("silent parts", seed).permutation(filled)[:MAX_PARTS].tolist())
    found = []
    for place, part in enumerate(chosen):
        quota = N_CONTEXTS * (place + 1) // len(chosen) - N_CONTEXTS * place // len(chosen)
        found += _draw_from_part(storage, sae, snapshot, part, quota, width, seed)
    return found


def _draw_from_part(
    storage: Storage, sae: SAE, snapshot: Snapshot, part: int, quota: int, width: int, seed: int
) -> list[DrawnWindow]:
    generator = philox("silent contexts", seed, part)
    reader = RowGroupReader(storage, snapshot)
    try:
        seq, pos, token = _identity(reader, snapshot, part)
        drawn = generator.permutation(np.unique(seq))[:quota]
        rows = np.flatnonzero(np.isin(seq, drawn))
        rows = rows[np.lexsort((pos[rows], seq[rows]))]
        spans = []
        for start, stop in _runs(seq[rows]):
            centre = int(generator.integers(start, stop))
            spans.append((rows[centre], rows[start + _around(pos[rows[start:stop]], centre - start, width)]))
        act = _vectors(reader, snapshot, part, np.concatenate([span for _, span in spans]))
    finally:
        reader.close()
    window = np.repeat(np.arange(len(spans)), [len(span) for _, span in spans])
    fired: list[set[int]] = [set() for _ in spans]
    for start in range(0, len(act), BLOCK_ROWS):
        x = torch.from_numpy(act[start : start + BLOCK_ROWS])
        sparse = sae.encode_sparse(x.to(sae.W_enc.device)).to("cpu")
        positive = sparse.value.numpy() > 0
        row, latent = sparse.row.numpy()[positive], sparse.latent.numpy()[positive]
        for number, one in zip(window[start + row].tolist(), latent.tolist(), strict=True):
            fired[number].add(one)
    return [
        DrawnWindow(part, int(seq[centre]), int(pos[centre]), token[span], frozenset(latents))
        for (centre, span), latents in zip(spans, fired, strict=True)
    ]


def _identity(reader: RowGroupReader, snapshot: Snapshot, part: int) -> np.ndarray:
    """Context, position and token id of a part's rows. [3, n_rows] int32"""
    n_groups = len(snapshot.parts[part].layout.row_groups)
    return np.concatenate(reader.read_identities([(part, group) for group in range(n_groups)]), axis=1)


def _vectors(reader: RowGroupReader, snapshot: Snapshot, part: int, rows: np.ndarray) -> np.ndarray:
    """The vectors of these rows of a part, in their order; row groups without any are not read. [n, d_in] float32"""
    out = np.empty((len(rows), snapshot.d_in), np.float32)
    start = 0
    for group, place in enumerate(snapshot.parts[part].layout.row_groups):
        here = np.flatnonzero((rows >= start) & (rows < start + place.n_rows))
        if len(here):
            out[here] = reader.read_act(part, group)[rows[here] - start]
        start += place.n_rows
    return out


def _around(pos: np.ndarray, centre: int, width: int) -> np.ndarray:
    """Indices of the neighbouring positions around one of them, `width` at most."""
    n_left = int(width * LEFT_SHARE)
    first = last = centre
    while first > 0 and centre - first < n_left and pos[first - 1] == pos[first] - 1:
        first -= 1
    while last + 1 < len(pos) and last + 1 - centre < width - n_left and pos[last + 1] == pos[last] + 1:
        last += 1
    return np.arange(first, last + 1)


def _runs(sorted_keys: np.ndarray) -> list[tuple[int, int]]:
    """Equal neighbours: [start, stop)."""
    changes = np.flatnonzero(sorted_keys[1:] != sorted_keys[:-1]) + 1
    edges = [0, *changes.tolist(), len(sorted_keys)]
    return list(itertools.pairwise(edges))
