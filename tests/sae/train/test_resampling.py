from collections.abc import Iterator

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from sae.architectures import StandardConfig
from sae.architectures.config import Resampling
from sae.architectures.standard import StandardSAE
from sae.train.config import TrainConfig
from sae.train.dead_latents import DeadLatentClock
from sae.train.losses import standard_losses
from sae.train.resampling import ResamplingSchedule, resample, row_losses
from sae.train.rows import RowsInMemory
from sae.train.run import DataMoments, TrainingRun
from sae.train.step import TrainState, make_optimizer, train_step

D_IN, D_SAE = 5, 12


def _x(rows: int = 64) -> torch.Tensor:
    return torch.randn(rows, D_IN, generator=torch.Generator().manual_seed(4)) + 1


def _trained(dead: tuple[int, ...] = (2, 7), **config: object) -> TrainState:
    """Ten steps of an SAE whose latents `dead` have never fired."""
    sae = StandardSAE(StandardConfig(d_sae=D_SAE, l1_coefficient=0.05, **config), D_IN)
    generator = torch.Generator().manual_seed(0)
    for parameter in sae.parameters():
        parameter.data.normal_(generator=generator)
    sae.W_dec.data.div_(sae.W_dec.norm(dim=1, keepdim=True))
    sae.b_enc.data[list(dead)] = -100
    state = TrainState(sae, make_optimizer(sae, (0.9, 0.99)), DeadLatentClock(D_SAE, 10**9))
    for x in _x(640).split(64):
        train_step(state, x, 1e-3, 1.0)
    return state


def _snapshot(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in state.sae.named_parameters()}


def test_a_new_latent_is_an_input_with_a_fifth_of_the_alive_encoders_norm() -> None:
    state, x = _trained(), _x()
    before = _snapshot(state)
    alive = [i for i in range(D_SAE) if i not in (2, 7)]
    norm = before["W_enc"][alive].norm(dim=1).mean()
    assert resample(state, x.split(16), 600, seed=0) == 2
    sae = state.sae
    for latent in (2, 7):
        matching = [row for row in x if torch.allclose(row / row.norm(), sae.W_dec[latent], atol=1e-6)]
        assert len(matching) == 1
        torch.testing.assert_close(sae.W_enc[latent], 0.2 * norm * sae.W_dec[latent])
        assert sae.b_enc[latent].item() == 0
    assert not torch.allclose(sae.W_dec[2], sae.W_dec[7])
    for name in ("W_enc", "W_dec", "b_enc"):
        assert torch.equal(sae.get_parameter(name)[alive], before[name][alive])
    assert torch.equal(sae.b_dec, before["b_dec"])


def test_adam_forgets_the_new_latents_and_nothing_else() -> None:
    state = _trained()
    moments = {name: {k: v.clone() for k, v in state.optimizer.state[p].items()} for name, p in _matrices(state)}
    resample(state, [_x()], 600, seed=0)
    for name, parameter in _matrices(state):
        for key, before in moments[name].items():
            after = state.optimizer.state[parameter][key]
            if before.shape == parameter.shape:
                assert bool((after[[2, 7]] == 0).all())
                before[[2, 7]] = 0
            assert torch.equal(after, before)
        assert any(bool(m.any()) for m in moments[name].values())


def _matrices(state: TrainState) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in state.sae.named_parameters() if name != "b_dec"]


def test_new_latents_count_as_alive_and_others_keep_their_clock() -> None:
    state = _trained()
    before = state.clock.tokens_since_fired.clone()
    assert before[[2, 7]].tolist() == [640, 640]
    resample(state, [_x()], 640, seed=0)
    before[[2, 7]] = 0
    assert torch.equal(state.clock.tokens_since_fired, before)


def test_latents_that_are_not_silent_long_enough_are_left_alone() -> None:
    state = _trained()
    before = _snapshot(state)

    def unread() -> Iterator[torch.Tensor]:
        raise AssertionError("no row is needed")
        yield

    assert resample(state, unread(), 641, seed=0) == 0
    assert all(torch.equal(state.sae.get_parameter(name), value) for name, value in before.items())


def test_the_losses_of_the_rows_average_to_that_of_the_batch() -> None:
    for config in ({}, {"decoder": "free"}, {"reduction": "mean"}):
        sae, x = _trained((), **config).sae, _x()
        torch.testing.assert_close(row_losses(sae, x).mean(), standard_losses(sae, x, None, 1.0).total)


