"""The hook point's own dimensions as units: the control beside the latents' interpretability score."""

from collections.abc import Iterator

import numpy as np

from sae.evaluate.interpretability import UnitFirings, UnitScores, concatenate, score_units
from sae.evaluate.rows import RowTexts
from sae.store.reading.blocks import iter_rows
from sae.store.snapshots.snapshot import Snapshot
from sae.store.storage.filesystem import Storage

BLOCK_ELEMENTS = 1 << 24
"""Activations of one block of columns in memory (64 MiB of float32)."""


def score_neurons(storage: Storage, snapshot: Snapshot, texts: RowTexts) -> UnitScores:
    """Score every dimension of the hook point on the rows of `texts`; positive activations count as firing.

    The rows are read once per block of columns, so memory does not grow with d_in.
    """
    width = max(1, BLOCK_ELEMENTS // max(len(texts), 1))
    scores = []
    for start in range(0, snapshot.d_in, width):
        columns = slice(start, min(start + width, snapshot.d_in))
        block = np.concatenate(list(_columns(storage, snapshot, columns, len(texts))))
        unit, row = np.nonzero(block.T > 0)
        firings = UnitFirings(unit.astype(np.int32), row.astype(np.int32), block[row, unit])
        scores.append(score_units(firings, columns.stop - columns.start, texts))
    return concatenate(scores)


def _columns(storage: Storage, snapshot: Snapshot, columns: slice, n_rows: int) -> Iterator[np.ndarray]:
    for block in iter_rows(storage, snapshot):
        yield block.act[:n_rows, columns].astype(np.float32)
        n_rows -= min(n_rows, len(block.act))
        if n_rows == 0:
            return
