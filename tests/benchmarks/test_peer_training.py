"""The table of steps made in turn with peers' trainers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sae.architectures import TopKConfig
from sae.train.config import TrainConfig
from sae.train.rows import RowsInMemory
from sae.train.run import DataMoments, TrainingRun
from tests.benchmarks.peer_trainers import PEERS, Outcome
from tests.benchmarks.peer_training import COMPARISONS, best, fastest, row
from tests.benchmarks.peers.training import Batches, Case, EnoughError, Turns, check

ROWS = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


def a_case(**fields: Any) -> Case:
    base = {"folder": Path(), "architecture": "topk", "d_in": 6, "d_sae": 12, "k": 2, "batch_rows": 16, "n_steps": 6}
    rest = {"bf16": False, "lr": None, "seed": 0, "warmup_steps": None, "decay_steps": None, "ours": None}
    return Case(**{**base, **rest, **fields})


def a_run() -> TrainingRun:
    config = TrainConfig(sae=TopKConfig(d_sae=12, k=2))
    return TrainingRun(config, DataMoments.of(ROWS), n_steps=100, rows=RowsInMemory(ROWS, 16, 0))


def test_batches_are_the_rows_in_order_and_again_from_the_first() -> None:
    batches = list(Batches(a_case(), ROWS))
    assert len(batches) == 6
    assert torch.equal(torch.cat(batches), torch.cat([ROWS, ROWS[:32]]))


def test_a_step_of_ours_comes_before_each_of_theirs_on_the_same_rows() -> None:
    turns = Turns(a_case(n_steps=100, n_pairs=4), ROWS, a_run())
    n_batches = 0

    def their_loop() -> None:
        nonlocal n_batches
        for batch in turns:
            n_batches += 1
            assert turns.ours.state.step == n_batches
            assert batch.shape == (16, 6)

    with pytest.raises(EnoughError):
        their_loop()
    assert n_batches == 5, "the first pair is a warm-up"
    assert len(turns.seconds) == 4
    assert all(ours > 0 and theirs > 0 for ours, theirs in turns.seconds)


def test_how_a_peer_makes_products_is_not_how_we_do_and_is_given_back() -> None:
    before = torch.get_float32_matmul_precision()
    run, seen = a_run(), []
    advance = run.advance
    run.advance = lambda x: (seen.append(torch.get_float32_matmul_precision()), advance(x))[1]
    try:
        for _ in Turns(a_case(), ROWS, run):
            torch.set_float32_matmul_precision("medium")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {before}


def test_weights_that_do_not_do_what_the_peers_sae_does_are_noticed() -> None:
    sae = a_run().state.sae.requires_grad_(False)
    weights = dict(sae.state_dict())
    check(a_case(), weights, sae, ROWS)
    with pytest.raises(AssertionError, match="differs from theirs"):
        check(a_case(), weights | {"b_enc": weights["b_enc"] + 0.1}, sae, ROWS)


def test_the_best_peer_is_the_one_nearest_to_us() -> None:
    comparison = COMPARISONS["topk"]
    slow = row(comparison, PEERS[0], Outcome("1", [(0.1, 0.5), (0.2, 1.0), (0.1, 0.6)], None))
    fast = row(comparison, PEERS[1], Outcome("1", [(0.2, 0.4), (0.1, 0.3), (0.1, 0.2)], None))
    assert slow.ratios == pytest.approx((5, 5, 6))
    assert best([slow, fast]) is fast


def test_the_fastest_steps_of_both_sides_are_compared() -> None:
    assert fastest(Outcome("1", [(0.1, 0.9), (0.4, 0.3), (0.2, 1.0)], None)) == pytest.approx(3)


@pytest.mark.parametrize("name", COMPARISONS)
def test_every_row_has_peers_and_a_config_of_ours(name: str) -> None:
    comparison = COMPARISONS[name]
    assert comparison.peers()
    config = TrainConfig.model_validate(comparison.config)
    assert (config.sae.architecture, config.sae.d_sae) == (comparison.architecture, comparison.d_sae)