def test_inputs_are_drawn_by_their_squared_loss() -> None:
    state = _trained((2,))
    x = _x(4)
    weight = row_losses(state.sae, x).detach().double().square().numpy()
    start, counts = _snapshot(state), np.zeros(4)
    n_draws = 2000
    for seed in range(n_draws):
        for name, value in start.items():
            state.sae.get_parameter(name).data.copy_(value)
        state.clock.tokens_since_fired[2] = 10**6
        resample(state, [x[:3], x[3:]], 10**6, seed)
        counts[int((x @ state.sae.W_dec[2].detach() / x.norm(dim=1)).argmax())] += 1
    expected = weight / weight.sum()
    spread = np.sqrt(expected * (1 - expected) / n_draws)
    assert (np.abs(counts / n_draws - expected) < 4 * spread).all()


def test_the_draw_does_not_depend_on_the_batches_and_takes_no_row_twice_nor_an_input_of_zeros() -> None:
    found = []
    for size in (1, 5, 64):
        state = _trained(tuple(range(10)))
        x = torch.cat([torch.zeros(60, D_IN), _x(4)])
        assert resample(state, x.split(size), 600, seed=0) == 4, "four usable inputs"
        found.append(state.sae.W_dec.detach().clone())
        assert len({tuple(row) for row in found[-1][:4].tolist()}) == 4
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_with_no_latent_alive_the_norm_is_that_of_all() -> None:
    state = _trained(tuple(range(D_SAE)))
    norm = state.sae.W_enc.detach().norm(dim=1).mean()
    assert resample(state, [_x()], 600, seed=0) == D_SAE
    torch.testing.assert_close(state.sae.W_enc.norm(dim=1), (0.2 * norm).expand(D_SAE))


def test_the_schedule_is_the_papers_in_a_long_run_and_the_same_shares_of_a_short_one() -> None:
    paper = ResamplingSchedule.of(Resampling(), 1_000_000, 8192)
    assert [step for step in range(1, 200_000) if paper.is_due(step)] == [25_000, 50_000, 75_000, 100_000]
    assert (paper.silent_tokens, paper.n_inputs) == (12_500 * 8192, 819_200)
    short = ResamplingSchedule.of(Resampling(), 500, 2048)
    assert [step for step in range(1, 501) if short.is_due(step)] == [62, 124, 186, 248]
    assert (short.silent_tokens, short.n_inputs) == (31 * 2048, 62 * 2048 // 8)
    tiny = ResamplingSchedule.of(Resampling(), 3, 1)
    assert (tiny.every_steps, tiny.silent_tokens, tiny.n_inputs) == (1, 1, 1)
    own = ResamplingSchedule.of(Resampling(every_steps=7, n_times=2, silent_tokens=9, n_inputs=11), 500, 32)
    assert [step for step in range(1, 501) if own.is_due(step)] == [7, 14]
    assert (own.silent_tokens, own.n_inputs) == (9, 11)


@pytest.fixture
def sparse_data() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    features = torch.nn.functional.normalize(torch.randn(24, 12, generator=generator), dim=1)
    present = torch.rand(2000, 24, generator=generator) < 0.08
    return (present * (1 + torch.rand(2000, 24, generator=generator))) @ features


def test_a_run_resamples_on_schedule_and_dead_latents_come_back(
    sparse_data: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    dead, steps = [], []
    for resampling in (None, Resampling(every_steps=50, silent_tokens=2000)):
        sae = StandardConfig(d_sae=48, l1_coefficient=0.5, resampling=resampling)
        config = TrainConfig(sae=sae, batch_rows=100, lr=3e-3, init="kaiming", dead_after_tokens=2000)
        rows = RowsInMemory(sparse_data, 100, seed=0)
        run = TrainingRun(config, DataMoments.of(sparse_data), 300, sparse_data, rows=rows)
        run.state.sae.b_enc.data[:24] = -10
        with caplog.at_level("INFO"):
            while not run.finished:
                for x in sparse_data.split(100):
                    run.advance(x)
        dead.append(run.metrics()["dead"])
        steps.append([record.args[0] for record in caplog.records if "start anew" in record.msg])
        caplog.clear()
    assert dead[0] >= 0.5
    assert dead[1] == 0
    assert steps[0] == []
    assert steps[1][0] == 50
    assert set(steps[1]) <= {50, 100, 150, 200}


def test_resampling_a_free_decoder_is_refused() -> None:
    with pytest.raises(ValidationError, match="resampling belongs to decoder"):
        StandardConfig(d_sae=4, l1_coefficient=0.1, decoder="free", resampling=Resampling())
