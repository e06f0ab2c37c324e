from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sae.architectures import BatchTopKConfig, SAEConfig, StandardConfig, TopKConfig, build_sae
from sae.train import selection
from sae.train.init import initialise
from sae.train.selection import select_batch_topk, select_topk, top_k
from sae.train.step import fast_gradients

ROWS, D_IN = 30, 5


def _integers(*shape: int, seed: int = 0, largest: int = 4) -> Tensor:
    """Whole numbers: products are exact in every order, and many of them tie."""
    return torch.randint(-largest, largest + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def _encoder(d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    return _integers(ROWS, D_IN), _integers(d_sae, D_IN, seed=1), _integers(d_sae, seed=2)


@pytest.mark.parametrize(("d_sae", "k"), [(24, 1), (64, 3), (64, 8), (64, 64), (203, 7), (1024, 32), (1024, 500)])
@pytest.mark.parametrize("ties", [False, True])
def test_top_k_takes_the_values_that_torch_takes(d_sae: int, k: int, ties: bool) -> None:
    pre_acts = _integers(ROWS, d_sae) if ties else torch.randn(ROWS, d_sae, generator=torch.Generator().manual_seed(3))
    values, latents = top_k(pre_acts, k)
    torch.testing.assert_close(values.sort().values, pre_acts.topk(k).values.flip(1), rtol=0, atol=0)
    assert torch.equal(pre_acts.gather(1, latents), values)
    assert all(len(set(row)) == k for row in latents.tolist())
    if not ties:
        assert torch.equal(latents.sort().values, pre_acts.topk(k).indices.sort().values)


def test_which_of_tied_latents_is_taken_is_decided_by_the_row_alone() -> None:
    pre_acts = _integers(ROWS, 128)
    _, latents = top_k(pre_acts, 5)
    assert torch.equal(latents, torch.cat([top_k(row, 5)[1] for row in pre_acts.split(1)]))


@pytest.mark.parametrize("tile_rows", [1, 7, 30, 512])
def test_the_tiles_leave_no_trace(tile_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x_in, W_enc, b_enc = _encoder(128)
    values, latents = select_topk(x_in, W_enc, b_enc, 5)
    batch = select_batch_topk(x_in, W_enc, b_enc, 5 * ROWS)
    monkeypatch.setattr(selection, "TILE_ROWS", tile_rows)
    assert torch.equal(select_topk(x_in, W_enc, b_enc, 5)[1], latents)
    torch.testing.assert_close(values.sort().values, (x_in @ W_enc.T + b_enc).topk(5).values.flip(1), rtol=0, atol=0)
    assert all(map(torch.equal, select_batch_topk(x_in, W_enc, b_enc, 5 * ROWS), batch))


@pytest.mark.parametrize("n", [1, 40, 150, 3000, ROWS * 128])
@pytest.mark.parametrize("tile_rows", [1, 7, 512])
def test_the_largest_of_the_batch_are_those_of_one_flat_topk(
    n: int, tile_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "TILE_ROWS", tile_rows)
    x_in, W_enc, b_enc = _encoder(128)
    pre_acts = x_in @ W_enc.T + b_enc
    expected = pre_acts.flatten().topk(n).values
    values, rows, latents = select_batch_topk(x_in, W_enc, b_enc, n)
    assert torch.equal(values.sort(descending=True).values, expected[expected > 0])
    assert torch.equal(pre_acts[rows, latents], values)
    assert bool(((rows * 128 + latents).diff() > 0).all())


def test_of_what_ties_at_the_cut_of_a_batch_the_first_in_order_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "TILE_ROWS", 7)
    x_in, W_enc, b_enc = _encoder(128)
    pre_acts = x_in @ W_enc.T + b_enc
    order = sorted(range(ROWS * 128), key=lambda place: (-float(pre_acts.flatten()[place]), place))
    n = 150
    assert float(pre_acts.flatten()[order[n]]) == float(pre_acts.flatten()[order[n - 1]]), "the test needs a tie"
    _, rows, latents = select_batch_topk(x_in, W_enc, b_enc, n)
    assert (rows * 128 + latents).tolist() == sorted(order[:n])


def test_one_row_may_hold_all_of_the_batch_and_no_row_any() -> None:
    x_in, W_enc, b_enc = _encoder(64)
    x_in[:] = 0
    x_in[11] = 100
    _, rows, _ = select_batch_topk(x_in, W_enc.abs() + 1, b_enc * 0, ROWS)
    assert set(rows.tolist()) == {11}
    values, rows, latents = select_batch_topk(x_in, W_enc * 0, b_enc * 0, ROWS)
    assert (len(values), len(rows), len(latents)) == (0, 0, 0)


class _LargestTensor(TorchDispatchMode):
    n_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.n_elements = max(self.n_elements, tensor.numel())
        return out


@pytest.mark.parametrize(
    "config",
    [
        TopKConfig(d_sae=1024, k=2, k_aux=2),
        BatchTopKConfig(d_sae=1024, k=2, k_aux=2),
        StandardConfig(d_sae=1024, l1_coefficient=0.1),
    ],
    ids=lambda config: config.architecture,
)
def test_the_matrix_of_all_pre_activations_is_never_made(config: SAEConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "TILE_ROWS", 32)
    sae = build_sae(config, 4)
    initialise(sae, "tied", 0, torch.zeros(4))
    x, dead = torch.randn(256, 4), torch.arange(1024) % 2 == 0
    with _LargestTensor() as seen:
        fast_gradients(sae, x, dead, 1.0)
    assert 32 * 1024 <= seen.n_elements < 256 * 1024 / 2
