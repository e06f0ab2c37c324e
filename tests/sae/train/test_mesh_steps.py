"""Processes that share an SAE end with the weights of one, and mistakes that the comparison finds."""

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from sae.train.config import MeshConfig
from sae.train.shares import LATENT_PARAMETERS
from sae.train.step_costs import received_bytes
from tests.sae.train import mesh_steps
from tests.sae.train.mesh_steps import (
    CONFIGS,
    D_IN,
    D_SAE,
    DTYPES,
    IN_SHORT,
    K_OF_TIED,
    MESHES,
    MISTAKES,
    N_OF_TIED,
    N_STEPS,
    N_WITH_A_MISTAKE,
    SINGLE,
    TOLD,
    tied_values,
)
from tests.sae.train.ranks import run_ranks

Found = list[dict[str, Tensor]]
"""By rank."""


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run_ranks(2, mesh_steps.all_cases, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run_ranks(4, mesh_steps.all_cases, tmp_path_factory.mktemp("four"))


@lru_cache
def _alone(case: str, n_steps: int = N_STEPS) -> dict[str, Tensor]:
    return mesh_steps.trained(case, n_steps=n_steps)


def _assert_equal(found: Found, title: str, shape: tuple[int, int], expected: dict[str, Tensor]) -> None:
    """Every rank has what one device has of its latents; ranks with the same latents have the same bits."""
    n_own = D_SAE // shape[1]
    for rank, of_rank in enumerate(found):
        first = rank % shape[1]
        own = slice(first * n_own, (first + 1) * n_own)
        for name, tensor in expected.items():
            by_latent = name.split(" of ")[-1] in LATENT_PARAMETERS or name == "clock"
            mine = of_rank[f"{title}: {name}"]
            tolerance = 1e-6 if name == "l0" else 1e-12  # l0 is a float32
            expected_of_rank = tensor[own] if by_latent else tensor
            torch.testing.assert_close(mine, expected_of_rank, rtol=tolerance, atol=tolerance, msg=name)
            assert torch.equal(mine, found[first if by_latent else 0][f"{title}: {name}"]), f"replicas of {name}"


@pytest.mark.parametrize("case", IN_SHORT)
@pytest.mark.parametrize("shape", MESHES[2], ids="{0[0]} x {0[1]}".format)
def test_two_ranks_end_with_the_weights_of_one(case: str, shape: tuple[int, int], of_two: Found) -> None:
    _assert_equal(of_two, f"{shape} {case}", shape, _alone(case))


@pytest.mark.slow
@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("shape", MESHES[4], ids="{0[0]} x {0[1]}".format)
def test_four_ranks_end_with_the_weights_of_one(case: str, shape: tuple[int, int], of_four: Found) -> None:
    _assert_equal(of_four, f"{shape} {case}", shape, _alone(case))


@pytest.mark.parametrize("case", [case for case in CONFIGS if "topk" in case and CONFIGS[case].k_aux])
def test_the_cases_have_dead_latents_that_learn(case: str) -> None:
    alone = _alone(case)
    acts = alone["losses"][:, 2] > 0
    assert int(acts.sum()) > N_STEPS / 2
    if CONFIGS[case].k_aux < D_SAE // 2:
        assert int((alone["n_dead"] > CONFIGS[case].k_aux).sum()) > N_STEPS / 2


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen_in_the_weights(mistake: str, of_two: Found) -> None:
    case, shape, _ = MISTAKES[mistake]
    expected = _alone(case, N_WITH_A_MISTAKE)
    with pytest.raises(AssertionError):
        _assert_equal(of_two, mistake, shape, expected)


@pytest.mark.parametrize("case", SINGLE)
@pytest.mark.parametrize("shape", MESHES[2], ids="{0[0]} x {0[1]}".format)
def test_as_many_are_selected_in_bfloat16_where_many_tie(case: str, shape: tuple[int, int], of_two: Found) -> None:
    alone = mesh_steps.one_step_in_bfloat16(case)
    for of_rank in of_two:
        torch.testing.assert_close(of_rank[f"{shape} {case} in bfloat16: l0"], alone["l0"])
        # Which of those that tie is not the same: near the cut the loss hardly knows.
        torch.testing.assert_close(of_rank[f"{shape} {case} in bfloat16: loss"], alone["loss"], rtol=0.01, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MESHES[2], ids="{0[0]} x {0[1]}".format)
def test_the_largest_are_found_exactly_where_many_tie(
    shape: tuple[int, int], dtype: torch.dtype, of_two: Found
) -> None:
    values = tied_values(dtype)
    for data_rank in range(shape[0]):
        of_row = [of_two[data_rank * shape[1] + r][f"{shape} {dtype} of rows"] for r in range(shape[1])]
        kept = torch.cat(of_row, dim=1).sort(descending=True).values
        assert torch.equal(kept[:, :K_OF_TIED], values[data_rank :: shape[0]].topk(K_OF_TIED).values)
        assert bool((kept[:, K_OF_TIED:] == -torch.inf).all())
    for n in N_OF_TIED:
        of_batch = torch.cat([of_rank[f"{shape} {dtype} {n} of batch"] for of_rank in of_two])
        expected = values[values > 0].sort(descending=True).values[:n]
        assert torch.equal(of_batch.sort(descending=True).values, expected)


@pytest.mark.parametrize("step", TOLD)
@pytest.mark.parametrize("shape", MESHES[2], ids="{0[0]} x {0[1]}".format)
def test_the_bytes_of_a_step_are_those_of_the_formula(shape: tuple[int, int], step: str, of_two: Found) -> None:
    config, dead = TOLD[step]
    expected = received_bytes(config, D_IN, MeshConfig(data=shape[0], latents=shape[1]), dead=dead)
    told = f"{shape} told in {step}: "
    for of_rank in of_two:
        found = {name.removeprefix(told): int(n) for name, n in of_rank.items() if name.startswith(told)}
        # What is told of each row is as wide as the input, a row's candidates, a threshold with its ties: no wider.
        assert found.pop("widest of a row") <= max(D_IN, config.sae.k_aux if dead else 0, 8)
        assert found == expected
