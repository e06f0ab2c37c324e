"""extract -> train -> report, end to end. Read this file first.

`python -m flows.pipeline` runs the default recipe, on the Prefect server that PREFECT_API_URL names or on an
ephemeral one; `sae-pipeline run` is the same with options.
"""

from typing import Any

from prefect import flow

from flows.artifacts import publish_artifacts
from flows.extract import extract
from flows.recipes import default
from flows.repair import Outcomes, run_repairing
from flows.report import report
from flows.server import prefect_server
from flows.stages import FLOW_STAGES, STAGES, Stage
from flows.train import train
from sae.plan import PipelineConfig, make_plan
from sae.preflight import check_explainer, check_plan
from sae.store.storage.filesystem import Storage
from tasks.ray_cluster import ray_cluster


@flow(name="pipeline", flow_run_name="pipeline: {config.report.title}", result_serializer="json")
def pipeline(
    config: PipelineConfig, only: Stage | None = None, refresh: Stage | None = None, repair: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """From text (or given activations) to a report.

    Args:
        config: the whole run as one document.
        only: run the tasks of one stage; what they need must be in the store.
        refresh: compute this stage and what follows again.
        repair: addresses (`saes/<fingerprint>`, `parts/<fingerprint>/part-00003`) of artefacts to compute again and
            to compare with their records. Damage that is found on use is repaired without being named here.

    Returns: the outcome of every task: stage, task, ref, part, computed or cached.
    """
    plan = make_plan(config)
    check_plan(plan)
    if only in (None, "labels"):
        check_explainer(plan)

    def go(repair: tuple[str, ...], outcomes: Outcomes) -> None:
        for each in (extract, train, report):
            if only is None or only in FLOW_STAGES[each.name]:
                outcomes += each(config, only, refresh, repair)
        if only in (None, "report"):
            # The report flow has them as well; who opens this run looks for them here.
            publish_artifacts(Storage(config.execution.root), make_plan(config))

    with ray_cluster(config.execution, STAGES if only is None else [only]):  # one for the three flows, if any
        return run_repairing(None, only, repair, go)


if __name__ == "__main__":
    with prefect_server():
        pipeline(default())
