"""Sixty steps of every architecture, on one device and on meshes, with mistakes to plant. Called in every rank."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sae.architectures import SAE, BatchTopKConfig, SAEConfig, StandardConfig, TopKConfig, build_sae
from sae.train import selection
from sae.train.backward import _add_auxk, batch_topk_gradients, topk_gradients
from sae.train.backward_standard import standard_gradients
from sae.train.collectives import ALONE, Collectives
from sae.train.config import MeshConfig, TrainConfig
from sae.train.dead_latents import DeadLatentClock
from sae.train.init import initialise
from sae.train.largest import DIGIT_BITS
from sae.train.mesh import Mesh
from sae.train.pairs import encoder_gradients
from sae.train.shares import LATENT_PARAMETERS, build_share
from sae.train.step import (
    TrainState,
    clip_gradient,
    fast_gradients,
    fast_gradients_selecting_in_bfloat16,
    make_optimizer,
    sum_over_rows,
    train_step,
)
from tests.sae.conformance.planted import Mutation, planted

D_IN, D_SAE, ROWS, N_STEPS, LR, DEAD_AFTER, VARIANCE = 8, 64, 40, 60, 3e-3, 200, 1.3
CONFIGS: dict[str, SAEConfig] = {
    "topk": TopKConfig(d_sae=D_SAE, k=3, k_aux=5),
    "topk, few of many dead, clipped": TopKConfig(d_sae=D_SAE, k=3, k_aux=2),
    "topk, all dead take part": TopKConfig(d_sae=D_SAE, k=3, k_aux=D_SAE),
    "topk, more than a share has": TopKConfig(d_sae=D_SAE, k=D_SAE // 2 + 1, k_aux=0),
    "batch_topk": BatchTopKConfig(d_sae=D_SAE, k=3, k_aux=5),
    "batch_topk, few of many dead": BatchTopKConfig(d_sae=D_SAE, k=3, k_aux=2),
    "batch_topk, more than are positive": BatchTopKConfig(d_sae=D_SAE, k=D_SAE, k_aux=0),
    "standard": StandardConfig(d_sae=D_SAE, l1_coefficient=0.3),
    "standard, free": StandardConfig(d_sae=D_SAE, l1_coefficient=0.3, decoder="free"),
    "standard, mean": StandardConfig(d_sae=D_SAE, l1_coefficient=0.3, reduction="mean"),
}
MAX_GRAD_NORM = {"topk, few of many dead, clipped": 0.05}
IN_SHORT = ("topk", "topk, few of many dead, clipped", "batch_topk", "standard", "standard, free")
"""What two ranks go through; four go through all."""
SINGLE = ("topk", "batch_topk")
"""Of these one step that selects in bfloat16 is compared, where many values tie."""
TOLD: dict[str, tuple[TrainConfig, bool]] = {
    name: (TrainConfig.model_validate({"sae": CONFIGS[case], "batch_rows": ROWS} | changes), dead)
    for name, case, changes, dead in (
        ("topk", "topk", {}, False),
        ("topk, all dead, clipped", "topk", {"max_grad_norm": 1.0}, True),
        ("topk in bfloat16", "topk", {"selection": "bfloat16"}, False),
        ("batch_topk", "batch_topk", {}, False),
        ("batch_topk in bfloat16, all dead", "batch_topk", {"selection": "bfloat16"}, True),
        ("standard", "standard", {}, False),
    )
}
"""Steps of which the bytes are counted, and whether all latents are dead before them."""
N_WITH_A_MISTAKE = 20
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
K_OF_TIED, N_OF_TIED = 5, (1, 100, 700, 5000)
MESHES = {2: [(1, 2), (2, 1)], 4: [(2, 2), (1, 4), (4, 1)]}


def _no_check() -> None:
    """The comparison is made by the test, over all ranks."""


ALL_ROWS, HALF_OF_THEM = "None else n_rows", "None else -(-n_rows // 2)"
TOPK_OF_ALL = """select_topk(x_in, sae.W_enc, sae.b_enc, min(k, sae.d_sae), selection)
    pairs, values = Pairs.of_rows(values, latents, shared.among_largest_of_row(values, k), sae.d_sae)"""
TOPK_OF_EACH = """select_topk(x_in, sae.W_enc, sae.b_enc, (k + shared.latent_rank) // 2, selection)
    pairs, values = Pairs.of_rows(values, latents, None, sae.d_sae)"""
MISTAKES: dict[str, tuple[str, tuple[int, int], Mutation]] = {
    name: (case, mesh, Mutation(function, old, new, _no_check))
    for name, case, mesh, function, old, new in (
        ("b_dec through own latents", "topk", (1, 2), encoder_gradients, "shared.sum_latents", ""),
        ("b_dec through own latents, standard", "standard", (1, 2), encoder_gradients, "shared.sum_latents", ""),
        ("k / L of each share", "topk", (1, 2), topk_gradients, TOPK_OF_ALL, TOPK_OF_EACH),
        ("n / L of all", "batch_topk", (1, 2), batch_topk_gradients, "* sae.config.k", "* sae.config.k // 2"),
        (
            "n of one share of rows",
            "batch_topk",
            (2, 1),
            batch_topk_gradients,
            "n = n_rows *",
            "n = -(-n_rows // 2) *",
        ),
        ("gradients not summed", "topk", (2, 1), sum_over_rows, "shared.sum_rows(parameter.grad)", "parameter.grad"),
        ("fired not summed", "topk", (2, 1), sum_over_rows, "shared.any_rows(losses.fired)", "losses.fired"),
        ("AuxK of own latents", "topk", (1, 2), _add_auxk, "shared.sum_latents(predicted)", "predicted"),
        (
            "AuxK: mean of own rows",
            "batch_topk",
            (2, 1),
            _add_auxk,
            "shared.sum_rows(residual.sum(dim=0)).div_(n_rows)",
            "residual.mean(dim=0)",
        ),
        (
            "AuxK: strongest of each share",
            "topk, few of many dead, clipped",
            (1, 2),
            _add_auxk,
            "kept = shared.among_largest_of_row(values, k_aux)",
            "kept = None; shared.among_largest_of_row(values, k_aux)",
        ),
        ("norm of own latents", "topk, few of many dead, clipped", (1, 2), clip_gradient, "shared.norm_latents", ""),
        ("means over half of the rows", "standard, free", (2, 1), standard_gradients, ALL_ROWS, HALF_OF_THEM),
        (
            "clock of half of the rows",
            "batch_topk",
            (2, 1),
            train_step,
            "update(losses.fired, n_rows)",
            "update(losses.fired, n_rows // 2)",
        ),
    )
}


def whole_sae(config: SAEConfig) -> SAE:
    """Half of its latents, more in the first half, are soon dead: their encoder rows are small, but not negative, or
    AuxK would have no gradient behind a ReLU."""
    sae = build_sae(config, D_IN)
    initialise(sae, "tied", 0, torch.zeros(D_IN))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1, generator=generator)
        for weak in (slice(0, 24), slice(40, 48)):
            sae.W_enc[weak] *= 0.02
            sae.b_enc[weak].abs_().mul_(0.1)
        sae.b_dec.normal_(std=0.1, generator=generator)
    return sae.double()


def batches(n_steps: int = N_STEPS) -> Iterator[Tensor]:
    """Now and then a short one, as at the end of an epoch: of an odd number of rows, or of one."""
    generator = torch.Generator().manual_seed(8)
    for step in range(n_steps):
        n_rows = {6: 37, 20: 1, 41: 3}.get(step % 42, ROWS)
        yield torch.randn(n_rows, D_IN, generator=generator).double()


def share_of(config: SAEConfig, shared: Collectives) -> SAE:
    share, own = build_share(config, D_IN, shared).double(), shared.latents(D_SAE)
    with torch.no_grad():
        for name, parameter in whole_sae(config).named_parameters():
            share.get_parameter(name).copy_(parameter[own] if name in LATENT_PARAMETERS else parameter)
    return share


def trained(case: str, shared: Collectives = ALONE, n_steps: int = N_STEPS) -> dict[str, Tensor]:
    """Weights, moments and clock after so many steps; the losses of each; how many latents were dead before it."""
    share = share_of(CONFIGS[case], shared)
    clock = DeadLatentClock(share.d_sae, DEAD_AFTER)
    state = TrainState(share, make_optimizer(share, (0.9, 0.99)), clock)
    losses, l0, n_dead = [], [], []
    with mock.patch.object(selection, "TILE_ROWS", 32):  # two tiles of unequal size
        for x in batches(n_steps):
            n_dead.append(shared.sum_latents(clock.dead.sum()))
            own = x[shared.data_rank :: shared.n_data]
            step = train_step(state, own, LR, VARIANCE, fast_gradients, MAX_GRAD_NORM.get(case), shared, len(x))
            losses.append(torch.stack([step.total, step.fvu, step.aux]))
            l0.append(step.l0)
    found = {name: parameter.detach() for name, parameter in share.named_parameters()}
    for name, parameter in share.named_parameters():
        found |= {
            f"{moment} of {name}": state.optimizer.state[parameter][moment] for moment in ("exp_avg", "exp_avg_sq")
        }
    return found | {
        "clock": clock.tokens_since_fired,
        "losses": torch.stack(losses),
        "l0": torch.stack(l0),
        "n_dead": torch.stack(n_dead),
    }


def one_step_in_bfloat16(case: str, shared: Collectives = ALONE) -> dict[str, Tensor]:
    """Loss of a batch, and how many latents are selected."""
    share, x = share_of(CONFIGS[case], shared), torch.cat(list(batches()))[: 25 * ROWS]
    own = x[shared.data_rank :: shared.n_data]
    losses = fast_gradients_selecting_in_bfloat16(share, own, None, VARIANCE, shared, len(x))
    losses = sum_over_rows(share, losses, shared)
    return {"l0": losses.l0, "loss": losses.total}


def all_cases(folder: Path) -> dict[str, Tensor]:
    """On every mesh of the world: all cases, and on those of two ranks all mistakes."""
    found = largest_with_ties()
    wrong_shapes_are_not_lost_ranks()
    cases = list(CONFIGS)
    if dist.get_world_size() == 2:
        cases = list(IN_SHORT)
        found |= bytes_and_shapes()
    for shape in MESHES[dist.get_world_size()]:
        mesh = Mesh(MeshConfig(data=shape[0], latents=shape[1]), timedelta(seconds=60))
        for case in cases:
            found |= {f"{shape} {case}: {name}": tensor for name, tensor in trained(case, mesh).items()}
        for case in SINGLE:
            found |= {f"{shape} {case} in bfloat16: {n}": t for n, t in one_step_in_bfloat16(case, mesh).items()}
        for name, (case, of_shape, mutation) in MISTAKES.items():
            if of_shape == shape:
                with planted(mutation):
                    found |= {f"{name}: {n}": tensor for n, tensor in trained(case, mesh, N_WITH_A_MISTAKE).items()}
    return found


def bytes_and_shapes() -> dict[str, Tensor]:
    """What a rank of 1 x 2 and one of 2 x 1 receive in a step of every `TOLD`, and of what shapes."""
    found = {}
    for shape in MESHES[2]:
        for name, (config, dead) in TOLD.items():
            mesh = _Watched(MeshConfig(data=shape[0], latents=shape[1]), timedelta(seconds=60))
            share = share_of(config.sae, mesh).float()
            state = TrainState(share, make_optimizer(share, (0.9, 0.99)), DeadLatentClock(share.d_sae, DEAD_AFTER))
            state.clock.tokens_since_fired.fill_(DEAD_AFTER if dead else 0)
            x = next(batches()).float()
            own = x[mesh.data_rank :: mesh.n_data]
            gradients = fast_gradients_selecting_in_bfloat16 if config.selection == "bfloat16" else fast_gradients
            train_step(state, own, LR, VARIANCE, gradients, config.max_grad_norm, mesh, len(x))
            found |= {f"{shape} told in {name}: {method}": torch.tensor(n) for method, n in mesh.received.items()}
            found[f"{shape} told in {name}: widest of a row"] = torch.tensor(max(mesh.widths))
    return found


def wrong_shapes_are_not_lost_ranks() -> None:
    """A mistake of ours is not worth a retry."""
    world = dist.get_world_size()
    mesh = Mesh(MeshConfig(latents=world), timedelta(seconds=60))
    with pytest.raises(RuntimeError, match="Split sizes"):
        mesh._exchange("too many rows", torch.zeros(1), [2] * world, [2] * world)


class _Watched(Mesh):
    """Notes how wide what it tells of each row of the batch is: of tensors with a row for each of them."""

    def __init__(self, config: MeshConfig, timeout: timedelta) -> None:
        super().__init__(config, timeout)
        self.widths = [0]

    def _reduce(self, method: str, tensor: Tensor, *rest: Any) -> Tensor:
        if tensor.ndim == 2 and method != "sum_rows":
            self.widths.append(tensor.shape[1])
        assert tensor.numel() <= max(ROWS * D_IN, D_SAE * D_IN if self.n_latent == 1 else 0, 1 << DIGIT_BITS), method
        return super()._reduce(method, tensor, *rest)

    def _exchange(self, method: str, rows: Tensor, *rest: Any) -> Tensor:
        self.widths.append(rows.shape[1])
        return super()._exchange(method, rows, *rest)


def largest_with_ties() -> dict[str, Tensor]:
    """What each rank keeps of rows and batches of small whole numbers, of which many tie; one device may hold all."""
    found = {}
    for shape in MESHES[dist.get_world_size()]:
        mesh = Mesh(MeshConfig(data=shape[0], latents=shape[1]), timedelta(seconds=60))
        for dtype in DTYPES:
            values = tied_values(dtype)[mesh.data_rank :: mesh.n_data, mesh.latents(D_SAE)]
            candidates = values.topk(K_OF_TIED).values
            kept = mesh.among_largest_of_row(candidates, K_OF_TIED)
            found[f"{shape} {dtype} of rows"] = candidates if kept is None else candidates.where(kept, -torch.inf)
            positive = values[values > 0]
            for n in N_OF_TIED:
                kept = mesh.among_largest_of_batch(positive, n)
                found[f"{shape} {dtype} {n} of batch"] = positive if kept is None else positive[kept]
    return found


def tied_values(dtype: torch.dtype) -> Tensor:
    """[37, D_SAE]: whole numbers; the first latents hold all of the largest of row 0, the last all of row 1."""
    values = torch.randint(-4, 5, (37, D_SAE), generator=torch.Generator().manual_seed(1)).to(dtype)
    values[0, : D_SAE // 4] = values[1, -D_SAE // 4 :] = 9
    return values
