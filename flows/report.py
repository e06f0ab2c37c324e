"""Evaluation; statistics per part, merged; the report."""

from typing import Any

from prefect import flow

from flows.artifacts import publish_artifacts, report_uri
from flows.lineage import lineage_of
from flows.repair import Outcomes, run_repairing
from flows.run import Run, raise_if_missing
from flows.stages import Stage
from sae.errors import ConfigError
from sae.explain.config import ChatEndpoint
from sae.explain.explain import count_shards
from sae.plan import PipelineConfig, Plan, make_plan
from sae.preflight import check_explainer
from sae.statistics.config import StatisticsSpec
from sae.statistics.statistics import count_parts
from sae.statistics.tree import merge_levels
from sae.sweep_names import name_sweep
from tasks import report as tasks


@flow(name="report", flow_run_name="report: {config.report.title}", result_serializer="json")
def report(
    config: PipelineConfig, only: Stage | None = None, refresh: Stage | None = None, repair: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """From SAEs to evaluation, statistics and the report. The train flow must have run with the same config.

    Returns: the outcome of every task.
    """
    plan = make_plan(config)
    if only == "labels" and not plan.labels:
        raise ConfigError("labels: the configuration has no such section, so no model is asked. Add labels.explainer.")
    if only in (None, "labels"):
        check_explainer(plan)

    def go(repair: tuple[str, ...], outcomes: Outcomes) -> None:
        with Run(config.execution, only, refresh, repair, outcomes) as run:
            raise_if_missing(run.storage, plan.saes, "the report flow")
            _report(run, plan)

    return run_repairing("report", only, repair, go)


def _report(run: Run, plan: Plan) -> None:
    names = _bar_names(plan)
    for each in (plan, plan.control):
        if each is not None:
            of_each = names if each is plan else [" of the control"]
            shared: dict[str, Any] = {"gang": run.gang_of_latents("evaluation")}
            bars = [shared | {"bar": f"evaluation{name}"} for name in of_each]
            jobs = [([spec], bar) for spec, bar in zip(each.evaluations, bars, strict=True)]
            run.do_each("evaluation", tasks.evaluate_sae, jobs)
    run.tell("evaluation", f"{len(plan.evaluations)} SAE{'s' * (len(plan.evaluations) > 1)} and controls")
    for statistics, name in zip(plan.statistics, names, strict=True):
        _statistics(run, statistics, f"statistics{name}")
    run.tell("statistics", "frequencies, histograms, examples")
    _labels(run, plan)
    if run.wants("report") and plan.report is not None:
        lineage = lineage_of(run.storage, plan)
        run.do("report", tasks.render_report, [plan.report], lineage=lineage)
        run.tell("report", report_uri(run.storage, plan))
        publish_artifacts(run.storage, plan)


def _bar_names(plan: Plan) -> list[str]:
    """What a bar adds for each SAE where there are several: ` of topk-2048-k24`."""
    names = [named.name for named in name_sweep([spec.config for spec in plan.saes])]
    return [f" of {name}" for name in names] if len(names) > 1 else [""]


def _statistics(run: Run, spec: StatisticsSpec, bar: str) -> None:
    if run.wants("statistics"):
        n_parts, gang = count_parts(run.storage, spec), run.gang_of_latents("statistics")
        if gang is None:
            run.fan_out("statistics", bar, tasks.statistics_of_part, [([spec], part) for part in range(n_parts)])
        else:
            all_parts = [range(n_parts)]
            run.do("statistics", tasks.statistics_of_parts, [spec], parts=all_parts, gang=gang, bar=bar)
        for level in merge_levels(n_parts):
            jobs = [([spec], node.part) for node in level]
            run.fan_out("statistics", f"{bar}: merge", tasks.merge_statistics_parts, jobs)
        run.do("statistics", tasks.merge_statistics, [spec], bar=bar, gang=gang)


def _labels(run: Run, plan: Plan) -> None:
    if not plan.labels or not run.wants("labels"):
        return
    assert plan.config.labels
    explainer = plan.config.labels.explainer
    for questions, labels in zip(plan.questions, plan.labels, strict=True):
        run.do("labels", tasks.write_questions, [questions])
        shards = range(count_shards(run.storage, labels))
        if isinstance(explainer, ChatEndpoint):
            jobs = [([labels], part) for part in shards]
            run.fan_out("labels", "labels", tasks.label_latents, jobs, explainer=explainer)
        else:  # a model in memory once, with all cores
            for part in shards:
                run.do("labels", tasks.label_latents, [labels], part=part, explainer=explainer)
        run.do("labels", tasks.merge_labels, [labels])
    run.tell("labels", "explanations by a model, with detection and fuzzing scores")
