"""Which mesh is chosen: by hand, at the size where the choice turns, and what refuses."""

import pytest

from sae.architectures.config import StandardConfig, TopKConfig
from sae.errors import ConfigError
from sae.train.cluster import (
    DEFAULT_RATES,
    REACHED,
    REACHED_BY_NETWORKS,
    Cluster,
    Trained,
    bandwidth,
    cards,
    compute_seconds,
    told_seconds,
)
from sae.train.config import MeshConfig, TrainConfig
from sae.train.layout_reasons import reasons
from sae.train.layouts import Layout, choose, plan_layouts, rank_bytes
from sae.train.step_costs import Axis, received_bytes

SMALL, LARGE, HUGE = 1 << 17, 1 << 20, 1 << 24


def saes(d_sae: int, n: int = 1, *, batch_rows: int = 1 << 15, d_in: int = 4096) -> list[Trained]:
    return [
        Trained(
            f"saes.{seed}",
            TrainConfig(sae=TopKConfig(d_sae=d_sae, k=64), batch_rows=batch_rows, selection="bfloat16", seed=seed),
            d_in,
        )
        for seed in range(n)
    ]


def gpus(n: int, gib: float = 80, per_node: int = 8) -> Cluster:
    return Cluster(n_gpus=n, gpus_per_node=per_node, gpu_bytes=int(gib * 2**30))


def planned(trained: list[Trained], cluster: Cluster) -> tuple[Layout, str]:
    layouts = plan_layouts(trained, cluster, DEFAULT_RATES)
    chosen = choose(layouts, trained, cluster)
    return chosen, " ".join(reasons(layouts, chosen, trained, cluster, DEFAULT_RATES))


@pytest.mark.parametrize(
    ("mesh", "axis", "per_node", "expected"),
    [
        ((1, 8), "latents", 8, None),  # inside a node
        ((2, 8), "latents", 8, None),
        ((2, 8), "data", 8, 1),  # one rank of each node
        ((4, 4), "data", 8, 2),  # ranks 0 4 | 8 12: two of each node
        ((1, 16), "latents", 8, 8),  # whole nodes
        ((2, 32), "data", 8, 1),
        ((2, 32), "all", 8, 8),
        ((4, 6), "latents", 8, 2),  # ranks 6 7 | 8 9 10 11
        ((16, 1), "data", 4, 4),
    ],
)
def test_cards_that_a_collective_goes_through(
    mesh: tuple[int, int], axis: Axis, per_node: int, expected: int | None
) -> None:
    shape, cluster = MeshConfig(data=mesh[0], latents=mesh[1]), gpus(mesh[0] * mesh[1], per_node=per_node)
    assert cards(shape, axis, cluster) == expected
    rates = DEFAULT_RATES | {"nvlink": 300, "nic": 50}
    assert bandwidth(shape, axis, cluster, rates) == min(300, 50 * (expected or 6))


def test_a_step_worked_by_hand() -> None:
    # One row of 2 numbers a tile and rank; 1 FLOP/s, so that all else counts for nothing beside the products.
    sae = Trained("saes.0", TrainConfig(sae=StandardConfig(d_sae=8, l1_coefficient=1), batch_rows=2), 2)
    rates = dict.fromkeys(DEFAULT_RATES, 1e30) | {"float32": 1.0}
    assert compute_seconds(sae, MeshConfig(data=2, latents=1), rates) == pytest.approx(10 * 1 * 8 * 2 / REACHED)
    # Two ranks on two nodes, and every byte a second: all that is received, and one latency for each collective.
    mesh = MeshConfig(data=2)
    told = told_seconds(sae, mesh, gpus(2, per_node=1), rates | {"nic": 1.0})
    assert told == pytest.approx(sum(received_bytes(sae.config, 2, mesh).values()) / REACHED_BY_NETWORKS, rel=1e-4)


def test_rows_are_told_once_to_saes_that_share_them() -> None:
    rates, mesh = dict.fromkeys(DEFAULT_RATES, 1e30) | {"nvlink": 1.0}, MeshConfig(data=1, latents=2)
    one, two = (plan_layouts(saes(SMALL, n), gpus(2), rates) for n in (1, 2))
    (of_one,), (of_two,) = ([each for each in some if each.mesh == mesh] for some in (one, two))
    rows = (1 << 15) * 4096 * 4 / REACHED_BY_NETWORKS  # a byte a second
    in_a_step = sum(of_one.received.values()) / REACHED_BY_NETWORKS
    assert of_one.told_seconds == pytest.approx(in_a_step + rows)
    assert of_two.told_seconds == pytest.approx(2 * in_a_step + rows)


