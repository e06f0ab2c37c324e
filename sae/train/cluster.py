"""GPUs that train, and how long a step takes on them: by rates from data sheets, and what one GPU reached of them."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sae.config import FrozenConfig
from sae.train.config import MeshConfig, TrainConfig
from sae.train.step_costs import AXES, Axis, collectives, ranks_along, told_rows_bytes, work

DEFAULT_RATES = {"float32": 67e12, "bfloat16": 989e12, "memory": 3.35e12, "nvlink": 450e9, "nic": 50e9}
"""FLOP/s of dense products by dtype (float32 without TF32, as torch multiplies by default); bytes/s of a GPU's memory,
of NVLink and of a GPU's network card, in one direction. NVIDIA's data sheets of the H100 SXM and of the ConnectX-7."""
LATENCY_SECONDS = 20e-6
"""Of a collective, for every doubling of its ranks. An assumption."""
LAUNCH_SECONDS = 15e-6
"""Of a kernel: small steps take as long as their launches. As measured on one H100: docs/gpu.md."""
REACHED, REACHED_BY_NETWORKS = 0.62, 0.8
"""Of those rates: by a GPU, as measured on one H100 (docs/gpu.md); by NVLink and network cards, an assumption."""
USABLE = 0.9
"""Of a GPU's memory, for tensors; the rest is CUDA's, the libraries' and lost between tensors. An assumption."""


class Cluster(FrozenConfig):
    """GPUs, in nodes of equally many: a node's are joined by NVLink, and each has a network card of its own."""

    n_gpus: int
    gpus_per_node: int
    gpu_bytes: int

    @property
    def usable_bytes(self) -> int:
        """Of a GPU, for tensors."""
        return int(USABLE * self.gpu_bytes)


class Trained(NamedTuple):
    """An SAE to train."""

    name: str
    """Its place in the configuration, `saes.0`."""
    config: TrainConfig
    d_in: int


def cards(mesh: MeshConfig, axis: Axis, cluster: Cluster) -> int | None:
    """Network cards of a node that a collective along an axis goes through, in the group that has fewest.

    The members of a group that share a node use all their cards at once: a group of whole nodes has all of them, one
    with a single member in every node has one.

    Returns: None where every group lies inside a node.
    """
    world, per_node = range(mesh.world), cluster.gpus_per_node
    groups: Sequence[range] = [world]
    if axis == "latents":
        groups = [world[start : start + mesh.latents] for start in world[:: mesh.latents]]
    elif axis == "data":
        groups = [world[start :: mesh.latents] for start in range(mesh.latents)]
    fewest: int | None = None
    for group in groups:
        nodes = [rank // per_node for rank in group]
        if nodes[0] != nodes[-1]:
            here = min(nodes.count(node) for node in set(nodes))
            fewest = here if fewest is None else min(fewest, here)
    return fewest


def bandwidth(mesh: MeshConfig, axis: Axis, cluster: Cluster, rates: Mapping[str, float]) -> float:
    """Bytes per second that a rank receives in collectives along an axis, before REACHED_BY_NETWORKS."""
    n_cards = cards(mesh, axis, cluster)
    return rates["nvlink"] if n_cards is None else min(rates["nvlink"], n_cards * rates["nic"])


def told_seconds(sae: Trained, mesh: MeshConfig, cluster: Cluster, rates: Mapping[str, float]) -> float:
    """Of a step: what ranks tell each other."""
    speeds = {axis: REACHED_BY_NETWORKS * bandwidth(mesh, axis, cluster, rates) for axis in set(AXES.values())}
    waits = {axis: _latency(ranks_along(axis, mesh)) for axis in speeds}
    return sum(
        n_bytes / speeds[AXES[method]] + waits[AXES[method]]
        for method, n_bytes in collectives(sae.config, sae.d_in, mesh)
    )


def rows_seconds(sae: Trained, mesh: MeshConfig, cluster: Cluster, rates: Mapping[str, float]) -> float:
    """Of a batch: the latent ranks of a node are told its rows by the one of them that reads; SAEs side by side share
    them."""
    neighbours = min(mesh.latents, cluster.gpus_per_node)
    if neighbours == 1:
        return 0.0
    rows = told_rows_bytes(sae.config, sae.d_in, mesh)
    return rows / (REACHED_BY_NETWORKS * rates["nvlink"]) + 2 * _latency(neighbours)  # their number first


def _latency(n_ranks: int) -> float:
    return LATENCY_SECONDS * math.ceil(math.log2(n_ranks))


def compute_seconds(sae: Trained, mesh: MeshConfig, rates: Mapping[str, float]) -> float:
    """Of a step, without what is told: products, or what they read where that takes longer, then everything else; at
    least as long as its kernels take to launch."""
    done = work(sae.config, sae.d_in, mesh)
    product = max(done.flops / rates[done.dtype], done.product_bytes / rates["memory"])
    return max((product + done.moved_bytes / rates["memory"]) / REACHED, LAUNCH_SECONDS * done.n_kernels)
