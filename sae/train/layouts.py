"""Which mesh trains a set of SAEs soonest on given GPUs, by arithmetic: every layout, and the best that fits.

A layout divides the GPUs into equal runs that know nothing of each other, each with some of the SAEs and a mesh of its
own: one run is one mesh of all GPUs, as many runs as GPUs are an SAE (or several) for every GPU.

A step takes as long as its products, what it moves in the GPU's memory and what ranks tell each other, one after the
other. Left out: overlap, reading rows from the store, uneven shares of the pairs, AuxK.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from sae.config import FrozenConfig
from sae.errors import ConfigError
from sae.memory import readable
from sae.train.cluster import USABLE, Cluster, Trained, compute_seconds, rows_seconds, told_seconds
from sae.train.config import MeshConfig
from sae.train.step_costs import memory, received_bytes

MOST_GPUS = 1 << 16
"""Up to so many it is looked for how many would hold what does not fit."""


class Layout(FrozenConfig):
    """One way to use all GPUs, and what it takes."""

    mesh: MeshConfig
    """Of every run."""
    runs: tuple[tuple[int, ...], ...]
    """The SAEs of each, by number."""
    in_turn: bool
    """The SAEs of a run do not fit side by side: they are trained one after the other."""
    rank_bytes: int
    """Of tensors, on the rank that has most."""
    received: dict[str, int]
    """Bytes that a rank receives in a step of every SAE of the slowest run, by method of `Collectives`."""
    told_seconds: float
    """That these take, and the rows of the batches."""
    step_seconds: float
    """A step of every SAE of the slowest run."""
    rows_per_second: float
    """Rows that every SAE has seen when all are done, over the time until then."""
    efficiency: float
    """Of the GPUs, over one that had the memory for everything."""

    @property
    def name(self) -> str:
        """`2 x 32`, or `8 runs of 1 x 8`."""
        mesh = f"{self.mesh.data} x {self.mesh.latents}"
        return mesh if len(self.runs) == 1 else f"{len(self.runs)} runs of {mesh}"


def plan_layouts(saes: Sequence[Trained], cluster: Cluster, rates: Mapping[str, float]) -> list[Layout]:
    """Every layout of all GPUs, the soonest first.

    Args:
        rates: as `cluster.DEFAULT_RATES`.

    Raises: ConfigError when the GPUs make no whole nodes, or no mesh of them can share the SAEs.
    """
    if cluster.n_gpus > cluster.gpus_per_node and cluster.n_gpus % cluster.gpus_per_node:
        raise ConfigError(
            f"{cluster.n_gpus} GPUs are no whole nodes of {cluster.gpus_per_node}. A run has equally many ranks on "
            f"every node."
        )
    layouts = [
        _layout(saes, n_runs, mesh, cluster, rates)
        for n_runs in _divisors(cluster.n_gpus)
        for mesh in _meshes(saes, n_runs, cluster)
    ]
    if not layouts:
        whole = MeshConfig(data=1, latents=cluster.n_gpus)
        reason = next(filter(None, (whole.misfit(sae.config, sae.name) for sae in saes)))
        raise ConfigError(f"no mesh of {cluster.n_gpus} GPUs can train these SAEs: {reason}")
    # Where two take as long, fewer data ranks: what they tell each other grows with d_sae.
    return sorted(layouts, key=lambda each: (-float(f"{each.rows_per_second:.3g}"), each.mesh.data, -len(each.runs)))


def choose(layouts: Sequence[Layout], saes: Sequence[Trained], cluster: Cluster) -> Layout:
    """The soonest that fits. layouts: of `plan_layouts`.

    Raises: ConfigError when none does, with how many GPUs would hold the SAEs.
    """
    fitting = next((each for each in layouts if each.rank_bytes <= cluster.usable_bytes), None)
    if fitting is not None:
        return fitting
    smallest = min(layouts, key=lambda each: each.rank_bytes)
    largest = max(saes, key=lambda sae: rank_bytes([sae], smallest.mesh))
    least = least_shares(largest, cluster)
    more = f"{least} GPUs would hold it (1 x {least}). Use more, or lower" if least else "Lower"
    raise ConfigError(
        f"{largest.name} (d_sae = {largest.config.sae.d_sae}, d_in = {largest.d_in}) takes at least "
        f"{readable(smallest.rank_bytes)} on each of {cluster.n_gpus} GPUs ({smallest.name}), and {USABLE:.0%} of "
        f"{readable(cluster.gpu_bytes)} is {readable(cluster.usable_bytes)}. {more} d_sae or batch_rows."
    )


def rank_bytes(saes: Sequence[Trained], mesh: MeshConfig) -> int:
    """Bytes on a rank while these are trained: those of one hook point and batch size side by side."""
    found = 0
    for each in _side_by_side(saes):
        needs = [memory(sae.config, sae.d_in, mesh) for sae in each]
        found = max(found, sum(need.kept for need in needs) + max(need.step for need in needs) + needs[0].batches)
    return found


def _side_by_side(saes: Sequence[Trained]) -> list[list[Trained]]:
    """Those that see the same batches."""
    together: dict[tuple[str | None, int], list[Trained]] = {}
    for sae in saes:
        together.setdefault((sae.config.hook_point, sae.config.batch_rows), []).append(sae)
    return list(together.values())


def least_shares(sae: Trained, cluster: Cluster) -> int | None:
    """Among how many ranks its latents must be shared to fit; None: no number is enough."""
    for n_latent in _divisors(sae.config.sae.d_sae):
        mesh = MeshConfig(data=1, latents=n_latent)
        if n_latent > MOST_GPUS or mesh.misfit(sae.config, sae.name):
            continue
        if rank_bytes([sae], mesh) <= cluster.usable_bytes:
            return n_latent
    return None


def _meshes(saes: Sequence[Trained], n_runs: int, cluster: Cluster) -> Iterator[MeshConfig]:
    """Those of one run of so many. Several runs have whole nodes each, or equal parts of a node."""
    world, per_node = cluster.n_gpus // n_runs, min(cluster.gpus_per_node, cluster.n_gpus)
    if n_runs > len(saes) or (world % per_node and per_node % world):
        return
    for n_data in _divisors(world):
        mesh = MeshConfig(data=n_data, latents=world // n_data)
        if all(mesh.misfit(sae.config, sae.name) is None for sae in saes):
            yield mesh


def _layout(
    saes: Sequence[Trained], n_runs: int, mesh: MeshConfig, cluster: Cluster, rates: Mapping[str, float]
) -> Layout:
    told = [told_seconds(sae, mesh, cluster, rates) for sae in saes]
    steps = [compute_seconds(sae, mesh, rates) + seconds for sae, seconds in zip(saes, told, strict=True)]
    per_row = [seconds / sae.config.batch_rows for sae, seconds in zip(saes, steps, strict=True)]
    runs: list[list[int]] = [[] for _ in range(n_runs)]
    for number in sorted(range(len(saes)), key=lambda i: -per_row[i]):  # the longest first, to who has least to do
        min(runs, key=lambda run: sum(per_row[i] for i in run)).append(number)

    def rows_of(run: Sequence[int]) -> list[tuple[float, int]]:
        firsts = [each[0] for each in _side_by_side([saes[i] for i in run])]
        return [(rows_seconds(sae, mesh, cluster, rates), sae.config.batch_rows) for sae in firsts]

    def run_seconds_per_row(run: Sequence[int]) -> float:
        return sum(per_row[i] for i in run) + sum(seconds / n_rows for seconds, n_rows in rows_of(run))

    slowest = max(runs, key=run_seconds_per_row)
    seconds_per_row = run_seconds_per_row(slowest)
    told_of_all = sum(told[i] for i in slowest) + sum(seconds for seconds, _ in rows_of(slowest))
    together = max(rank_bytes([saes[i] for i in run], mesh) for run in runs)
    in_turn = together > cluster.usable_bytes and len(saes) > n_runs
    received: Counter[str] = Counter()
    for i in slowest:
        received.update(received_bytes(saes[i].config, saes[i].d_in, mesh))
    alone = sum(compute_seconds(sae, MeshConfig(), rates) / sae.config.batch_rows for sae in saes)
    return Layout(
        mesh=mesh,
        runs=tuple(tuple(sorted(run)) for run in runs),
        in_turn=in_turn,
        rank_bytes=max(rank_bytes([sae], mesh) for sae in saes) if in_turn else together,
        received=dict(received),
        told_seconds=told_of_all,
        step_seconds=sum(steps[i] - told[i] for i in slowest) + told_of_all,
        rows_per_second=1 / seconds_per_row,
        efficiency=alone / (cluster.n_gpus * seconds_per_row),
    )


def _divisors(n: int) -> list[int]:
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})
