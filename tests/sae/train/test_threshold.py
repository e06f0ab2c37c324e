from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae.architectures import BatchTopKConfig
from sae.architectures.batch_topk import BatchTopKSAE
from sae.store.artefacts.records import local_files
from sae.store.reading.blocks import iter_rows
from sae.store.snapshots.snapshot import Snapshot
from sae.store.storage.filesystem import Storage
from sae.train.collectives import ALONE
from sae.train.config import SAESpec, TrainConfig
from sae.train.in_memory import train_run_in_memory
from sae.train.loop import train_saes
from sae.train.rows import RowsInMemory
from sae.train.threshold import calibrate, largest_values
from sae.weights import load_sae

D_IN, D_SAE, K = 5, 20, 3


def _sae(k: int = K) -> BatchTopKSAE:
    sae = BatchTopKSAE(BatchTopKConfig(d_sae=D_SAE, k=k), D_IN)
    generator = torch.Generator().manual_seed(0)
    for parameter in sae.parameters():
        parameter.data.normal_(generator=generator)
    return sae


def _x(rows: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, D_IN, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 1000), n=st.integers(1, 60), sizes=st.lists(st.integers(0, 40), max_size=8))
def test_the_largest_of_a_stream_are_those_of_the_whole(seed: int, n: int, sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Tenths, so that there are ties.
    blocks = [(10 * torch.randn(size, generator=generator)).round() / 10 for size in sizes]
    expected = sorted((v for block in blocks for v in block.tolist() if v > 0), reverse=True)[:n]
    assert largest_values(blocks, n).tolist() == expected


@pytest.mark.parametrize("batch_rows", [7, 1000])
def test_rows_have_k_latents_on_average_by_the_inference_rule(batch_rows: int) -> None:
    sae, x = _sae(), _x(5000)
    found = calibrate(sae, RowsInMemory(x, batch_rows, seed=0))
    assert int((sae.encode(x) > 0).sum()) == 5000 * K
    assert (found.l0, found.n_rows, found.split) == (K, 5000, "train")
    assert found.threshold == float(sae.threshold) > 0
    assert float((sae.encode(_x(5000, seed=9)) > 0).sum()) / 5000 == pytest.approx(K, rel=0.1)


def test_the_threshold_does_not_depend_on_how_the_rows_come_in_batches() -> None:
    thresholds = []
    for batch_rows in (1, 64, 500):
        sae = _sae()
        calibrate(sae, RowsInMemory(_x(500), batch_rows, seed=batch_rows))
        thresholds.append(float(sae.threshold))
    assert thresholds == pytest.approx([thresholds[0]] * 3, rel=1e-6)


def test_no_more_rows_are_looked_at_than_asked_for() -> None:
    sae, x = _sae(), _x(500)
    found = calibrate(sae, RowsInMemory(x, 64, seed=0), n_rows=100)
    assert (found.n_rows, found.l0) == (100, K)


def test_too_few_positive_pre_activations_leave_the_threshold_at_zero_and_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sae, x = _sae(k=D_SAE), _x(50)
    found = calibrate(sae, RowsInMemory(x, 64, seed=0))
    assert found.threshold == 0
    assert found.l0 == float((sae.encode(x) > 0).sum()) / 50 < D_SAE
    assert "fewer than k = 20" in caplog.text


def test_the_last_of_millions_in_descending_order_is_found_without_comparing_all_with_all() -> None:
    n = 1 << 22  # as many comparisons of each with each take minutes
    descending = torch.arange(n, 0, -1, dtype=torch.float32)
    assert ALONE.nth_largest_of_batch(descending, n) == 1
    assert ALONE.nth_largest_of_batch(descending, n - 1) == 2
    assert ALONE.nth_largest_of_batch(descending, n + 1) is None


def test_equal_pre_activations_at_the_cut_are_left_out_together() -> None:
    sae, x = _sae(), _x(1).expand(4, -1)  # 4 equal rows: every value four times
    sae.config = BatchTopKConfig(d_sae=D_SAE, k=2)
    found = calibrate(sae, RowsInMemory(x[:3], 1, seed=0))
    assert found.l0 == 2
    found = calibrate(sae, RowsInMemory(torch.zeros(4, D_IN), 1, seed=0))
    assert found.l0 == 2


def test_a_run_in_memory_ends_with_a_calibrated_threshold() -> None:
    config = TrainConfig(sae=BatchTopKConfig(d_sae=12, k=2), batch_rows=32, n_tokens=4000, lr=0.01)
    x = _x(200) * 7 + 3
    run = train_run_in_memory(x, config)
    assert "threshold" not in run.metrics()
    sae = run.result()
    assert float((sae.encode(x) > 0).sum()) / 200 == pytest.approx(2, abs=0.01)
    metrics = run.metrics()
    assert metrics["threshold"] == pytest.approx(float(sae.threshold))
    assert metrics["threshold_rule"] == "k positive latents per row on average"
    assert (metrics["threshold_l0"], metrics["threshold_split"], metrics["threshold_n_rows"]) == (2, "train", 200)


def test_the_threshold_of_a_stored_run_is_that_of_the_rows_held_out(
    storage: Storage, make_snapshot: Callable[..., Snapshot]
) -> None:
    rng = np.random.default_rng(0)
    train, heldout = (
        make_snapshot(storage, [(scale * rng.standard_normal((n, D_IN))).astype(np.float32)], row_group_rows=20)
        for n, scale in ((200, 1.0), (90, 3.0))
    )
    config = TrainConfig(sae=BatchTopKConfig(d_sae=D_SAE, k=K), batch_rows=32, n_tokens=2000)
    for calibration, snapshot, split in ((heldout.ref, heldout, "heldout"), (None, train, "train")):
        spec = SAESpec(config=config, snapshot=train.ref, order_seed=0, calibration=calibration)
        (record,) = train_saes(storage, [spec], checkpoint_every_steps=0)
        with local_files(storage, record) as folder:
            sae = load_sae(folder)
        n_positive = sum(
            int((sae.encode(torch.from_numpy(block.act.copy())) > 0).sum()) for block in iter_rows(storage, snapshot)
        )
        assert n_positive == K * snapshot.n_rows
        assert (record.metrics["threshold_split"], record.metrics["threshold_n_rows"]) == (split, snapshot.n_rows)
        assert record.metrics["threshold"] == float(sae.threshold)
