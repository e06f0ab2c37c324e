"""Render one report: read what is known about each SAE, write a folder of static files, commit it."""

import json
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import xxhash

from sae.progress import Progress, silent
from sae.report import charts, chunks
from sae.report.assets import LATER_SCRIPTS, read_script, read_style, write_asset
from sae.report.compare import write_comparisons
from sae.report.config import ReportSpec
from sae.report.decoder_map import write_map
from sae.report.display import plain
from sae.report.inputs import SAEInputs, open_inputs
from sae.report.live_plots import write_live_plots
from sae.report.numbers import decimal
from sae.report.overview import Overview, all_charts, overview, sweep_plots
from sae.report.pages import SAEPages, write_pages
from sae.report.tables import write_tables
from sae.report.toy import toy_of, verdict
from sae.report.try_it import write_passages
from sae.store.artefacts import records
from sae.store.storage.filesystem import Storage


def render_report(
    storage: Storage, spec: ReportSpec, lineage: Sequence[Mapping[str, Any]], *, progress: Progress = silent
) -> records.Record:
    """Write the report of `spec` and commit it. The same inputs give the same bytes.

    Args:
        lineage: what ran, in order: {"role", "ref", "title", "facts": {name: value}, "main"} for each artefact;
            "What ran" lists the main ones.

    Returns: the commit record; `record.path("index.html")` is the page.
    Raises: StoreError when an input is missing or is not what the report needs.
    """
    start = time.perf_counter()
    with open_inputs(storage, spec) as saes, storage.staging() as folder:
        pages = {inputs.key: write_pages(folder, inputs, spec.config, progress) for inputs in saes}
        mapped = {inputs.key: write_map(folder, inputs, spec.config.seed, progress) for inputs in saes}
        compared = write_comparisons(folder, saes, spec.config.seed, progress)
        n_passages = {inputs.key: write_passages(folder, inputs, spec.config.chunk_bytes) for inputs in saes}
        toys = {inputs.key: toy for inputs in saes if (toy := toy_of(storage, inputs)) is not None}
        if toys:
            chunks.write_chunk(folder, "data/toy", chunks.encode_json(toys))
        write_tables(folder / "tables", saes)
        overviews = [overview(inputs, pages[inputs.key]) for inputs in saes]
        html = _page(folder, spec, saes, pages, overviews, _shown_lineage(lineage), toys, mapped, compared, n_passages)
        (folder / "index.html").write_text(html, encoding="utf-8")
        _write_manifest(folder, spec)
        files = [path for path in folder.rglob("*") if path.is_file()]
        metrics = {
            "title": spec.config.title,
            "n_saes": len(saes),
            "n_latents": sum(inputs.latents.num_rows for inputs in saes),
            "n_files": len(files),
            "n_bytes": sum(path.stat().st_size for path in files),
        }
        return records.commit(storage, spec, folder, metrics, seconds=time.perf_counter() - start)


def _page(
    folder: Path,
    spec: ReportSpec,
    saes: list[SAEInputs],
    pages: dict[str, SAEPages],
    overviews: list[Overview],
    lineage: list[dict[str, Any]],
    toys: dict[str, dict[str, Any]],
    mapped: dict[str, bool],
    compared: dict[str, Any],
    n_passages: dict[str, int],
) -> str:
    """index.html; writes the script and the stylesheet it names."""
    site = resources.files("sae.report") / "site"
    assets = {
        "js": write_asset(folder, "app", read_script(site), "js"),
        "css": write_asset(folder, "app", read_style(site), "css"),
    }
    later = write_asset(folder, "views", read_script(site, LATER_SCRIPTS), "js")
    sweeps = sweep_plots(saes)
    vega = write_live_plots(folder, all_charts(overviews, sweeps))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["decimal"] = decimal
    template = environment.from_string((site / "index.html.j2").read_text(encoding="utf-8"))
    return template.render(
        title=plain(spec.config.title, 120),
        seed=spec.config.seed,
        saes=overviews,
        sweeps=sweeps,
        n_latents={inputs.key: inputs.latents.num_rows for inputs in saes},
        lineage=lineage,
        known={key: verdict(toy) for key, toy in toys.items()},
        how_to_get_plots=charts.HOW_TO_GET_PLOTS,
        compared=bool(compared["pairs"]),
        mapped=any(mapped.values()),
        has_text=any(map(_has_text, saes)),
        summary=_summary(spec, saes, pages, overviews, mapped, compared, n_passages, has_toy=bool(toys))
        | {"later": later, "vega": vega},
        **assets,
    )


