"""The report on 65,536 latents: what it takes to write and to use it, against the budgets of its design."""

import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sae.progress import silent
from sae.report.inputs import open_inputs
from sae.report.pages import write_pages
from sae.report.render import render_report
from sae.store.storage.filesystem import Storage
from tests.benchmarks.timing import Row
from tests.conftest import BROWSER_ARGS

N_LATENTS, N_OTHER = 65_536, 4_096
DEBOUNCE_MS = 150
VISITED = 200
"""Latents opened before the heap is measured."""

HELPERS = """
window.until = (holds) => new Promise((resolve) => {
  if (holds()) return resolve();
  const watch = new MutationObserver(() => holds() && (watch.disconnect(), resolve()));
  watch.observe(document.documentElement, { subtree: true, childList: true, attributes: true });
});
window.timed = async (act, holds) => {
  const start = performance.now();
  act();
  await until(holds);
  return performance.now() - start;
};
window.nextFrame = () => new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
window.rowsDrawn = () => document.querySelector('.rows .row .context :first-child');
window.openLatent = async (id) => {
  const start = performance.now();
  const there = () => document.querySelector('#view h1')?.textContent === `Latent ${id}`;
  await timed(() => (location.hash = `#/latent/${id}`), there);
  await nextFrame();
  return performance.now() - start;
};
window.sortBy = (sort) => timed(() => (location.hash = `#/latents?sort=${sort}`),
  () => document.querySelector(`[aria-sort=${sort[0] === '-' ? 'descending' : 'ascending'}] ` +
    `[data-sort=${sort.replace('-', '')}]`) && rowsDrawn());
window.askedFor = (query) => document.querySelector('.parts .part > span')?.textContent === query && rowsDrawn();
window.filterBy = (query) =>
  timed(() => (location.hash = `#/latents?q=${encodeURIComponent(query)}`), () => askedFor(query));
window.type = (query) => timed(() => {
  document.querySelector('#query').value = query;
  document.querySelector('#query').dispatchEvent(new Event('input', { bubbles: true }));
}, () => askedFor(query));
window.scrollRows = async (n) => {
  const grid = document.querySelector('.grid');
  for (let i = 0; i < n; i++) {
    grid.scrollTop += 400;
    await nextFrame();
  }
};
window.longTasks = 0;
new PerformanceObserver((list) => (longTasks += list.getEntries().length)).observe({ type: 'longtask' });
addEventListener('DOMContentLoaded', () => until(rowsDrawn).then(() => (window.listReady = performance.now())));
"""


