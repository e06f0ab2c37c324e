"""The default run's own report in a browser: real text, a real model, from a disk."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from sae.plan import PipelineConfig, make_plan
from sae.store.filesystem import Storage
from sae.store.records import require_record
from tests.sae.report.conftest import Page
from tests.sae.report.walk import Walk

pytestmark = [pytest.mark.slow, pytest.mark.browser]


@pytest.fixture(scope="module")
def folder(default_run: PipelineConfig) -> Path:
    storage = Storage(default_run.execution.root)
    return Path(storage.full(require_record(storage, make_plan(default_run).report.ref).folder))


@pytest.mark.parametrize("way", [{}, {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}])
def test_journey_through_the_default_run_s_report(folder: Path, browser: Any, way: dict[str, Any]) -> None:
    visited = Page(browser, folder, **way)
    walk = Walk(visited.open())
    walk.list_and_latents()
    walk.map()
    walk.passages_and_words()
    walk.judge()
    walk.back()
    assert visited.problems == []
    visited.context.close()


def test_a_search_finds_what_the_table_says(folder: Path, browser: Any) -> None:
    table = pq.read_table(folder / "tables/latents.parquet", columns=["frequency", "max_act", "dead", "rule_precision"])
    frequency, maximum = table["frequency"].to_numpy(), table["max_act"].to_numpy()
    precision = table["rule_precision"].to_numpy()
    wanted = np.flatnonzero((frequency > 1e-3) & (maximum < 12) & (precision > 0.7))
    visited = Page(browser, folder)
    page = visited.open("#/latents")
    found = page.evaluate("q => SAE.find(q)", "freq>1e-3 max<12 p>.7")
    assert sorted(found) == wanted.tolist()
    assert len(wanted) > 20
    assert visited.problems == []
    visited.context.close()