def _summary(
    spec: ReportSpec,
    saes: list[SAEInputs],
    pages: dict[str, SAEPages],
    overviews: list[Overview],
    mapped: dict[str, bool],
    compared: dict[str, Any],
    n_passages: dict[str, int],
    *,
    has_toy: bool,
) -> dict[str, Any]:
    """What the script must know before it loads any chunk."""
    there = {
        "map": any(mapped.values()),
        "compare": bool(compared["pairs"]),
        "try": any(map(_has_text, saes)),
        "toy": has_toy,
    }
    return {
        "schema": chunks.SCHEMA_VERSION,
        "report": spec.ref,
        "title": plain(spec.config.title, 120),
        "seed": spec.config.seed,
        "views": ["latents", "latent", "judge", *(view for view, is_there in there.items() if is_there)],
        "compare": compared,
        "labelShard": chunks.LABEL_SHARD,
        "saes": [
            {
                "key": inputs.key,
                "name": shown.name,
                "nLatents": inputs.latents.num_rows,
                "nRows": int(inputs.statistics["n_rows"]),
                "hasText": _has_text(inputs),
                "nPassages": n_passages[inputs.key],
                "perChunk": pages[inputs.key].latents_per_chunk,
                "hasMap": mapped[inputs.key],
                "columns": list(pages[inputs.key].columns),
                "index": pages[inputs.key].index,
                "edges": [float(edge) for edge in inputs.statistics["histogram_edges"]],
                "groups": plain(str(inputs.statistics.get("group_population") or "")),
                "misses": plain(str(inputs.statistics.get("near_miss_population") or "")),
                "association": plain(str(inputs.statistics.get("association") or "")),
                "positionEdges": list(inputs.statistics.get("position_edges") or []),
                "positionRows": list(inputs.statistics.get("position_rows") or []),
                "logits": plain(_logits_text(inputs.statistics)),
            }
            for inputs, shown in zip(saes, overviews, strict=True)
        ],
    }


def _has_text(inputs: SAEInputs) -> bool:
    """False for given activations, whose rows are no tokens."""
    return bool(inputs.statistics.get("has_text", True))


def _shown_lineage(lineage: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "role": plain(str(step.get("role", "")), 60),
            "title": plain(str(step.get("title", ""))),
            "ref": plain(str(step.get("ref") or "")),
            "main": bool(step.get("main", True)),
            "facts": [(plain(str(name), 60), plain(_fact(value))) for name, value in (step.get("facts") or {}).items()],
        }
        for step in lineage
    ]


def _logits_text(statistics: dict[str, Any]) -> str:
    """What the logit effects are, or why there are none."""
    return str(statistics.get("logits") or statistics.get("no_logits_because") or "no direct path to the logits")


def _fact(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return decimal(value) if isinstance(value, float) else str(value)


def _write_manifest(folder: Path, spec: ReportSpec) -> None:
    """manifest.json: every file of the report but itself."""
    files = [
        {
            "name": path.relative_to(folder).as_posix(),
            "n_bytes": path.stat().st_size,
            "xxh3": xxhash.xxh3_64_hexdigest(path.read_bytes()),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    manifest = {"schema": chunks.SCHEMA_VERSION, "report": spec.ref, "inputs": spec.inputs, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
