import pytest
import torch
import torch.nn.functional as F

from sae.architectures import SAE, StandardConfig, TopKConfig, build_sae
from sae.train import init as init_module
from sae.train.collectives import Collectives
from sae.train.init import densest_directions, farthest_points, generator, geometric_median, initialise
from sae.train.shares import LATENT_PARAMETERS, build_share


def _initialised(init: str, seed: int = 0, decoder: str = "unit", d_sae: int = 12, rows: int = 50) -> SAE:
    sae = build_sae(StandardConfig(d_sae=d_sae, l1_coefficient=0.1, decoder=decoder), 4)
    sample = torch.randn(rows, 4, generator=torch.Generator().manual_seed(9)) + 2
    initialise(sae, init, seed, sample.mean(dim=0), sample)
    return sae


def test_tied_starts_with_half_the_decoder_and_the_mean() -> None:
    sae = _initialised("tied")
    torch.testing.assert_close(sae.W_enc, 0.5 * sae.W_dec)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(12))
    assert not sae.b_enc.any()
    assert bool((sae.b_dec > 1).all())


@pytest.mark.parametrize("init", ["tied", "farthest_point", "density", "default", "kaiming", "small"])
def test_equal_seeds_give_equal_weights_and_other_seeds_others(init: str) -> None:
    a, b, c = (_initialised(init, seed) for seed in (0, 0, 1))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    # The densest rays do not depend on the seed; where there are none it decides as for farthest_point.
    assert init == "density" or not torch.equal(a.W_dec, c.W_dec)


def test_the_stream_is_not_that_of_a_plain_generator_of_the_same_seed() -> None:
    assert not torch.equal(
        torch.randn(5, generator=generator("sae init", 3)), torch.randn(5, generator=torch.Generator().manual_seed(3))
    )


def test_kaiming_is_that_of_torch_for_a_relu_with_the_geometric_median_and_no_ties() -> None:
    sae = _initialised("kaiming", d_sae=5000)
    uniform = torch.nn.init.kaiming_uniform_(torch.empty(5000, 4), nonlinearity="relu")
    assert float(sae.W_enc.detach().abs().max()) == pytest.approx(float(uniform.abs().max()), rel=1e-2)
    assert float(sae.W_enc.detach().std()) == pytest.approx(float(uniform.std()), rel=2e-2)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(5000))
    assert abs(float((F.normalize(sae.W_enc.detach(), dim=1) * sae.W_dec.detach()).sum(dim=1).mean())) < 0.05
    assert not sae.b_enc.any()
    sample = torch.randn(50, 4, generator=torch.Generator().manual_seed(9)) + 2
    torch.testing.assert_close(sae.b_dec.detach(), geometric_median(sample).float())


def test_the_geometric_median_has_the_least_mean_distance_and_ignores_how_far_an_outlier_is() -> None:
    # Of a triangle with angles below 120 degrees: every side is seen under 120 degrees. Of a point in the middle of
    # three others: that point.
    triangle = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 3.0**0.5]])
    torch.testing.assert_close(geometric_median(triangle), torch.tensor([0.0, 3**-0.5]).double(), atol=1e-6, rtol=0)
    for far in (3.0, 3000.0):
        line = torch.tensor([[0.0], [1.0], [2.0], [1.0], [far]])
        torch.testing.assert_close(geometric_median(line), torch.tensor([1.0]).double(), atol=1e-4, rtol=0)
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) ** 3 + 5
    found = geometric_median(x)
    cost = [(x - (found + shift)).norm(dim=1).mean() for shift in (0, *(0.01 * torch.eye(3)), *(-0.01 * torch.eye(3)))]
    assert min(cost) == cost[0]


def test_small_is_tied_with_rows_of_norm_a_tenth_and_no_biases() -> None:
    sae = _initialised("small", decoder="free")
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((12,), 0.1))
    assert torch.equal(sae.W_enc, sae.W_dec)
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()


