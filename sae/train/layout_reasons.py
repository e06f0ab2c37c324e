"""Why a layout was chosen, in sentences: what memory asks for, and what the others would cost."""

from collections.abc import Iterator, Mapping, Sequence

from sae.memory import readable
from sae.train.cluster import Cluster, Trained, bandwidth, cards
from sae.train.config import MeshConfig
from sae.train.layouts import Layout, least_shares, rank_bytes
from sae.train.step_costs import Axis

MUCH_TOLD = 1 / 3
"""Of a step: from here on it is said that fewer GPUs would be used better."""


def reasons(
    layouts: Sequence[Layout], chosen: Layout, saes: Sequence[Trained], cluster: Cluster, rates: Mapping[str, float]
) -> list[str]:
    """layouts: all, the soonest first."""
    fitting = [each for each in layouts if each.rank_bytes <= cluster.usable_bytes]
    found = [_about_memory(saes, cluster), *_about_runs(fitting, chosen, saes)]
    if chosen.mesh.world > 1:
        found += _about_axes(fitting, chosen, cluster, rates)
    if chosen.in_turn:
        found.append("The SAEs of a run do not fit side by side: train them one after the other.")
    if (speedup := chosen.efficiency * cluster.n_gpus) < 1:
        found.append(f"One GPU with room for it would be {1 / speedup:.1f} times as fast as all: steps are short.")
    elif chosen.told_seconds > MUCH_TOLD * chosen.step_seconds:
        share = chosen.told_seconds / chosen.step_seconds
        found.append(f"What ranks tell each other is {share:.0%} of a step: fewer GPUs would be used better.")
    return found


def _about_memory(saes: Sequence[Trained], cluster: Cluster) -> str:
    largest = max(saes, key=lambda sae: rank_bytes([sae], MeshConfig()))
    needed, usable = rank_bytes([largest], MeshConfig()), readable(cluster.usable_bytes)
    if needed <= cluster.usable_bytes:
        return f"{largest.name} takes {readable(needed)} and fits a GPU, which has {usable} for it."
    return (
        f"{largest.name} takes {readable(needed)}, a GPU has {usable} for it: its latents must be shared by "
        f"{least_shares(largest, cluster)} ranks at least."
    )


def _about_runs(fitting: Sequence[Layout], chosen: Layout, saes: Sequence[Trained]) -> Iterator[str]:
    n_runs, world = len(chosen.runs), chosen.mesh.world
    if n_runs == 1:
        other = next((each for each in fitting if len(each.runs) > 1), None)
        if other is not None:
            yield f"{other.name} would take {_times(other, chosen)} as long."
        return
    text = f"{len(saes)} SAEs in {n_runs} runs of {'a GPU' if world == 1 else f'{world} GPUs'} each: runs tell each "
    text += "other nothing"
    other = next((each for each in fitting if len(each.runs) == 1), None)
    if other is not None:
        text += f"; one run of {other.name} would take {_times(other, chosen)} as long"
    yield f"{text}."


def _about_axes(
    fitting: Sequence[Layout], chosen: Layout, cluster: Cluster, rates: Mapping[str, float]
) -> Iterator[str]:
    """Why so many data ranks: beside the soonest that has fewer, or more."""
    mesh = chosen.mesh
    alike = [each for each in fitting if len(each.runs) == len(chosen.runs)]
    sums, gradients = (readable(chosen.received.get(method, 0)) for method in ("sum_latents", "sum_rows"))
    if mesh.data > 1:
        text = f"Batches are large enough for {mesh.data} data ranks: {gradients} of gradients a step"
        other = next((each for each in alike if each.mesh.data < mesh.data), None)
        if other is not None:
            more = readable(other.received.get("sum_latents", 0))
            text += f", and {sums} of sums along the latents where {other.name} has {more} and takes "
            text += f"{_times(other, chosen)} as long"
        yield f"{text}."
        return
    yield f"Latents first: {sums} of sums along them a step go {_way(mesh, 'latents', cluster, rates)}."
    other = next((each for each in alike if each.mesh.data > 1), None)
    if other is not None:
        yield (
            f"{other.name} would take {_times(other, chosen)} as long: {readable(other.received['sum_rows'])} of "
            f"gradients a step would go {_way(other.mesh, 'data', cluster, rates)}."
        )


def _way(mesh: MeshConfig, axis: Axis, cluster: Cluster, rates: Mapping[str, float]) -> str:
    n_cards = cards(mesh, axis, cluster)
    speed = f"{readable(int(bandwidth(mesh, axis, cluster, rates)))}/s"
    if n_cards is None:
        return f"by NVLink ({speed})"
    return f"through {n_cards} network card{'s' * (n_cards > 1)} of every node ({speed})"


def _times(other: Layout, chosen: Layout) -> str:
    return f"{chosen.rows_per_second / other.rows_per_second:.2f} times"
