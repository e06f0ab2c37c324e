"""`sae-pipeline plan --gpus N`: which mesh of given GPUs trains the SAEs of a configuration, and why."""

import argparse
import json
import re
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from flows.named_numbers import named_numbers
from sae.errors import ConfigError
from sae.memory import readable

if TYPE_CHECKING:
    from sae.plan import Place, Plan
    from sae.preflight import Size
    from sae.store.storage.filesystem import Storage
    from sae.train.cluster import Cluster, Trained
    from sae.train.layouts import Layout

DOES_NOT_FIT = 1
STORED_BYTES = 2
"""Of a stored number, for the rate at which rows are read: float16."""
UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


class Gpus(NamedTuple):
    """What the options say."""

    cluster: "Cluster"
    rates: dict[str, float]


def add_gpu_options(command: argparse.ArgumentParser) -> None:
    """Add `--gpus` and what belongs to it."""
    command.add_argument(
        "--gpus", type=int, metavar="N", help="say instead which execution.mesh of N GPUs trains the SAEs, and why"
    )
    command.add_argument("--gpus-per-node", type=int, metavar="N", help="with --gpus: joined by NVLink (default: 8)")
    command.add_argument("--gpu-memory", metavar="SIZE", help="with --gpus: of each, e.g. 40GiB (default: 80GiB)")
    command.add_argument(
        "--rate",
        action="append",
        default=[],
        dest="rates",
        metavar="NAME=NUMBER",
        help="with --gpus: float32, bfloat16 (FLOP/s of products; default 67e12, 989e12), memory, nvlink, nic (bytes/s "
        "of a GPU in one direction; 3.35e12, 450e9, 50e9): an H100; may be repeated",
    )


def read_gpus(options: argparse.Namespace) -> Gpus | None:
    """Raises: ConfigError for a value that is none, or options of `--gpus` without it."""
    with_gpus = {"--gpus-per-node": options.gpus_per_node, "--gpu-memory": options.gpu_memory, "--rate": options.rates}
    if options.gpus is None:
        given = [name for name, value in with_gpus.items() if value]
        if given:
            raise ConfigError(f"{given[0]} belongs to --gpus: say how many there are")
        return None
    from sae.train.cluster import DEFAULT_RATES, Cluster

    per_node = min(options.gpus, 8) if options.gpus_per_node is None else options.gpus_per_node
    for name, number in (("--gpus", options.gpus), ("--gpus-per-node", per_node)):
        if number < 1:
            raise ConfigError(f"{name} {number}: at least 1")
    cluster = Cluster(n_gpus=options.gpus, gpus_per_node=per_node, gpu_bytes=_size(options.gpu_memory or "80GiB"))
    return Gpus(cluster, named_numbers("--rate", options.rates, DEFAULT_RATES, zero=False, what="a rate"))


def print_mesh_plan(
    plan: "Plan", storage: "Storage", sizes: "dict[Place, Size]", gpus: Gpus, *, as_json: bool = False
) -> int:
    """Print every layout of the GPUs, the best one and why. Returns: 0; 1 when nothing fits.

    Raises: ConfigError when no mesh of so many GPUs can share the SAEs, or nobody knows how wide they are.
    """
    from sae.estimate import place_width
    from sae.train.cluster import Trained
    from sae.train.layout_reasons import reasons
    from sae.train.layouts import choose, plan_layouts

    saes = []
    for index, spec in enumerate(plan.saes):
        place: Place = (spec.config.hook_point or "", "train")
        saes.append(Trained(f"saes.{index}", spec.config, place_width(plan, place, storage, sizes.get(place))))
    layouts = plan_layouts(saes, gpus.cluster, gpus.rates)
    try:
        chosen = choose(layouts, saes, gpus.cluster)
    except ConfigError as err:
        print(f"sae-pipeline: does not fit: {err}", file=sys.stderr)
        return DOES_NOT_FIT
    why = reasons(layouts, chosen, saes, gpus.cluster, gpus.rates)
    if as_json:
        found: dict[str, Any] = {
            "cluster": gpus.cluster.model_dump(),
            "rates": gpus.rates,
            "layouts": [each.model_dump() | {"fits": _fits(each, gpus)} for each in layouts],
            "chosen": chosen.model_dump(),
            "reasons": why,
        }
        print(json.dumps(found))
    else:
        print("\n".join(mesh_lines(layouts, chosen, saes, gpus, why)))
    return 0


def mesh_lines(
    layouts: "list[Layout]", chosen: "Layout", saes: "list[Trained]", gpus: Gpus, why: list[str]
) -> list[str]:
    """The layouts as a table, the reasons, and what to set."""
    cluster = gpus.cluster
    rows = [("mesh (data x latents)", "memory", "told", "gradients", "step", "of it told", "rows/s", "efficiency")]
    for each in layouts:
        mark = " *" if each is chosen else "" if _fits(each, gpus) else " (does not fit)"
        rows.append(
            (
                each.name + (", SAEs in turn" if each.in_turn else "") + mark,
                readable(each.rank_bytes),
                readable(sum(each.received.values())),
                readable(each.received.get("sum_rows", 0)),
                f"{each.step_seconds * 1e3:.3g} ms",
                f"{each.told_seconds * 1e3:.3g} ms",
                f"{each.rows_per_second:,.0f}",
                f"{each.efficiency:.0%}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    d_in = max(sae.d_in for sae in saes)
    reading = chosen.rows_per_second * d_in * STORED_BYTES
    mesh = chosen.mesh
    settings = f"execution.mesh = {{ data = {mesh.data}, latents = {mesh.latents} }}"
    if len(chosen.runs) > 1:
        settings += f", in {len(chosen.runs)} runs with these saes: {' | '.join(_numbers(run) for run in chosen.runs)}"
    return [
        f"{cluster.n_gpus} GPUs, {min(cluster.n_gpus, cluster.gpus_per_node)} a node, {readable(cluster.gpu_bytes)} "
        f"each; figures are of a rank and a step of every SAE, by arithmetic",
        "",
        *lines,
        "",
        *why,
        f"To keep up, {readable(int(reading))}/s of float16 activations must be read.",
        "",
        settings,
    ]


def _numbers(run: tuple[int, ...]) -> str:
    return " ".join(map(str, run))


def _fits(layout: "Layout", gpus: Gpus) -> bool:
    return layout.rank_bytes <= gpus.cluster.usable_bytes


def _size(text: str) -> int:
    """Bytes of `40GiB`. Raises: ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text)
    if match is None or match[2] not in UNITS or not float(match[1]):
        raise ConfigError(f"--gpu-memory {text!r}: write a number and one of {', '.join(UNITS)}")
    return int(float(match[1]) * UNITS[match[2]])
