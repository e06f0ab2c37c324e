"""`sae-pipeline plan`: what a run takes before anything is spent: rows, bytes, requests, memory, time, money."""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from flows.named_numbers import named_numbers
from flows.plan_mesh import add_gpu_options, print_mesh_plan, read_gpus
from sae.errors import ConfigError

if TYPE_CHECKING:
    from sae.estimate import PlaceEstimate, TrainEstimate
    from sae.estimate_remix import RemixEstimate
    from sae.plan import Plan
    from sae.probe import StorageSpeed
    from sae.store.storage.filesystem import Storage

DOES_NOT_FIT = 1


def add_plan_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `plan` to the command line."""
    text = "what a run would take: rows, bytes, parts, requests, memory, time and cost; nothing is extracted"
    command = commands.add_parser("plan", help=text, description=text)
    command.add_argument(
        "config", nargs="?", default="default", metavar="RECIPE|FILE", help="a recipe, or a .toml or .json file"
    )
    command.add_argument("--root", metavar="URI", help="where artefacts would be kept (default: runs)")
    command.add_argument(
        "--set", action="append", default=[], dest="settings", metavar="PATH=VALUE", help="as in `sae-pipeline run`"
    )
    command.add_argument(
        "--price",
        action="append",
        default=[],
        dest="prices",
        metavar="NAME=DOLLARS",
        help="storage (a GB and month; default 0.023), put (1000 requests that write or list; 0.005), get (1000 that "
        "read; 0.0004), hour (of this machine; 2.00); may be repeated",
    )
    add_gpu_options(command)
    command.add_argument("--json", action="store_true", help="print one JSON document")


def run_plan(options: argparse.Namespace) -> int:
    """Print what a run would take, or which mesh of `--gpus` trains its SAEs. Returns: 0; 1 when it does not fit.

    Raises: ConfigError, InputError as the run would.
    """
    from flows.plan_table import plan_lines
    from flows.settings import load_config
    from sae.estimate_needs import DEFAULT_PRICES
    from sae.plan import make_plan
    from sae.preflight import check_batches, check_root, plan_sizes
    from sae.store.storage.filesystem import Storage
    from tasks.progress import show_progress

    prices = named_numbers("--price", options.prices, DEFAULT_PRICES, "DOLLARS", zero=True, what="a price")
    gpus = read_gpus(options)
    config = load_config(options.config, options.settings, options.root)
    storage = Storage(config.execution.root)
    with show_progress("corpus") as progress:
        plan = make_plan(config, progress)
    check_root(plan)
    try:
        sizes = plan_sizes(plan)
    except ConfigError as err:
        print(f"sae-pipeline: does not fit: {err}", file=sys.stderr)
        return DOES_NOT_FIT
    check_batches(plan, sizes)
    if gpus is not None:
        return print_mesh_plan(plan, storage, sizes, gpus, as_json=options.json)
    found = _figures(plan, storage, sizes, prices)
    if options.json:
        print(json.dumps(found))
    else:
        print("\n".join(plan_lines(found)))
    for problem in found["does_not_fit"]:
        print(f"sae-pipeline: does not fit: {problem}", file=sys.stderr)
    return DOES_NOT_FIT if found["does_not_fit"] else 0


def _figures(plan: "Plan", storage: "Storage", sizes: Any, prices: dict[str, float]) -> dict[str, Any]:
    from sae import estimate, estimate_needs
    from sae.estimate_remix import estimate_remixes
    from sae.memory import machine_bytes
    from sae.preflight import check_disk, check_training_memory

    places = estimate.estimate_places(plan, storage, sizes)
    training = estimate.estimate_training(plan, storage, places)
    remixes = estimate_remixes(plan, storage, places)
    requests = estimate_needs.count_requests(plan, places, training)
    requests = estimate_needs.Requests(
        requests.puts + sum(each.requests.puts for each in remixes),
        requests.gets + sum(each.requests.gets for each in remixes),
    )
    problems: list[str] = []
    for check in (
        lambda: check_training_memory(plan, sizes),
        lambda: check_disk(plan, sizes),
        lambda: estimate_needs.check_memory(plan, places, 0),
    ):
        try:
            check()
        except ConfigError as err:
            problems.append(str(err))
    model_bytes = 0
    probes: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    if not problems:  # what does not fit is not probed
        probes, seconds, model_bytes = _probe(plan, storage, places, training, remixes)
        try:
            estimate_needs.check_memory(plan, places, model_bytes)
        except ConfigError as err:
            problems.append(str(err))
    rho = (probes.get("forward") or {}).get("rho") or {}
    variances = {
        each.index: estimate_needs.batch_variance(
            plan,
            _trained_on(places, each),
            plan.saes[each.index].config.batch_rows,
            0.0 if each.hook_point in plan.remixed else rho[each.hook_point],  # remixed, parts are random samples
        )
        for each in training
        if each.hook_point in rho
    }
    hours = sum(seconds.values()) / 3600
    n_bytes = sum(p.n_bytes for p in places) + sum(r.n_bytes for r in remixes)
    cost = estimate_needs.cost(n_bytes, requests, hours, prices, on_bucket=storage.protocol == "s3")
    return {
        "root": storage.root,
        "activations": [place.model_dump() for place in places],
        "remixes": [each.model_dump() for each in remixes],
        "stored_bytes": n_bytes,
        "saes": [each.model_dump() for each in training],
        "requests": requests._asdict(),
        "memory": {
            "extraction": estimate_needs.extraction_bytes(plan, places, model_bytes),
            "windows": max(
                estimate_needs.window_bytes(_trained_on(places, t), plan.saes[t.index].config.batch_rows)
                for t in training
            ),
            "machine": machine_bytes(),
        },
        "batch_variance": variances,
        "free_bytes": storage.free_bytes(),
        "probes": probes,
        "seconds": seconds,
        "prices": prices,
        "cost": cost.model_dump(),
        "does_not_fit": problems,
    }


def _probe(
    plan: "Plan",
    storage: "Storage",
    places: "list[PlaceEstimate]",
    training: "list[TrainEstimate]",
    remixes: "list[RemixEstimate]",
) -> tuple[dict[str, Any], dict[str, float], int]:
    """What was measured, the seconds that follow for each stage, and the model's bytes."""
    from sae import probe
    from sae.device import choose_device
    from sae.store import layout
    from sae.subject.config import EmbeddedLMSpec
    from tasks.progress import show_progress

    probes: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    model_bytes = 0
    execution = plan.config.execution
    device = choose_device(execution.device if execution.runner == "thread" else "auto")
    with show_progress("probes") as progress:
        speed = probe.probe_storage(storage, progress=progress)
        probes["storage"] = speed._asdict()
        if plan.subject is not None and any(p.n_parts_done < p.n_parts for p in places):
            forward = probe.probe_forward(plan, storage, progress, device)
            model_bytes = forward.model_bytes
            probes["forward"] = forward._asdict()
        subject = plan.subject
        if isinstance(subject, EmbeddedLMSpec) and not storage.exists(layout.record_path(subject.ref)):
            step = probe.probe_subject_training(plan, progress, device) if subject.config.n_steps else 0.0
            probes["subject_step_seconds"] = step
            seconds["subject"] = subject.config.n_steps * step
        steps = {
            each.index: probe.probe_sae_step(plan.saes[each.index].config, each.d_in, progress, device)
            for each in training
            if not each.done
        }
        if steps:
            probes["sae_step_seconds"] = steps
    seconds["extraction"] = _extraction_seconds(places, speed, probes.get("forward", {}).get("tokens_per_second"))
    if any(not each.done for each in remixes):
        copies = 2 * sum(each.n_bytes for each in remixes if not each.done)
        seconds["remix"] = copies / speed.write_bytes_per_second + copies / speed.read_bytes_per_second
    seconds["training"] = _training_seconds(plan, places, training, steps, speed)
    return probes, seconds, model_bytes


