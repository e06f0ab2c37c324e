import pytest
import torch

from sae.architectures import StandardConfig, TopKConfig
from sae.errors import ConfigError, TrainingError
from sae.metrics import ReconstructionSums
from sae.train.config import TrainConfig
from sae.train.in_memory import train_in_memory, train_replicates, train_run_in_memory


def _x(rows: int = 100) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    present = torch.rand(rows, 8, generator=generator) < 0.2
    return (present * torch.rand(rows, 8, generator=generator)) @ torch.randn(8, 4, generator=generator) * 9 + 2


CONFIG = TrainConfig(sae=TopKConfig(d_sae=12, k=2), batch_rows=32, n_tokens=8_000, lr=0.01)


def test_it_learns_and_returns_an_sae_in_the_units_of_the_data() -> None:
    x, sums = _x(), ReconstructionSums()
    sums.add(x, train_in_memory(x, CONFIG)(x))
    assert sums.fvu < 0.25


def test_every_row_is_seen_once_an_epoch() -> None:
    run = train_run_in_memory(_x(), TrainConfig.model_validate(CONFIG.model_dump() | {"n_tokens": 300}))
    assert (run.state.step, run.state.n_tokens) == (12, 300)
    assert run.metrics()["n_tokens"] == 300


def test_the_square_root_scale_gives_inputs_the_norm_that_their_width_has_and_is_folded_away() -> None:
    x = _x(200) * 10
    config = TrainConfig.model_validate(CONFIG.model_dump() | {"input_scale": "sqrt_d", "n_tokens": 300})
    run = train_run_in_memory(x, config)
    assert float((run.scale * x).norm(dim=1).mean()) == pytest.approx(4**0.5, rel=1e-6)
    trained = [parameter.detach().clone() for parameter in run.state.sae.parameters()]
    sae = run.result()
    torch.testing.assert_close(sae.W_enc, trained[0] * run.scale)
    torch.testing.assert_close(sae.b_dec, trained[3] / run.scale)


def test_a_batch_larger_than_the_data_is_a_full_batch() -> None:
    run = train_run_in_memory(_x(10), TrainConfig.model_validate(CONFIG.model_dump() | {"n_tokens": 50}))
    assert run.state.step == 5


def test_equal_seeds_give_equal_bits_and_the_seed_argument_replaces_the_configs() -> None:
    short = TrainConfig.model_validate(CONFIG.model_dump() | {"n_tokens": 1000})
    a, b = train_in_memory(_x(), short, seed=3), train_in_memory(_x(), short, seed=3)
    c = train_in_memory(_x(), TrainConfig.model_validate(short.model_dump() | {"seed": 3}))
    d = train_in_memory(_x(), short)
    assert torch.equal(a.W_dec, b.W_dec)
    assert torch.equal(a.W_dec, c.W_dec)
    assert not torch.equal(a.W_dec, d.W_dec)


def test_what_cannot_be_trained_on_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"torch.int64 \(3, 4\)"):
        train_in_memory(torch.ones(3, 4, dtype=torch.int64), CONFIG)
    with pytest.raises(TrainingError, match="all equal"):
        train_in_memory(torch.full((30, 4), 0.1), CONFIG)
    with pytest.raises(TrainingError, match="not finite"):
        train_in_memory(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), CONFIG)


def test_a_batch_of_another_width_is_refused() -> None:
    run = train_run_in_memory(_x(), CONFIG)
    with pytest.raises(ConfigError, match="width 5 for an SAE of d_in = 4"):
        run.advance(torch.zeros(3, 5))


@pytest.mark.parametrize(
    "sae",
    [
        StandardConfig(d_sae=6, l1_coefficient=0.1),
        StandardConfig(d_sae=6, l1_coefficient=0.1, decoder="free"),
        StandardConfig(d_sae=6, l1_coefficient=0.1, decoder="free", reduction="mean"),
        StandardConfig(d_sae=6, l1_coefficient=0.5, l1_warmup_fraction=0.5),
        TopKConfig(d_sae=6, k=2),
    ],
    ids=repr,
)
def test_replicates_equal_training_each_seed_alone(sae: StandardConfig | TopKConfig) -> None:
    x = _x(20).double()
    config = TrainConfig(sae=sae, batch_rows=20, n_tokens=20 * 40, lr=0.003, init="default")
    together = train_replicates(x, config, [5, 6, 7])
    for seed, found in zip([5, 6, 7], together, strict=True):
        alone = train_in_memory(x, config, seed=seed)
        torch.testing.assert_close(found(x.float()), alone(x.float()), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found.W_dec, alone.W_dec, rtol=1e-3, atol=1e-3)
    assert not torch.equal(together[0].W_dec, together[1].W_dec)
    assert train_replicates(x, config, []) == []


def test_replicates_that_diverge_are_an_error() -> None:
    config = TrainConfig(
        sae=StandardConfig(d_sae=6, l1_coefficient=0.1, decoder="free"), batch_rows=20, n_tokens=400, lr=1e30
    )
    with pytest.raises(TrainingError, match="replicate"):
        train_replicates(_x(20), config, [1, 2])
