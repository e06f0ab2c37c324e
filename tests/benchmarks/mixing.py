"""Variance of batch means on a document-correlated signal, over that of independent draws: ours and the field's orders.

Only which context a row is of matters here, so orders are followed on numbers of contexts, with the sizes of real
stores. Documents have 4 contexts of 512 tokens on average (geometric). A row is sqrt(rho) times its document's vector
plus sqrt(1 - rho) times noise of its own, rho = .2; the noise of rows drawn without replacement is not simulated, its
part is known exactly. Our store holds the contexts permuted and the rows of every part permuted, as extraction writes
them; sequential order and half-buffers take the corpus as it is, as their users do.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sae.philox import philox
from sae.store.reading.mixing import expected_variance
from sae.store.reading.order import Epoch
from sae.store.reading.shuffle import RowGroups, ShuffleConfig, ShuffleSizes
from tests.benchmarks.timing import Row

CONTEXT_ROWS, BATCH_ROWS, RHO, CONTEXTS_PER_DOCUMENT, N_DIMENSIONS = 512, 4096, 0.2, 4.0, 16
STORES = {
    # name: (d_in, parts, bytes of a part, bytes of a row group), float16
    "d_in 512, parts of 1 GiB": (512, 80, 1 << 30, 32 << 20),
    "d_in 4096, parts of 1 GiB": (4096, 128, 1 << 30, 32 << 20),
    "d_in 512, parts of 64 MiB": (512, 256, 64 << 20, 4 << 20),
    "d_in 4096, parts of 64 MiB": (4096, 2048, 64 << 20, 4 << 20),
}
SMALLER_BLOCKS = (8, 1)
SMALL_BUFFER_CONTEXTS = 640


def mixing(folder: Path) -> Iterator[Row]:
    """The figure for ours beside the expected one, then for other orders beside ours."""
    for name, (d_in, n_parts, part_bytes, group_bytes) in STORES.items():
        row_bytes = 2 * d_in
        part_rows, group_rows = part_bytes // row_bytes, group_bytes // row_bytes
        groups = RowGroups.of([[group_rows] * (part_rows // group_rows)] * n_parts)
        default = ShuffleConfig().sizes(groups, row_bytes)
        signal = _signal(groups.n_rows // CONTEXT_ROWS)
        stored = signal[philox("contexts").permutation(len(signal))]
        ours = 0.0
        for sizes in (default, *(default._replace(block_parts=block) for block in SMALLER_BLOCKS)):
            measured = _over_iid(_ours(groups, part_rows, sizes, stored), groups.n_rows)
            expected = expected_variance(
                sizes,
                n_parts=n_parts,
                part_rows=part_rows,
                row_group_rows=group_rows,
                batch_rows=BATCH_ROWS,
                context_rows=CONTEXT_ROWS,
                rho=RHO,
            )
            ours = ours or measured
            what = "default" if sizes is default else f"blocks of {sizes.block_parts}"
            yield _row(f"{name}: {what} / expected", measured, expected)
        same_memory = sizes.window_row_groups * group_rows // CONTEXT_ROWS
        for what, n_contexts in (
            ("our memory", same_memory),
            (f"{SMALL_BUFFER_CONTEXTS} contexts", SMALL_BUFFER_CONTEXTS),
        ):
            measured = _over_iid(_half_buffer(n_contexts, signal), groups.n_rows)
            yield _row(f"{name}: half-buffer, {what} / default", measured, ours)
        yield _row(f"{name}: sequential / default", _over_iid(_sequential(signal), groups.n_rows), ours)


def _row(what: str, measured: float, reference: float) -> Row:
    return Row(what, f"{measured:.3f}", f"{reference:.3f}", (measured / reference,))


def _signal(n_contexts: int) -> np.ndarray:
    """The document's vector of every context, in corpus order, with mean 0 and variance 1. [contexts, dimensions]"""
    rng = philox("documents")
    document = np.cumsum(rng.random(n_contexts) < 1 / CONTEXTS_PER_DOCUMENT)
    signal = rng.standard_normal((document[-1] + 1, N_DIMENSIONS), np.float32)[document]
    return (signal - signal.mean(0)) / signal.std(0)


def _over_iid(means: np.ndarray, n_rows: int) -> float:
    """Variance over independent draws, from the signal's means of all batches. [batches, dimensions]"""
    noise = 1 - (BATCH_ROWS - 1) / (n_rows - 1)
    return float(RHO * BATCH_ROWS * np.square(means, dtype=np.float64).mean() + (1 - RHO) * noise)


def _ours(groups: RowGroups, part_rows: int, sizes: ShuffleSizes, signal: np.ndarray) -> np.ndarray:
    """Means of the batches of one epoch."""
    n_parts, group_rows = len(groups.starts) - 1, int(groups.rows[0])
    per_part = part_rows // CONTEXT_ROWS
    context = np.empty((n_parts, part_rows), np.int32)
    for part in range(n_parts):
        order = philox("rows", part).permutation(part_rows)
        context[part] = part * per_part + order // CONTEXT_ROWS
    epoch = Epoch(groups, BATCH_ROWS, seed=0, epoch=0, shuffle=sizes)
    per_lane = BATCH_ROWS // epoch.n_streams
    means = np.zeros((epoch.lanes.n_batches, signal.shape[1]))
    kept: dict[int, tuple[tuple[int, int], np.ndarray]] = {}
    for run in epoch.runs(0, range(epoch.n_streams)):
        key = (run.stream, run.window)
        if run.lane not in kept or kept[run.lane][0] != key:
            window = epoch.window(*key)
            blocks = [
                context[part, group * group_rows : (group + 1) * group_rows]
                for part, group in zip(window.parts, window.groups, strict=True)
            ]
            kept[run.lane] = key, np.concatenate(blocks)[epoch.window_order(window)]
        rows = signal[kept[run.lane][1][run.offset : run.offset + run.n_rows]]
        cuts = np.append(0, np.arange(-run.start % per_lane or per_lane, run.n_rows, per_lane))
        sums = np.add.reduceat(rows, cuts)
        means[run.batch : run.batch + len(sums)] += sums / BATCH_ROWS
    return means[: groups.n_rows // BATCH_ROWS]


def _sequential(signal: np.ndarray) -> np.ndarray:
    per_batch = BATCH_ROWS // CONTEXT_ROWS
    whole = signal[: len(signal) // per_batch * per_batch]
    return whole.reshape(-1, per_batch, signal.shape[1]).mean(1)


def _half_buffer(n_contexts: int, signal: np.ndarray) -> np.ndarray:
    """A buffer is shuffled, half of it served, and filled up with the contexts that follow."""
    rng = philox("half-buffer")
    half = max(n_contexts // 2, BATCH_ROWS // CONTEXT_ROWS)
    rows, means = np.empty(0, np.int32), []
    for start in range(0, len(signal) - half + 1, half):
        rows = np.append(rows, np.repeat(np.arange(start, start + half, dtype=np.int32), CONTEXT_ROWS))
        if start == 0:
            continue
        rng.shuffle(rows)
        n_served = len(rows) // 2 // BATCH_ROWS * BATCH_ROWS
        served, rows = rows[:n_served], rows[n_served:]
        means += [signal[batch].mean(0) for batch in served.reshape(-1, BATCH_ROWS)]
    return np.array(means)