def report(folder: Path) -> Iterator[Row]:
    """Ours beside the budget; the ratio is budget over ours, so that 1 and more is within it."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "sae" / "report"))
    import synthetic
    import synthetic_whole

    storage = Storage(str(folder / "root"))
    spec = synthetic_whole.whole_spec(storage, n_latents=N_LATENTS, n_other=N_OTHER, chunk_bytes=256 << 10)
    with open_inputs(storage, spec) as (_, other, _):
        speeds = [_latents_per_second(other, spec, folder / f"pages-{i}") for i in range(3)]
    ratios = tuple(speed / 600 for speed in speeds)
    yield Row("report: latents written", f"{statistics.median(speeds):,.0f} /s/core", ">= 600 /s/core", ratios)
    record = render_report(storage, spec, synthetic.LINEAGE)
    rendered = Path(storage.full(record.folder))
    yield from _sizes(rendered / "data/large")
    yield from _using(rendered)


def _latents_per_second(inputs: Any, spec: Any, target: Path) -> float:
    started = time.process_time()
    write_pages(target, inputs, spec.config, silent)
    return float(inputs.latents.num_rows / (time.process_time() - started))


def _sizes(data: Path) -> Iterator[Row]:
    """Bytes of each kind of file, scaled to 100,000 latents, beside what the design reckons with."""
    planned = {"latents": 366e6, "labels": 0.9e6, "col": 0.255e6 * len(list(data.glob("col/*.js"))), "index": 64 << 20}
    for name, budget in planned.items():
        files = [path.stat().st_size for path in data.glob(f"{name}/**/*.js")]
        size = sum(files) / N_LATENTS * 100_000
        what = f"report: {name} of 100,000 latents, largest file {max(files) / 1e3:,.0f} kB"
        yield Row(what, f"{size / 1e6:,.1f} MB", f"{budget / 1e6:,.1f} MB", (budget / size,))


def _using(folder: Path) -> Iterator[Row]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=BROWSER_ARGS)
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        context.add_init_script(HELPERS)
        address = f"file://{folder}/index.html"
        yield _row("list ready, from disk", [_list_ready(context, address) for _ in range(5)], 1500)
        page = context.new_page()
        devtools = context.new_cdp_session(page)
        devtools.send("Performance.enable")
        metric = lambda name: _metric(devtools, name)
        page.goto(f"{address}#/latents?cols=max,mean,frequency,n_fired,precision,recall,lift,spark")
        page.wait_for_function(
            "() => rowsDrawn() && document.querySelectorAll('.rows .row:first-child .num').length > 5"
        )

        sorts = [f"{sign}{name}" for name in ("max", "frequency", "precision", "recall") for sign in ("-", "")]
        yield _row("sort", [page.evaluate("sort => sortBy(sort)", sort) for sort in sorts], 60)
        filters = [f"freq>{k}.5e-4" for k in range(1, 9)]
        yield _row("filter by a number", [page.evaluate("q => filterBy(q)", query) for query in filters], 50)
        words = ["self", "raise", "open", "encoding", "socket", "struct", "default", "line"]
        page.evaluate("q => filterBy(q)", "label:self")
        typed = [page.evaluate("q => type(q)", word) - DEBOUNCE_MS for word in words]
        yield _row("word typed -> results, after the debounce", typed, 100)

        page.goto(f"{address}#/latents")
        page.wait_for_function("() => rowsDrawn()")
        page.evaluate("scrollRows(20)")
        page.evaluate("longTasks = 0")
        before = metric("ScriptDuration")
        page.evaluate("scrollRows(100)")
        spent = 1000 * (metric("ScriptDuration") - before) / 100
        long_tasks = page.evaluate("longTasks")
        yield _row(f"redraw while scrolling 10 rows, {long_tasks} long tasks", [spent], 4)

        cold = [page.evaluate("id => openLatent(id)", 5 + i * N_LATENTS // 12) for i in range(12)]
        yield _row("click -> contexts painted, from disk", cold[1:], 150)
        near = 5 + 11 * N_LATENTS // 12
        cached = [page.evaluate("id => openLatent(id)", near + 1 + i) for i in range(9)]
        yield _row("click -> contexts painted, from the cache", cached, 50)
        for i in range(VISITED):
            page.evaluate("id => openLatent(id)", 7 + i * N_LATENTS // VISITED)
        devtools.send("HeapProfiler.collectGarbage")
        heap = metric("JSHeapUsedSize") / 1e6
        yield Row(f"report: heap after {VISITED} latents", f"{heap:,.0f} MB", "<= 150 MB", (150 / heap,))
        browser.close()


def _list_ready(context: Any, address: str) -> float:
    page = context.new_page()
    page.goto(f"{address}#/latents")
    page.wait_for_function("() => window.listReady")
    ready = float(page.evaluate("listReady"))
    page.close()
    return ready


def _metric(devtools: Any, name: str) -> float:
    metrics = devtools.send("Performance.getMetrics")["metrics"]
    return float(next(one["value"] for one in metrics if one["name"] == name))


def _row(what: str, ours: list[float], budget: float) -> Row:
    """Milliseconds against a budget."""
    ratios = tuple(budget / max(value, 0.1) for value in ours)
    return Row(f"report: {what}", f"{statistics.median(ours):,.1f} ms", f"<= {budget:,} ms", ratios)