def test_default_is_what_torch_linear_does() -> None:
    sae = build_sae(TopKConfig(d_sae=4000, k=2), 16)
    free = build_sae(StandardConfig(d_sae=4000, l1_coefficient=0, decoder="free"), 16)
    for each in (sae, free):
        initialise(each, "default", 0, torch.zeros(16))
    linear = torch.nn.Linear(16, 4000)
    with torch.no_grad():
        assert float(free.W_enc.abs().max()) == pytest.approx(float(linear.weight.abs().max()), rel=0.01)
        assert float(free.W_enc.std()) == pytest.approx(float(linear.weight.std()), rel=0.02)
        assert float(free.W_dec.abs().max()) <= 4000**-0.5
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(4000))


def test_farthest_points_take_one_of_each_cluster_first() -> None:
    rng = torch.Generator().manual_seed(0)
    centres = torch.eye(4)
    directions = F.normalize(centres.repeat(10, 1) + 0.05 * torch.randn(40, 4, generator=rng), dim=1)
    chosen = farthest_points(directions, 4, rng)
    assert sorted(i % 4 for i in chosen) == [0, 1, 2, 3]


def test_densest_directions_find_rays_among_scattered_mixtures() -> None:
    rng = torch.Generator().manual_seed(0)
    rays = F.normalize(torch.randn(6, 3, generator=rng), dim=1)
    noisy = F.normalize(rays.repeat(30, 1) + 0.02 * torch.randn(180, 3, generator=rng), dim=1)
    scattered = F.normalize(torch.randn(150, 3, generator=rng), dim=1)
    chosen = torch.cat([scattered, noisy])[densest_directions(torch.cat([scattered, noisy]), 6, rng)]
    assert float((rays @ chosen.T).amax(dim=1).min()) > 0.97


def test_no_row_is_chosen_twice_and_random_directions_fill_up_small_data() -> None:
    directions = F.normalize(torch.randn(7, 3), dim=1)
    rng = torch.Generator().manual_seed(0)
    assert sorted(farthest_points(directions, 20, rng)) == list(range(7))
    assert sorted(densest_directions(directions, 20, rng)) == list(range(7))
    sae = _initialised("farthest_point", d_sae=12, rows=5)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(12))
    assert len(torch.unique(sae.W_dec, dim=0)) == 12


def test_the_encoder_sees_the_data_directions_of_the_decoder() -> None:
    sae = _initialised("farthest_point")
    torch.testing.assert_close(sae.W_enc, sae.W_dec)


class _Share(Collectives):
    """One of two devices."""

    def __init__(self, number: int) -> None:
        self.latent_rank, self.n_latent = number, 2

    def latents(self, d_sae: int) -> slice:
        return slice(self.latent_rank * d_sae // 2, (self.latent_rank + 1) * d_sae // 2)


@pytest.mark.parametrize("init", ["tied", "farthest_point", "density", "default", "kaiming", "small"])
@pytest.mark.parametrize(("d_sae", "rows"), [(74, 200), (74, 30), (34, 200)], ids=str)
def test_devices_start_with_their_latents_of_the_same_whole(
    init: str, d_sae: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn in blocks, of which the last is longer; with data for all directions, or for fewer than one device has."""
    monkeypatch.setattr(init_module, "BLOCK_ROWS", 16)
    sample = torch.randn(rows, 5, generator=torch.Generator().manual_seed(9)) + 2
    config = StandardConfig(d_sae=d_sae, l1_coefficient=0.1)
    whole, shares = build_sae(config, 5), [build_share(config, 5, _Share(number)) for number in (0, 1)]
    initialise(whole, init, 0, sample.mean(dim=0), sample)
    for number, share in enumerate(shares):
        initialise(share, init, 0, sample.mean(dim=0), sample, _Share(number))
    for name, parameter in whole.named_parameters():
        own = [share.get_parameter(name) for share in shares]
        assert all(torch.equal(found, parameter) for found in ([torch.cat(own)] if name in LATENT_PARAMETERS else own))
