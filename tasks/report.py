"""SAEs to evaluation, statistics and the report."""

from collections.abc import Sequence
from typing import Any

from prefect import task

from sae.evaluate.config import EvaluationSpec
from sae.explain import explain, questions
from sae.explain.config import AnyExplainer, ChatEndpoint, LabelsSpec, QuestionsSpec
from sae.report import render
from sae.report.config import ReportSpec
from sae.statistics import statistics
from sae.statistics.config import StatisticsSpec
from sae.store.storage.filesystem import Storage
from tasks import calls
from tasks.caching import TASK_OPTIONS, Job, is_stored, produce
from tasks.gang import GangConfig


@task(task_run_name="evaluate-sae-{spec.fingerprint}", **TASK_OPTIONS)
def evaluate_sae(spec: EvaluationSpec, job: Job, bar: str = "evaluation", gang: GangConfig | None = None) -> list[str]:
    """Measure an SAE on held-out documents, beside its controls."""
    return produce(job, [spec], calls.evaluate_sae, {"spec": spec}, bar=bar, gang=gang)


@task(task_run_name="statistics-part-{part:05d}", **TASK_OPTIONS)
def statistics_of_part(spec: StatisticsSpec, part: int, job: Job) -> list[str]:
    """Count one part's firings."""
    return produce(job, [spec], statistics.statistics_of_part, {"spec": spec, "part": part}, part=part)


@task(task_run_name="statistics-parts-{spec.fingerprint}", **TASK_OPTIONS)
def statistics_of_parts(
    spec: StatisticsSpec, parts: Sequence[tuple[int, int]], job: Job, gang: GangConfig, bar: str
) -> list[str]:
    """Count the firings of all parts [first, stop), by processes that share the SAE's latents."""
    (made,) = (range(*each) for each in parts)
    storage = Storage(job.root)
    missing = [part for part in made if job.recompute or not is_stored(storage, [spec], part)]
    arguments = {"spec": spec, "parts": missing}
    return produce(job, [spec], calls.statistics_of_parts, arguments, parts=[made], bar=bar, gang=gang)


@task(task_run_name="merge-statistics-part-{part:05d}", **TASK_OPTIONS)
def merge_statistics_parts(spec: StatisticsSpec, part: int, job: Job) -> list[str]:
    """Merge some parts' statistics into a further part: a node of the merge tree."""
    return produce(job, [spec], statistics.merge_parts, {"spec": spec, "part": part}, part=part)


@task(task_run_name="merge-statistics-{spec.fingerprint}", **TASK_OPTIONS)
def merge_statistics(
    spec: StatisticsSpec, job: Job, bar: str = "statistics", gang: GangConfig | None = None
) -> list[str]:
    """Merge the parts' statistics into tables of latents and examples."""
    return produce(job, [spec], calls.merge_statistics, {"spec": spec}, bar=f"{bar}: examples", gang=gang)


@task(task_run_name="write-questions-{spec.fingerprint}", **TASK_OPTIONS)
def write_questions(spec: QuestionsSpec, job: Job) -> list[str]:
    """Choose what an explainer is shown and asked."""
    return produce(job, [spec], questions.write_questions, {"spec": spec})


@task(task_run_name="label-latents-{part:05d}", **TASK_OPTIONS)
def label_latents(spec: LabelsSpec, part: int, job: Job, explainer: AnyExplainer) -> list[str]:
    """Ask a model about a few latents."""
    if isinstance(explainer, ChatEndpoint):  # it computes elsewhere
        job = Job.model_validate(job.model_dump() | {"device": "cpu"})
    arguments = {"spec": spec, "part": part, "explainer": explainer}
    return produce(job, [spec], explain.label_shard, arguments, part=part)


@task(task_run_name="merge-labels-{spec.fingerprint}", **TASK_OPTIONS)
def merge_labels(spec: LabelsSpec, job: Job) -> list[str]:
    """Join what the model said of all latents."""
    return produce(job, [spec], explain.merge_labels, {"spec": spec})


@task(task_run_name="render-report-{spec.fingerprint}", **TASK_OPTIONS)
def render_report(spec: ReportSpec, job: Job, lineage: list[dict[str, Any]]) -> list[str]:
    """Write the report."""
    return produce(job, [spec], render.render_report, {"spec": spec, "lineage": lineage}, bar="report")
