"""The expected variance of batch means agrees with what an order gives, and with what can be worked out by hand."""

import numpy as np
import pytest

from sae.philox import philox
from sae.store.reading.mixing import expected_variance
from sae.store.reading.order import Epoch
from sae.store.reading.shuffle import RowGroups, ShuffleSizes


def measured_variance(
    shuffle: ShuffleSizes, n_parts: int, part_rows: int, group_rows: int, batch_rows: int, context_rows: int, rho: float
) -> float:
    """Over independent draws, on correlated rows, for the batches of many epochs that are whole."""
    rng = np.random.default_rng(0)
    n_dimensions, ratios = 64, []
    sizes_of_part = [min(group_rows, part_rows - start) for start in range(0, part_rows, group_rows)]
    groups = RowGroups.of([sizes_of_part] * n_parts)
    for number in range(12):
        contexts = rng.standard_normal((n_parts * part_rows // context_rows, n_dimensions))
        rows = np.sqrt(rho) * contexts.repeat(context_rows, 0)
        rows += np.sqrt(1 - rho) * rng.standard_normal(rows.shape)
        rows = rows.reshape(n_parts, part_rows, n_dimensions)
        stored = np.stack(
            [part[philox("rows", number, index).permutation(part_rows)] for index, part in enumerate(rows)]
        )
        epoch = Epoch(groups, batch_rows, 0, number, shuffle)
        sums = np.zeros((epoch.lanes.n_batches, n_dimensions))
        for run in epoch.runs(0, range(epoch.n_streams)):
            window = epoch.window(run.stream, run.window)
            blocks = [
                stored[part, group * group_rows : group * group_rows + n]
                for part, group, n in zip(window.parts, window.groups, window.rows, strict=True)
            ]
            inside = np.concatenate(blocks)[epoch.window_order(window)][run.offset : run.offset + run.n_rows]
            batches = (run.start + np.arange(run.n_rows)) // (batch_rows // epoch.n_streams)
            np.add.at(sums, batches, inside)
        means = sums[: n_parts * part_rows // batch_rows] / batch_rows
        flat = rows.reshape(-1, n_dimensions)
        ratios.append(np.mean((means - flat.mean(0)) ** 2 / flat.var(0)) * batch_rows)
    return float(np.mean(ratios))


@pytest.mark.parametrize(
    ("sizes", "n_parts", "part_rows", "group_rows", "batch_rows", "context_rows"),
    [
        (ShuffleSizes(4, 16, 8), 24, 256, 32, 64, 16),
        (ShuffleSizes(4, 16, 3), 24, 256, 32, 64, 16),
        (ShuffleSizes(4, 16, 1), 24, 256, 32, 64, 16),  # windows reach over blocks
        (ShuffleSizes(8, 8, 100), 10, 256, 64, 64, 32),  # one row group in a window
        (ShuffleSizes(2, 64, 64), 6, 256, 64, 128, 32),  # everything fits into memory
        (ShuffleSizes(4, 32, 7), 24, 250, 32, 64, 25),  # parts end in a shorter row group, blocks are uneven
        (ShuffleSizes(4, 8, 5), 32, 64, 64, 64, 16),  # one row group in a part
        (ShuffleSizes(1, 16, 16, run_rows=4), 24, 512, 32, 256, 32),  # runs of 4 rows
    ],
)
def test_expected_variance_is_what_an_order_gives(
    sizes: ShuffleSizes, n_parts: int, part_rows: int, group_rows: int, batch_rows: int, context_rows: int
) -> None:
    expected = expected_variance(
        sizes,
        n_parts=n_parts,
        part_rows=part_rows,
        row_group_rows=group_rows,
        batch_rows=batch_rows,
        context_rows=context_rows,
        rho=0.5,
    )
    measured = measured_variance(sizes, n_parts, part_rows, group_rows, batch_rows, context_rows, 0.5)
    assert measured == pytest.approx(expected, rel=0.06)


def test_uncorrelated_rows_are_as_good_as_a_draw_without_replacement() -> None:
    sizes = ShuffleSizes(8, 64, 1)
    store = {"n_parts": 4, "part_rows": 1024, "row_group_rows": 64, "batch_rows": 256}
    variance = expected_variance(sizes, **store, context_rows=1, rho=0.0)
    assert variance == pytest.approx(1 - 255 / 4095)


def test_a_store_of_one_part_in_memory_is_drawn_without_replacement() -> None:
    variance = expected_variance(
        ShuffleSizes(1, 1, 1), n_parts=1, part_rows=4096, row_group_rows=4096, batch_rows=512, context_rows=64, rho=0.7
    )
    assert variance == pytest.approx(1 - 511 / 4095)


def test_long_windows_come_to_the_short_formula() -> None:
    sizes = ShuffleSizes(8, 64, 64)
    variance = expected_variance(
        sizes,
        n_parts=64_000,
        part_rows=1 << 17,
        row_group_rows=1 << 12,
        batch_rows=4096,
        context_rows=512,
        rho=0.2,
    )
    assert variance == pytest.approx(1 + 4096 * 512 / (1 << 17) * (1 / 64 + 1 / 64) * 0.2, abs=0.01)


def test_more_memory_and_larger_blocks_mix_better() -> None:
    def variance(window: int, block: int) -> float:
        store = {"n_parts": 256, "part_rows": 8192, "row_group_rows": 512, "batch_rows": 1024}
        return expected_variance(ShuffleSizes(8, window, block), **store, context_rows=128, rho=0.3)

    assert variance(256, 256) < variance(64, 256) < variance(8, 256)
    assert variance(64, 256) < variance(64, 16) < variance(64, 1)
