"""What every architecture promises. A new one is covered by its line in ARCHITECTURES and its config here."""

import pytest
import torch

from sae.architectures import (
    ARCHITECTURES,
    SAE,
    BatchTopKConfig,
    SAEConfig,
    StandardConfig,
    TopKConfig,
    build_sae,
)
from sae.errors import InputError
from sae.train.backward import GRADIENTS
from sae.train.losses import LOSSES

D_IN, D_SAE = 6, 20
CONFIGS: dict[str, list[SAEConfig]] = {
    "batch_topk": [BatchTopKConfig(d_sae=D_SAE, k=4)],
    "standard": [
        StandardConfig(d_sae=D_SAE, l1_coefficient=0.1),
        StandardConfig(d_sae=D_SAE, l1_coefficient=0.1, decoder="free"),
    ],
    "topk": [TopKConfig(d_sae=D_SAE, k=4), TopKConfig(d_sae=D_SAE, k=D_SAE)],
}


@pytest.fixture(params=[(name, i) for name in ARCHITECTURES for i in range(len(CONFIGS.get(name, [None])))], ids=str)
def sae(request: pytest.FixtureRequest) -> SAE:
    name, i = request.param
    sae = build_sae(CONFIGS[name][i], D_IN)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(generator=generator)
        for threshold in sae.buffers():
            threshold.fill_(0.7)
    return sae


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(50, D_IN, generator=torch.Generator().manual_seed(2))


def test_every_architecture_has_a_loss_and_hand_written_gradients() -> None:
    assert set(LOSSES) == set(GRADIENTS) == set(ARCHITECTURES) == set(CONFIGS)


def test_parameters_have_the_names_and_shapes_of_the_contract(sae: SAE) -> None:
    assert {name: tuple(parameter.shape) for name, parameter in sae.named_parameters()} == {
        "W_enc": (D_SAE, D_IN),
        "W_dec": (D_SAE, D_IN),
        "b_enc": (D_SAE,),
        "b_dec": (D_IN,),
    }


def test_latents_are_never_negative_and_some_are_positive(sae: SAE, x: torch.Tensor) -> None:
    latents = sae.encode(x)
    assert latents.shape == (50, D_SAE)
    assert bool((latents >= 0).all())
    assert bool((latents > 0).any())


def test_forward_is_decode_of_encode(sae: SAE, x: torch.Tensor) -> None:
    assert torch.equal(sae(x), sae.decode(sae.encode(x)))


def test_sparse_latents_are_the_positive_dense_ones_in_order(sae: SAE, x: torch.Tensor) -> None:
    latents, sparse = sae.encode(x), sae.encode_sparse(x)
    assert bool((sparse.value > 0).all())
    position = sparse.row * D_SAE + sparse.latent
    assert bool((position.diff() > 0).all())
    rebuilt = torch.zeros_like(latents)
    rebuilt[sparse.row, sparse.latent] = sparse.value
    assert torch.equal(rebuilt, latents)


def test_sparse_decoding_equals_dense_decoding_also_for_rows_without_latents(sae: SAE, x: torch.Tensor) -> None:
    sparse = sae.encode_sparse(x)
    kept = (sparse.row != 0) & (sparse.row != 7) & (sparse.row != 49)
    sparse = type(sparse)(*(column[kept] for column in sparse))
    latents = sae.encode(x)
    latents[[0, 7, 49]] = 0
    torch.testing.assert_close(sae.decode_sparse(sparse, 50), sae.decode(latents))


def test_sparse_decoding_of_nothing_is_the_bias(sae: SAE) -> None:
    empty = sae.encode_sparse(torch.zeros(0, D_IN))
    torch.testing.assert_close(sae.decode_sparse(empty, 3), sae.b_dec.expand(3, -1))


def test_leading_dimensions_are_kept(sae: SAE, x: torch.Tensor) -> None:
    torch.testing.assert_close(sae(x.view(5, 10, D_IN)), sae(x).view(5, 10, D_IN))


def test_a_wrong_width_is_an_error_that_names_both(sae: SAE) -> None:
    with pytest.raises(InputError, match=r"width 7 .* d_in = 6"):
        sae.encode(torch.zeros(3, 7))


def test_works_in_other_float_types(sae: SAE, x: torch.Tensor) -> None:
    single = sae(x)
    torch.testing.assert_close(sae.double()(x.double()), single.double(), rtol=1e-4, atol=1e-4)
    assert sae.bfloat16()(x.bfloat16()).dtype is torch.bfloat16


def test_the_gradient_of_b_dec_is_that_of_the_plain_formula(sae: SAE, x: torch.Tensor) -> None:
    sae.double()
    x = x.double()
    weights = torch.randn(50, D_SAE, dtype=torch.float64)
    (found,) = torch.autograd.grad((sae.pre_acts(x) * weights).sum(), sae.b_dec, allow_unused=True)
    if not sae.subtracts_b_dec:
        assert found is None
        return
    (expected,) = torch.autograd.grad((((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc) * weights).sum(), sae.b_dec)
    torch.testing.assert_close(found, expected)


def test_gradients_reach_the_input(sae: SAE, x: torch.Tensor) -> None:
    x.requires_grad_()
    sae(x).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.abs().sum() > 0)
