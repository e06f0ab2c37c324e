"""Subject, tokens, then a task per run of parts; the snapshot is committed when all are there."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
from prefect import flow

from flows.remix import remix
from flows.repair import Outcomes, run_repairing
from flows.run import Run
from flows.stages import CONTROL, Stage
from sae.config import Spec
from sae.extract.part_group import WantedParts, share_contexts
from sae.plan import PipelineConfig, Place, Plan, make_plan
from sae.preflight import check_plan, check_tokens
from sae.store.artefacts.records import require_record
from sae.store.snapshots.part_sets import finished_parts
from sae.store.snapshots.snapshot import parts_wanted
from sae.subject.config import EmbeddedLMSpec, HFModelSpec
from tasks import extract as tasks

TASKS_PER_WORKER = 4
"""Runs of parts for each worker, at least: whoever is done first takes another."""


@flow(name="extract", flow_run_name="extract: {config.report.title}", result_serializer="json")
def extract(
    config: PipelineConfig, only: Stage | None = None, refresh: Stage | None = None, repair: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """From a corpus and a model (or given activations) to snapshots of activations.

    Returns: the outcome of every task.
    """
    plan = make_plan(config)
    check_plan(plan)

    def go(repair: tuple[str, ...], outcomes: Outcomes) -> None:
        with Run(config.execution, only, refresh, repair, outcomes) as run:
            for each in (plan, plan.control):
                if each is not None:
                    extract_plan(run, each, "" if each is plan else CONTROL)

    return run_repairing("extract", only, repair, go)


def extract_plan(run: Run, plan: Plan, prefix: str) -> None:
    """The tasks of one plan: the main one, or its control's."""
    for source, segment in plan.segments:
        run.do("tokens", tasks.freeze_segment, [segment], source=source)
    sources = {segment.ref: source for source, segment in plan.segments}
    if isinstance(plan.subject, HFModelSpec):
        run.do("subject", tasks.pin_subject, [plan.subject])
    if plan.tokenizer is not None:
        run.do("subject", tasks.train_tokenizer, [plan.tokenizer], source=sources[plan.tokenizer.segments[0]])
    if sources and run.wants("tokens"):
        for tokens in plan.tokens:
            run.do("tokens", tasks.tokenize_segment, [tokens], source=sources[tokens.segment])
        run.tell("tokens", _tokens_line(run, plan))
        check_tokens(run.storage, plan)
    if isinstance(plan.subject, EmbeddedLMSpec):
        run.train("subject", tasks.train_subject, [[plan.subject]])
    if plan.subject is not None:
        run.tell("subject", f"{prefix}{plan.subject.ref}")
    if run.wants("activations"):
        _activations(run, plan)
        run.tell("activations", prefix + _activations_line(run, plan))


def _activations(run: Run, plan: Plan) -> None:
    """Parts and snapshots of every hook point and split."""
    splits = dict.fromkeys(split for _, split in plan.parts)
    for split in splits:
        places = [place for place in plan.parts if place[1] == split]
        if plan.subject is None:
            for place in places:
                run.do("activations", tasks.import_activations, plan.parts[place])
        else:
            _extract_parts(run, plan, places)
        for place in places:
            run.do("activations", tasks.commit_snapshot, [plan.snapshots[place]])
    for hook_point, (spec, snapshot) in plan.remixed.items():
        remix(run, hook_point, spec, snapshot)


def _extract_parts(run: Run, plan: Plan, places: list[Place]) -> None:
    """The parts of several hook points over one split: all that are on the same contexts in the same forward passes."""
    jobs: list[tuple[list[Spec], list[range]]] = []
    finished: dict[str, np.ndarray] = {}
    for specs in zip(*(plan.parts[place] for place in places), strict=True):  # one entry per segment
        run.do("activations", tasks.plan_parts, specs)
    records = {place: [require_record(run.storage, spec.ref) for spec in plan.parts[place]] for place in places}
    wanted = {place: parts_wanted(records[place], plan.snapshots[place].n_tokens) for place in places}
    for segment in range(len(plan.tokens)):
        sets = []
        for place in places:
            spec = plan.parts[place][segment]
            sizes = records[place][segment].metrics
            n_parts = int(sizes["n_parts"])
            sets.append(WantedParts(int(sizes["contexts_per_part"]), n_parts, wanted[place][segment]))
            finished[spec.ref] = finished_parts(run.storage, spec.ref, n_parts)
        for shared in share_contexts(sets):
            together: list[Spec] = [plan.parts[places[index]][segment] for index in shared.sets]
            for units in shared.runs(TASKS_PER_WORKER * run.execution.max_workers):
                jobs += _jobs(run, together, units)
    # Runs on other machines may work on the same parts and look whether a part is there before they begin with it.
    # Each in another order, they rarely begin with the same one.
    random.shuffle(jobs)
    run.fan_out("activations", f"activations, {places[0][1]}", tasks.extract_parts, jobs, finished)


def _jobs(run: Run, specs: list[Spec], units: list[list[range]]) -> Iterator[tuple[list[Spec], list[range]]]:
    """One job for all parts of some units; one for every part when one of them is to be repaired."""
    runs = [range(first.start, last.stop) for first, last in zip(units[0], units[-1], strict=True)]
    of_each = [(spec, parts) for spec, parts in zip(specs, runs, strict=True) if parts]
    if any(run.is_to_repair(spec.ref, part) for spec, parts in of_each for part in parts):
        yield from (([spec], [range(part, part + 1)]) for spec, parts in of_each for part in parts)
    else:
        yield [spec for spec, _ in of_each], [parts for _, parts in of_each]


def _tokens_line(run: Run, plan: Plan) -> str:
    metrics = [require_record(run.storage, spec.ref).metrics for spec in plan.tokens]
    train, heldout = (sum(m[split]["n_tokens"] for m in metrics) for split in ("train", "heldout"))
    documents = sum(m["n_documents"] for m in metrics)
    return f"{train + heldout:,} tokens of {documents:,} documents, {heldout:,} held out"


def _activations_line(run: Run, plan: Plan) -> str:
    lines = []
    for (hook_point, split), spec in plan.snapshots.items():
        metrics = require_record(run.storage, spec.ref).metrics
        line = f"{hook_point} {split}: {metrics['n_rows']:,} x {metrics['d_in']}, parts: {metrics['n_parts']}"
        left_out = {rule: metrics.get(f"n_{rule}", 0) for rule in ("special", "padding", "sink")}
        if any(left_out.values()):
            line += f", left out: {', '.join(f'{rule} {n:,}' for rule, n in left_out.items() if n)}"
        if split == "train" and hook_point in plan.remixed:
            n_parts = require_record(run.storage, plan.remixed[hook_point][1].ref).metrics["n_parts"]
            line += f", remixed: {n_parts}"
        lines.append(line)
    return "; ".join(lines)