def _extraction_seconds(places: "list[PlaceEstimate]", speed: "StorageSpeed", tokens_per_second: float | None) -> float:
    """Forward passes, shared by the hook points of a split, or writing, whichever takes longer: they overlap."""
    left = {p: 1 - p.n_parts_done / max(p.n_parts, 1) for p in places}
    rows: dict[tuple[str, bool], float] = {}
    for place, share in left.items():
        key = place.split, place.control
        rows[key] = max(rows.get(key, 0.0), place.n_rows * share)
    writing = sum(place.n_bytes * share for place, share in left.items()) / speed.write_bytes_per_second
    return max(writing, sum(rows.values()) / tokens_per_second if tokens_per_second else 0.0)


def _training_seconds(
    plan: "Plan",
    places: "list[PlaceEstimate]",
    training: "list[TrainEstimate]",
    steps: dict[int, float],
    speed: "StorageSpeed",
) -> float:
    """Steps of SAEs that share their batches come one after the other; the activations are read meanwhile."""
    sweeps: dict[tuple[str, int], list[TrainEstimate]] = {}
    for each in training:
        if not each.done:
            sweeps.setdefault((each.hook_point, plan.saes[each.index].config.batch_rows), []).append(each)
    total = 0.0
    for sweep in sweeps.values():
        place = _trained_on(places, sweep[0])
        reading = max(each.epochs for each in sweep) * place.n_bytes / speed.read_bytes_per_second
        total += max(reading, sum(each.n_steps * steps[each.index] for each in sweep))
    return total


def _trained_on(places: "list[PlaceEstimate]", sae: "TrainEstimate") -> "PlaceEstimate":
    return next(p for p in places if (p.hook_point, p.split, p.control) == (sae.hook_point, "train", False))
