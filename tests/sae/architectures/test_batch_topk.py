import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sae.architectures import BatchTopKConfig
from sae.architectures.batch_topk import BatchTopKSAE


def _sae(d_sae: int, k: int) -> BatchTopKSAE:
    return BatchTopKSAE(BatchTopKConfig(d_sae=d_sae, k=k), 2)


def test_training_keeps_the_largest_of_the_batch_worked_by_hand() -> None:
    pre_acts = torch.tensor([[5.0, 4.0, 3.0, -1.0], [0.5, 2.0, -2.0, 0.1], [-1.0, -2.0, -3.0, -4.0]])
    values, rows, latents = _sae(4, 1).select_batch(pre_acts)
    assert values.tolist() == [5.0, 4.0, 3.0]
    assert rows.tolist() == [0, 0, 0]
    assert latents.tolist() == [0, 1, 2]
    # Six pairs of twelve, of which only six are positive; nine pairs, and still only six.
    for k in (2, 3):
        assert _sae(4, k).select_batch(pre_acts).values.tolist() == [5.0, 4.0, 3.0, 0.5, 2.0, pytest.approx(0.1)]


def test_inference_keeps_what_exceeds_the_threshold_whatever_the_other_rows_hold() -> None:
    sae = _sae(4, 1)
    row = torch.tensor([0.5, 2.0, -2.0, 1.0])
    assert sae.activate(row).tolist() == [0.5, 2.0, 0.0, 1.0], "ReLU before calibration"
    sae.threshold.fill_(1.0)
    assert sae.activate(row).tolist() == [0.0, 2.0, 0.0, 0.0], "equal is not above"
    assert torch.equal(sae.activate(torch.stack([row, 100 * row]))[0], sae.activate(row))


@given(seed=st.integers(0, 1000), k=st.integers(1, 12), rows=st.integers(1, 9))
def test_the_pairs_are_the_largest_positive_ones_in_order_of_row_and_latent(seed: int, k: int, rows: int) -> None:
    pre_acts = torch.randn(rows, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    values, row, latent = _sae(12, k).select_batch(pre_acts)
    largest = sorted((v for v in pre_acts.flatten().tolist() if v > 0), reverse=True)[: rows * k]
    assert sorted(values.tolist(), reverse=True) == largest
    assert torch.equal(pre_acts[row, latent], values)
    assert bool(((row * 12 + latent).diff() > 0).all())


def test_the_threshold_is_saved_with_the_weights_and_is_no_parameter() -> None:
    sae = _sae(4, 1)
    assert sae.state_dict()["threshold"].dtype is torch.float32
    assert "threshold" not in dict(sae.named_parameters())


def test_more_active_latents_than_latents_is_refused() -> None:
    with pytest.raises(ValidationError, match="k = 9 is larger than d_sae = 8"):
        BatchTopKConfig(d_sae=8, k=9)
