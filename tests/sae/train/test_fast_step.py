"""The step that is used against a plain loop of automatic differentiation, and mistakes that the comparison finds."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from sae.architectures import SAE, BatchTopKConfig, SAEConfig, StandardConfig, TopKConfig, build_sae
from sae.architectures.batch_topk import BatchTopKSAE
from sae.train import backward, backward_standard, selection, step
from sae.train.collectives import Collectives
from sae.train.dead_latents import DeadLatentClock
from sae.train.init import initialise
from sae.train.losses import LOSSES, Losses, auxk_loss
from sae.train.pairs import Pairs
from sae.train.selection import select_batch_topk
from sae.train.shares import build_share
from sae.train.step import (
    ADAM_EPS,
    Gradients,
    TrainState,
    autograd_gradients,
    fast_gradients,
    fast_gradients_selecting_in_bfloat16,
    make_optimizer,
    remove_parallel_component,
    renormalise,
    train_step,
)

D_IN, D_SAE, ROWS, N_STEPS, LR, DEAD_AFTER, VARIANCE = 8, 64, 40, 60, 3e-3, 200, 1.3
CONFIGS: dict[str, SAEConfig] = {
    "topk": TopKConfig(d_sae=D_SAE, k=3, k_aux=5),
    "topk, many dead": TopKConfig(d_sae=D_SAE, k=3, k_aux=2),
    "topk, no auxk": TopKConfig(d_sae=D_SAE, k=3, k_aux=0),
    "batch_topk": BatchTopKConfig(d_sae=D_SAE, k=3, k_aux=5),
    "standard": StandardConfig(d_sae=D_SAE, l1_coefficient=0.3),
    "standard, free": StandardConfig(d_sae=D_SAE, l1_coefficient=0.3, decoder="free"),
    "standard, mean": StandardConfig(d_sae=D_SAE, l1_coefficient=0.3, reduction="mean"),
}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, the last of them smaller."""
    monkeypatch.setattr(selection, "TILE_ROWS", 16)
    monkeypatch.setattr(selection, "GPU_TILE_BYTES", 0)


