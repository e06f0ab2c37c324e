"""The statistics of finished runs against a naive computation in memory, and merged from any split of their rows."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae.plan import PipelineConfig, make_plan
from sae.statistics.accumulate import LatentSums, Sizes
from sae.statistics.firings import Block, Rows, context_key
from sae.store.storage.filesystem import Storage
from tests.flows.naive_statistics import all_firings, differences

ROWS_LOOKED_AT = 1 << 17


def test_a_run_s_statistics_equal_a_naive_computation(finished: PipelineConfig) -> None:
    assert differences(Storage(finished.execution.root), make_plan(finished).statistics[0]) == []


@pytest.mark.slow
def test_the_default_run_s_statistics_equal_a_naive_computation(default_run: PipelineConfig) -> None:
    assert differences(Storage(default_run.execution.root), make_plan(default_run).statistics[0]) == []


@pytest.fixture(scope="module")
def whole(default_run: PipelineConfig) -> tuple[Block, LatentSums]:
    """Some rows of the default run with their firings, and what is accumulated of them at once."""
    firings = all_firings(Storage(default_run.execution.root), make_plan(default_run).statistics[0])
    block = _block(firings)
    return block, _accumulate(block, np.arange(len(block.rows)))


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), n_parts=st.integers(1, 9))
def test_any_split_of_the_default_run_merges_to_the_whole(
    whole: tuple[Block, LatentSums], tmp_path: Path, seed: int, n_parts: int
) -> None:
    block, at_once = whole
    rng = np.random.default_rng(seed)
    owner = rng.integers(0, n_parts, len(block.rows))
    merged = [_accumulate(block, np.flatnonzero(owner == part)) for part in range(n_parts)]
    while len(merged) > 1:
        piece = merged.pop(rng.integers(len(merged)))
        piece.save(tmp_path / "piece")
        merged[rng.integers(len(merged))].merge_file(tmp_path / "piece")
    for name in ("n_rows", "n_fired", "max", "histogram"):
        np.testing.assert_array_equal(getattr(merged[0], name), getattr(at_once, name), err_msg=name)
    np.testing.assert_allclose(merged[0].sum, at_once.sum, rtol=1e-12)
    for name in ("top", "sample", "places"):
        for mine, theirs in zip(getattr(merged[0], name).read()[0], getattr(at_once, name).read()[0], strict=True):
            np.testing.assert_array_equal(mine, theirs, err_msg=name)
    mine, theirs = merged[0].rows.read(), at_once.rows.read()
    for a, b in zip([*mine.rows, *mine[1:]], [*theirs.rows, *theirs[1:]], strict=True):
        np.testing.assert_array_equal(a, b)
    for name, counts in merged[0].on.items():
        np.testing.assert_array_equal(counts.counts, at_once.on[name].counts, err_msg=name)


def _block(firings: dict[str, np.ndarray]) -> Block:
    """The first rows of the training snapshot; a row's number stands for its context."""
    row = firings["row"]
    inside = row < ROWS_LOOKED_AT
    n_rows = int(row[inside].max()) + 1
    columns = {name: np.zeros(n_rows, np.int64) for name in ("pos", "doc", "token", "previous", "label")}
    for name, values in columns.items():
        values[row[inside]] = firings[name][inside]
    rows = Rows(
        context_key(0, "train", np.arange(n_rows)),
        columns["pos"].astype(np.int32),
        columns["doc"],
        columns["token"].astype(np.int32),
        columns["previous"].astype(np.int32),
        columns["label"].astype(np.uint8),
    )
    return Block(rows, row[inside], firings["latent"][inside].astype(np.int32), firings["value"][inside])


def _accumulate(block: Block, chosen: np.ndarray) -> LatentSums:
    number = np.full(len(block.rows), -1)
    number[chosen] = np.arange(len(chosen))
    inside = number[block.row] >= 0
    rows = Rows(*(column[chosen] for column in block.rows))
    sums = LatentSums(Sizes(2048, 20, 64, 0, row_share=0.05, vocab_size=2048, n_labels=20, context_tokens=128))
    sums.add("train", Block(rows, number[block.row[inside]], block.latent[inside], block.value[inside]))
    return sums
