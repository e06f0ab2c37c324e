"""The SAEs of a sweep on one read of their activations."""

from typing import Any

from prefect import flow

from flows.repair import Outcomes, run_repairing
from flows.run import Run, raise_if_missing
from flows.stages import CONTROL, Stage
from sae.plan import PipelineConfig, Plan, make_plan
from sae.store.artefacts.records import require_record
from sae.sweep_names import name_sweep
from sae.train.config import SAESpec
from tasks import train as tasks

MAX_NAMED = 4
"""SAEs whose figures a line gives one by one."""


@flow(name="train", flow_run_name="train: {config.report.title}", result_serializer="json")
def train(
    config: PipelineConfig, only: Stage | None = None, refresh: Stage | None = None, repair: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """From snapshots of activations to SAEs. The extract flow must have run with the same config.

    Returns: the outcome of every task.
    """
    plan = make_plan(config)

    def go(repair: tuple[str, ...], outcomes: Outcomes) -> None:
        with Run(config.execution, only, refresh, repair, outcomes) as run:
            raise_if_missing(run.storage, list(plan.snapshots.values()), "the train flow")
            raise_if_missing(run.storage, [snapshot for _, snapshot in plan.remixed.values()], "the train flow")
            for each in (plan, plan.control):
                if each is not None and run.wants("sae"):
                    _train(run, each, "" if each is plan else CONTROL)

    return run_repairing("train", only, repair, go)


def _train(run: Run, plan: Plan, prefix: str) -> None:
    # Here one read serves all; on a cluster each has a machine, or a share of one, to itself.
    groups = [[spec] for spec in plan.saes] if run.on_cluster else sharing_a_read(plan)
    run.train("sae", tasks.train_sae, groups, logs=list(run.execution.training_logs), gang=run.gang("sae"))
    run.tell("sae", prefix + _line(run, plan))


def sharing_a_read(plan: Plan) -> list[list[SAESpec]]:
    """SAEs with the same snapshot and batches are trained side by side."""
    groups: dict[tuple[str, int], list[SAESpec]] = {}
    for spec in plan.saes:
        groups.setdefault((spec.snapshot, spec.config.batch_rows), []).append(spec)
    return list(groups.values())


def _line(run: Run, plan: Plan) -> str:
    """`262,104 rows; fvu topk-2048-k24 0.102`; of more than MAX_NAMED how many there are, and from which to which."""
    metrics = [require_record(run.storage, spec.ref).metrics for spec in plan.saes]
    rows = " or ".join(f"{n:,}" for n in sorted({found["n_tokens"] for found in metrics}))
    fvu = [float(found["fvu"]) for found in metrics]
    if len(fvu) > MAX_NAMED:
        return f"{len(fvu)} SAEs: {rows} rows, fvu {min(fvu):.3f} to {max(fvu):.3f}"
    names = [named.name for named in name_sweep([spec.config for spec in plan.saes])]
    return f"{rows} rows; fvu " + ", ".join(f"{name} {value:.3f}" for name, value in zip(names, fvu, strict=True))
