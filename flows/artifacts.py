"""What Prefect's UI shows of a run: the headline as a table, a plot, and a link to the report."""

import base64
from typing import Any

import pyarrow.parquet as pq
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from flows.headline import headline_markdown, headlines
from sae.plan import Plan
from sae.report.charts import Chart, density_chart, render_png
from sae.report.sweep import sweep_chart, sweep_point
from sae.store.artefacts.records import local_files, require_record
from sae.store.storage.filesystem import Storage


def publish_artifacts(storage: Storage, plan: Plan) -> None:
    """Attach headline, plot and link to the flow run that this is called in. The report must be finished."""
    rows = headlines(storage, plan)
    create_markdown_artifact(markdown=headline_markdown(rows), key="sae-headline", description="Headline metrics")
    create_table_artifact(table=rows, key="sae-metrics", description="Headline metrics per SAE")
    if (chart := _chart(storage, plan, rows)) is not None and (png := render_png(chart)) is not None:
        # The picture itself: a server that shows the run may not see the root.
        url = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        create_image_artifact(image_url=url, key="sae-plot", description=f"{chart.title}: {chart.description}")
    uri = report_uri(storage, plan)
    create_link_artifact(
        link=f"file://{uri}" if storage.is_local else uri, link_text="report", key="sae-report", description=uri
    )


def report_uri(storage: Storage, plan: Plan) -> str:
    """Where the report's first page is."""
    assert plan.report
    return storage.uri(require_record(storage, plan.report.ref).path("index.html"))


def _chart(storage: Storage, plan: Plan, rows: list[dict[str, Any]]) -> Chart | None:
    """FVU against L0 of a sweep; of a single SAE how often its latents fire."""
    swept = rows[: len(plan.saes)]
    if len(swept) > 1:
        assert plan.report
        return sweep_chart(
            [
                sweep_point(entry.name, entry.family, entry.sparsity, row["l0"], "fvu", row["fvu"], None)
                for row, entry in zip(swept, plan.report.saes, strict=True)
            ]
        )
    record = require_record(storage, plan.statistics[0].ref)
    with local_files(storage, record, "latents.parquet") as folder:
        frequency = pq.read_table(folder / "latents.parquet", columns=["frequency"])["frequency"].to_numpy()
    return density_chart(frequency, int(record.metrics["n_rows"])) if (frequency > 0).any() else None