def _sae(config: SAEConfig) -> SAE:
    sae = build_sae(config, D_IN)
    initialise(sae, "tied", 0, torch.zeros(D_IN))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        # Beaten by the others and so soon dead, but not negative: behind a ReLU AuxK would have no gradient.
        sae.W_enc[: D_SAE // 2] *= 0.02
        sae.b_enc.normal_(std=0.1, generator=generator)
        sae.b_enc[: D_SAE // 2].abs_().mul_(0.1)
        sae.b_dec.normal_(std=0.1, generator=generator)
    return sae


def _batches(dtype: torch.dtype, n: int = N_STEPS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(8)
    return [torch.randn(ROWS, D_IN, generator=generator).to(dtype) for _ in range(n)]


def _train(config: SAEConfig, gradients: Gradients = fast_gradients, device: torch.device | str = "cpu") -> SAE:
    sae = _sae(config).double().to(device)
    state = TrainState(sae, make_optimizer(sae, (0.9, 0.99)), DeadLatentClock(D_SAE, DEAD_AFTER, device))
    for x in _batches(torch.float64):
        train_step(state, x.to(device), LR, VARIANCE, gradients)
    return sae.cpu()


def _train_plainly(config: SAEConfig) -> SAE:
    """Automatic differentiation, explicit projection, the unfused Adam."""
    sae, since_fired, n_dead = _sae(config).double(), torch.zeros(D_SAE), 0
    adam = torch.optim.Adam(sae.parameters(), lr=LR, betas=(0.9, 0.99), eps=ADAM_EPS, foreach=False)
    for x in _batches(torch.float64):
        dead = since_fired >= DEAD_AFTER
        n_dead = max(n_dead, int(dead.sum()))
        adam.zero_grad()
        losses = LOSSES[config.architecture](sae, x, dead if bool(dead.any()) else None, VARIANCE)
        losses.total.backward()
        if sae.unit_decoder:
            W_dec, gradient = sae.W_dec.detach(), sae.W_dec.grad
            gradient -= (gradient * W_dec).sum(1, keepdim=True) * W_dec
        adam.step()
        if sae.unit_decoder:
            with torch.no_grad():
                sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
        since_fired = torch.where(losses.fired, 0, since_fired + len(x))
    if config.architecture != "standard":
        assert n_dead > 10, "the comparison needs dead latents"
    return sae


def _assert_equal_weights(found: SAE, expected: SAE) -> None:
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), parameter, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_weights_after_sixty_steps_are_those_of_a_plain_loop(config: SAEConfig) -> None:
    _assert_equal_weights(_train(config), _train_plainly(config))


@pytest.mark.parametrize("below", [0.0, 0.55, 2.0], ids=["dense", "some tiles", "pairs"])
@pytest.mark.parametrize("name", ["standard", "standard, free", "standard, mean"])
def test_dense_and_sparse_tiles_of_standard_are_the_same_step(
    name: str, below: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[str] = []
    monkeypatch.setattr(backward_standard, "SPARSE_BELOW", below)
    monkeypatch.setattr(backward_standard, "Pairs", lambda *args: kinds.append("pairs") or Pairs(*args))
    monkeypatch.setattr(backward_standard, "_add_product", _recording(kinds))
    _assert_equal_weights(_train(CONFIGS[name]), _train_plainly(CONFIGS[name]))
    assert set(kinds) == {0.0: {"dense"}, 0.55: {"dense", "pairs"}, 2.0: {"pairs"}}[below]


@pytest.mark.parametrize("by_pairs", [True, False], ids=["pairs", "matrices"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_another_device_takes_the_same_steps(
    config: SAEConfig, by_pairs: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backward, "DENSE_AUXK_ON_GPU", 0 if by_pairs else 1000)
    monkeypatch.setattr(backward_standard, "SPARSE_BELOW_ON_GPU", 2.0 if by_pairs else 0.0)
    _assert_equal_weights(_train(config, device=device), _train_plainly(config))


def _recording(kinds: list[str]) -> Callable[[Tensor, Tensor, Tensor], None]:
    add_product = backward_standard._add_product

    def record(*args: Tensor) -> None:
        kinds.append("dense")
        add_product(*args)

    return record


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_single_steps_in_float32_differ_by_rounding(config: SAEConfig) -> None:
    dead = torch.arange(D_SAE) < D_SAE // 2
    fast, plain = _sae(config), _sae(config)
    for x in _batches(torch.float32, 10):
        fast_gradients(fast, x, dead, VARIANCE)
        autograd_gradients(plain, x, dead, VARIANCE)
        for name, parameter in plain.named_parameters():
            difference = torch.linalg.vector_norm(fast.get_parameter(name).grad - parameter.grad)
            assert float(difference) < 1e-5 * float(torch.linalg.vector_norm(parameter.grad)), name
        with torch.no_grad():
            for a, b in zip(fast.parameters(), plain.parameters(), strict=True):
                a.copy_(b.sub_(0.1 * b.grad))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_equal_runs_give_equal_bits(config: SAEConfig) -> None:
    found = []
    for _ in range(2):
        sae = _sae(config)
        state = TrainState(sae, make_optimizer(sae, (0.9, 0.99)), DeadLatentClock(D_SAE, DEAD_AFTER), "onednn")
        for x in _batches(torch.float32, 20):
            train_step(state, x, LR, VARIANCE)
        found.append(sae)
    for a, b in zip(*(sae.parameters() for sae in found), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["topk", "batch_topk"])
def test_after_a_selection_in_bfloat16_all_else_is_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is told which latents are selected, and does the rest."""
    config, dead = CONFIGS[name], torch.arange(D_SAE) < D_SAE // 2
    fast, plain = _sae(config).double(), _sae(config).double()
    x = torch.cat(_batches(torch.float64))
    encoder = (x - plain.b_dec.detach(), plain.W_enc.detach(), plain.b_enc.detach())
    choices = []
    for dtype in (torch.float64, torch.bfloat16):
        if name == "topk":
            latents = selection.select_topk(*encoder, 3, dtype)[1]
            rows = torch.arange(len(x))[:, None].expand_as(latents)
        else:
            _, rows, latents = selection.select_batch_topk(*encoder, 3 * len(x), dtype)
        choices.append((rows, latents))
    exact, rounded = (set((rows * D_SAE + latents).flatten().tolist()) for rows, latents in choices)
    assert exact != rounded, "the test needs a choice that bfloat16 changes"

    def select(sae: SAE, pre_acts: Tensor) -> tuple[Tensor, ...]:
        rows, latents = choices[1]
        values = pre_acts[rows, latents].relu()
        return (values, latents) if name == "topk" else (values, rows, latents)

    monkeypatch.setattr(type(plain), "select" if name == "topk" else "select_batch", select)
    expected = autograd_gradients(plain, x, dead, VARIANCE)
    found = fast_gradients_selecting_in_bfloat16(fast, x, dead, VARIANCE)
    torch.testing.assert_close(found.total, expected.total, rtol=1e-12, atol=0)
    for parameter_name, parameter in plain.named_parameters():
        torch.testing.assert_close(fast.get_parameter(parameter_name).grad, parameter.grad, rtol=1e-12, atol=1e-12)


def _project_after_adam(sae: SAE, optimizer: torch.optim.Adam, lr: float, *_: object) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    if sae.unit_decoder:
        remove_parallel_component(sae.W_dec)
        renormalise(sae.W_dec)


def _b_dec_with_the_wrong_sign(sae: SAE, d_b_dec: Tensor, shared: Collectives) -> None:
    sae.b_dec.grad = d_b_dec + sae.b_enc.grad @ sae.W_enc


def _b_dec_through_the_decoder_alone(sae: SAE, d_b_dec: Tensor, shared: Collectives) -> None:
    sae.b_dec.grad = d_b_dec


def _unsorted(pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    order = torch.arange(len(pairs.latent))
    starts = torch.searchsorted(pairs.latent.sort().values, torch.arange(D_SAE + 1))
    return order, pairs.row, starts


def _one_per_slab(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    slabs = pre_acts.view(len(pre_acts), 8, -1).max(dim=1)
    values, chosen = slabs.values.topk(k)
    return values, slabs.indices.gather(1, chosen) * slabs.values.shape[1] + chosen


def _per_tile(x_in: Tensor, W_enc: Tensor, b_enc: Tensor, n: int, dtype: object) -> tuple[Tensor, Tensor, Tensor]:
    halves = [select_batch_topk(half, W_enc, b_enc, n // 2) for half in x_in.chunk(2)]
    values, rows, latents = (torch.cat(column) for column in zip(*halves, strict=True))
    rows[len(halves[0][1]) :] += len(x_in) // 2
    return values, rows, latents


def _auxk_with_a_bias(sae: SAE, x_in: Tensor, residual: Tensor, *rest: object) -> Tensor:
    return add_auxk(sae, x_in, residual - sae.b_dec, *rest)


def _auxk_that_reaches_the_residual(sae: SAE, x_in: Tensor, residual: Tensor, which: Tensor, *rest: object) -> Tensor:
    aux = add_auxk(sae, x_in, residual.clone(), which, *rest)
    values, latents = sae.select(x_in @ sae.W_enc.T + sae.b_enc)
    with torch.enable_grad():
        W_dec = sae.W_dec.detach().requires_grad_()
        error = torch.nn.functional.embedding_bag(latents, W_dec, per_sample_weights=values, mode="sum")
        error = error - error.detach() - residual
        pre_acts = (x_in @ sae.W_enc.T + sae.b_enc).detach()[:, which]
        auxk = auxk_loss(-error, pre_acts, W_dec.detach()[which], sae.config.k_aux)
        sae.W_dec.grad += torch.autograd.grad(sae.config.auxk_coefficient * auxk, W_dec)[0]
    return aux


add_auxk = backward._add_auxk
MISTAKES: dict[str, tuple[str, object, str, object]] = {
    "projection after Adam": ("topk", step, "apply_gradients", _project_after_adam),
    "no projection": ("topk", step, "remove_parallel_component", lambda W_dec: None),
    "no renormalisation": ("topk", step, "renormalise", lambda W_dec: None),
    "b_dec's sign": ("topk", backward, "encoder_gradients", _b_dec_with_the_wrong_sign),
    "b_dec's sign, standard": ("standard", backward_standard, "encoder_gradients", _b_dec_with_the_wrong_sign),
    "b_dec without the encoder": ("batch_topk", backward, "encoder_gradients", _b_dec_through_the_decoder_alone),
    "unsorted pairs": ("topk", Pairs, "_by_latent", property(_unsorted)),
    "no bias gradient": ("topk", Pairs, "totals", lambda pairs, weights: weights.new_zeros(D_SAE)),
    "one candidate a slab": ("topk", selection, "top_k", _one_per_slab),
    "a topk of each half": ("batch_topk", backward, "select_batch_topk", _per_tile),
    "no AuxK": ("topk", backward, "_add_auxk", lambda *args: torch.zeros((), dtype=torch.float64)),
    "AuxK with the bias": ("topk", backward, "_add_auxk", _auxk_with_a_bias),
    "AuxK not detached": ("topk", backward, "_add_auxk", _auxk_that_reaches_the_residual),
    "accumulated only once": ("standard", backward_standard, "_add_product", lambda total, a, b: total.copy_(a @ b)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_step_is_found(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, place, attribute, wrong = MISTAKES[mistake]
    expected = _train_plainly(CONFIGS[name])
    monkeypatch.setattr(place, attribute, wrong)
    with pytest.raises(AssertionError):
        _assert_equal_weights(_train(CONFIGS[name]), expected)


class _Thread(Collectives):
    """One of 2 x 2 threads, each with half of the rows and half of the latents."""

    def __init__(
        self, place: tuple[int, int], barrier: threading.Barrier, slots: dict[tuple[int, int], Tensor]
    ) -> None:
        self.place, self._barrier, self._slots = place, barrier, slots

    def latents(self, d_sae: int) -> slice:
        return slice(self.place[1] * d_sae // 2, (self.place[1] + 1) * d_sae // 2)

    def _sum(self, places: list[tuple[int, int]], value: Tensor) -> Tensor:
        self._slots[self.place] = value.clone()
        self._barrier.wait(10)
        summed = self._slots[places[0]] + self._slots[places[1]]
        self._barrier.wait(10)
        return summed

    def sum_latents(self, partial: Tensor) -> Tensor:
        return self._sum([(self.place[0], 0), (self.place[0], 1)], partial)

    def sum_rows(self, total: Tensor) -> Tensor:
        return self._sum([(0, self.place[1]), (1, self.place[1])], total)


@pytest.mark.parametrize("name", ["topk", "batch_topk", "standard", "standard, free", "standard, mean"])
def test_devices_that_share_an_sae_find_its_gradients(name: str) -> None:
    config = CONFIGS[name]
    if config.architecture != "standard":
        # Every dead latent takes part: which of them are strongest is for the mesh to agree on, like the pairs below.
        config = config.model_copy(update={"k_aux": D_SAE})
    whole, x, dead = _sae(config).double(), _batches(torch.float64, 1)[0], torch.arange(D_SAE) % 3 == 0
    expected = fast_gradients(whole, x, dead, VARIANCE)
    barrier = threading.Barrier(4)
    slots: dict[tuple[int, int], Tensor] = {}

    def device(rank: tuple[int, int]) -> tuple[SAE, Losses]:
        rows = slice(rank[0] * ROWS // 2, (rank[0] + 1) * ROWS // 2)
        own = slice(rank[1] * D_SAE // 2, (rank[1] + 1) * D_SAE // 2)
        shared = _Thread(rank, barrier, slots)
        sae = build_share(config, D_IN, shared).double()
        for parameter_name, parameter in whole.named_parameters():
            part = parameter.detach() if parameter_name == "b_dec" else parameter.detach()[own]
            sae.get_parameter(parameter_name).data.copy_(part)
        if config.architecture == "standard":
            return sae, backward_standard.standard_gradients(sae, x[rows], None, VARIANCE, shared, ROWS)
        x_in = x - whole.b_dec.detach()
        row, latent, value = _selected(whole, x_in)
        mine = (row // (ROWS // 2) == rank[0]) & (latent // (D_SAE // 2) == rank[1])
        pairs = Pairs(row[mine] - rows.start, latent[mine] - own.start, ROWS // 2, D_SAE // 2)
        with torch.no_grad():
            chosen = (pairs, value[mine], dead[own])
            return sae, backward._gradients(sae, x[rows], x_in[rows], ROWS, *chosen, VARIANCE, shared)

    with ThreadPoolExecutor(4) as pool:
        ranks = [(0, 0), (0, 1), (1, 0), (1, 1)]
        found = dict(zip(ranks, pool.map(device, ranks), strict=True))
    for field in ("total", "fvu", "aux"):
        for latents in (0, 1):
            total = getattr(found[0, latents][1], field) + getattr(found[1, latents][1], field)
            torch.testing.assert_close(total, getattr(expected, field), rtol=1e-12, atol=1e-12, msg=field)
    for parameter_name, parameter in whole.named_parameters():
        sums = [sum(found[r, c][0].get_parameter(parameter_name).grad for r in (0, 1)) for c in (0, 1)]
        gradient = sums[0] if parameter_name == "b_dec" else torch.cat(sums)
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-12, atol=1e-12, msg=parameter_name)


@torch.no_grad()
def _selected(sae: SAE, x_in: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    pre_acts = x_in @ sae.W_enc.T + sae.b_enc
    if isinstance(sae, BatchTopKSAE):
        value, row, latent = sae.select_batch(pre_acts)
        return row, latent, value
    value, latent = sae.select(pre_acts)
    return torch.arange(ROWS).repeat_interleave(value.shape[1]), latent.flatten(), value.flatten()