def test_latents_first_over_whole_nodes() -> None:
    chosen, why = planned(saes(LARGE), gpus(64))
    assert chosen.mesh == MeshConfig(data=1, latents=64)
    assert "must be shared by 4 ranks at least" in why
    assert "through 8 network cards of every node (400 GB/s)" in why
    assert "2 x 32 would take 2." in why
    assert "gradients a step would go through 1 network card of every node (50 GB/s)" in why
    assert planned(saes(LARGE), gpus(8))[0].efficiency > 0.9 > 0.7 > chosen.efficiency


def test_data_ranks_for_really_large_batches() -> None:
    small, _ = planned(saes(SMALL), gpus(8))
    large, why = planned(saes(SMALL, batch_rows=1 << 18), gpus(64))
    assert small.mesh.data == 1
    assert large.mesh == MeshConfig(data=4, latents=16)
    assert "Batches are large enough for 4 data ranks" in why


def test_an_sae_for_every_gpu_where_it_fits_and_there_are_enough() -> None:
    chosen, why = planned(saes(SMALL, 8), gpus(8))
    assert (len(chosen.runs), chosen.mesh) == (8, MeshConfig())
    assert sorted(chosen.runs) == [(i,) for i in range(8)]
    assert chosen.efficiency == pytest.approx(1)
    assert "8 SAEs in 8 runs of a GPU each" in why
    assert "one run of 1 x 8 would take 1." in why


def test_a_node_for_every_sae_where_there_are_fewer_than_gpus() -> None:
    chosen, _ = planned(saes(SMALL, 8), gpus(64))
    assert (len(chosen.runs), chosen.mesh) == (8, MeshConfig(data=1, latents=8))


def test_what_fits_no_gpu_is_shared_also_in_a_sweep() -> None:
    chosen, _ = planned(saes(LARGE, 8), gpus(8))
    assert chosen.mesh.latents >= 4
    assert rank_bytes(saes(LARGE), chosen.mesh) <= gpus(8).usable_bytes


def test_saes_that_do_not_fit_side_by_side_take_turns() -> None:
    trained = saes(SMALL, 16)
    alone, both = (rank_bytes(trained[:n], MeshConfig()) for n in (1, 2))
    gib = (alone + both) / 2 / 0.9 / 2**30
    chosen, why = planned(trained, gpus(8, gib))
    assert (len(chosen.runs), chosen.in_turn, chosen.rank_bytes) == (8, True, alone)
    assert "one after the other" in why
    assert not planned(trained, gpus(8))[0].in_turn


def test_saes_of_other_hook_points_are_trained_at_other_times() -> None:
    one, other = saes(SMALL, 2)
    elsewhere = other._replace(config=TrainConfig.model_validate(other.config.model_dump() | {"hook_point": "b"}))
    assert rank_bytes([one, elsewhere], MeshConfig()) == rank_bytes([one], MeshConfig())
    assert rank_bytes([one, other], MeshConfig()) > 1.5 * rank_bytes([one], MeshConfig())


def test_runs_have_about_as_much_to_do() -> None:
    trained = saes(SMALL, 3) + [each._replace(name=f"saes.{i + 3}") for i, each in enumerate(saes(8 * SMALL))]
    (of_two,) = [each for each in plan_layouts(trained, gpus(2), DEFAULT_RATES) if len(each.runs) == 2]
    assert sorted(of_two.runs) == [(0, 1, 2), (3,)]


def test_short_steps_are_faster_on_one_gpu() -> None:
    _, why = planned(saes(2048, batch_rows=2048, d_in=512), gpus(8))
    assert "One GPU with room for it would be" in why


def test_what_does_not_fit_says_how_many_gpus_would_do() -> None:
    trained, cluster = saes(HUGE), gpus(8)
    with pytest.raises(ConfigError, match=r"saes\.0 \(d_sae = 16777216.* 64 GPUs would hold it \(1 x 64\)"):
        choose(plan_layouts(trained, cluster, DEFAULT_RATES), trained, cluster)
    assert planned(trained, gpus(64))[0].mesh.latents == 64


def test_gpus_that_cannot_share_are_refused() -> None:
    with pytest.raises(ConfigError, match="12 GPUs are no whole nodes of 8"):
        plan_layouts(saes(SMALL), gpus(12), DEFAULT_RATES)
    with pytest.raises(ConfigError, match=r"no mesh of 24 GPUs.*saes\.0\.sae\.d_sae: 131072 is no multiple"):
        plan_layouts(saes(SMALL), gpus(24), DEFAULT_RATES)
