"""A few latents of a finished report as one HTML file that asks for nothing, to be mailed.

The page is the report's own: its script, its stylesheet, its overview. What leads to other files is taken out, and the
data of the chosen latents stands in the page as the data files hold it: in base64, which cannot close a script.
"""

import base64
import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import escape

from sae.errors import ConfigError, StoreError
from sae.report import chunks
from sae.report.finished import FinishedReport

MAX_LATENTS = 200
"""A latent takes 5 kB; mail takes a few megabytes."""
DEFAULT_LATENTS = 30
"""Of every SAE, as long as there is room."""
_POLICY = (
    "default-src 'none'; script-src '{script}'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)
_VIEWS = ["latents", "latent"]
_NO_INDEX = "this file has no index of all words"
_UNKNOWN = [0, [], [], []]
"""A row of the labels for latents that are not in the file and not named in it."""
_ELSEWHERE = re.compile(r"<!--folder-->.*?<!--/folder-->", re.DOTALL)
_STYLE = re.compile(r'<link rel="stylesheet" href="(assets/[^"]+)">')
_SCRIPT = re.compile(r'<script src="(assets/[^"]+)"></script>')
_CSP = re.compile(r'(<meta http-equiv="Content-Security-Policy" content=")[^"]*(">)')
_SUMMARY = re.compile(r'<script type="application/json" id="summary">.*?</script>', re.DOTALL)
_HEADING = re.compile(r'(<div id="overview">\s*<h1[^>]*>[^<]*</h1>)')


def single_file(report: FinishedReport, latents: Sequence[int] | None = None, *, sae: str | None = None) -> str:
    """The page of a few latents: overview, list, and a page for each of them. The same report gives the same text.

    Args:
        latents: at most MAX_LATENTS; None: of every SAE the first live ones of the report's random order.
        sae: whose latents, by name or key; None: the first SAE's.

    Raises: ConfigError when the report has no such latent or they are too many; StoreError when a file of the report is
        missing or damaged, or its page is of an earlier version.
    """
    chosen = _chosen(report, latents, sae)
    data: dict[str, str] = {}
    saes = []
    for one in report.summary["saes"]:
        mine = chosen.get(one["key"], [])
        data |= {key: chunks.encode_payload(payload) for key, payload in _payloads(report, one, mine)}
        saes.append(one | {"only": mine, "perChunk": 1, "index": {"off": _NO_INDEX}, "hasMap": False, "nPassages": 0})
    left_out = {"views": _VIEWS, "later": None, "vega": None, "compare": report.summary["compare"] | {"pairs": []}}
    return _page(report, report.summary | left_out | {"saes": saes}, data, _about(report, saes))


def _chosen(report: FinishedReport, latents: Sequence[int] | None, sae: str | None) -> dict[str, list[int]]:
    """Ids of the latents to show, ascending, by key of their SAE."""
    if latents is None:
        wanted = [report.sae(sae)] if sae is not None else report.summary["saes"]
        size = min(DEFAULT_LATENTS, MAX_LATENTS // len(wanted))
        return {one["key"]: _first_live(report, one, size) for one in wanted}
    known = report.sae(sae)
    found = sorted(set(latents))
    if not 0 < len(found) <= MAX_LATENTS:
        raise ConfigError(f"{len(found)} latents: one file holds 1 to {MAX_LATENTS}; the folder holds all")
    for number in found:
        report.check_latent(known, number)
    return {known["key"]: found}


def _first_live(report: FinishedReport, sae: dict[str, Any], size: int) -> list[int]:
    order = report.column(sae, "order")
    live = order[report.column(sae, "n_fired")[order] > 0]
    return sorted(live[:size].tolist())


def _payloads(report: FinishedReport, sae: dict[str, Any], latents: list[int]) -> Iterable[tuple[str, bytes]]:
    """Everything the page loads of the chosen latents, under the keys of the report's data files."""
    base = f"data/{sae['key']}"
    for name in sae["columns"]:
        yield f"{base}/col/{name}", chunks.encode_column(_kept(name, report.column(sae, name), latents))
    pages = []
    for file, numbers in itertools.groupby(latents, lambda number: number // sae["perChunk"]):
        chunk = report.json_chunk(f"{base}/latents/{file}")
        pages += [_alone(chunk, number) for number in numbers]
    for page in pages:
        yield f"{base}/latents/{page['start']}", chunks.encode_json(page)
    peers = {peer for page in pages for peer in _named(page["latents"][0])}
    shard_size = report.summary["labelShard"]
    for shard in range(-(-sae["nLatents"] // shard_size)):
        ids = range(shard * shard_size, min((shard + 1) * shard_size, sae["nLatents"]))
        rows = [_UNKNOWN for _ in ids]
        if needed := sorted(peers.union(latents).intersection(ids)):
            stored = report.json_chunk(f"{base}/labels/{shard}")
            for number in needed:
                row = stored[number - ids.start]
                # Of a neighbour its label; of what it fires on nothing.
                rows[number - ids.start] = row if number in latents else [row[0], [], [], [], *row[4:]]
        yield f"{base}/labels/{shard}", chunks.encode_json(rows)


def _kept(name: str, values: np.ndarray, latents: list[int]) -> np.ndarray:
    """A column in which the other latents are zero, which deflates to nothing; of the order only the chosen ones."""
    if name == "order":
        return values[np.isin(values, latents)]
    kept = np.zeros_like(values)
    kept[latents] = values[latents]
    return kept


def _alone(chunk: dict[str, Any], number: int) -> dict[str, Any]:
    """One latent of a file of latents as a file of its own, with the tokens that it uses."""
    latent = chunk["latents"][number - chunk["start"]]
    numbers: dict[int, int] = {}

    def new(token: int) -> int:
        return numbers.setdefault(token, len(numbers))

    groups = {
        name: [context | {"tokens": [new(token) for token in context["tokens"]]} for context in contexts]
        for name, contexts in latent["groups"].items()
    }
    counted = {name: [[new(row[0]), *row[1:]] for row in latent[name]] for name in ("tokens", "previous")}
    return {
        "schema": chunk["schema"],
        "start": number,
        "tokens": [chunk["tokens"][token] for token in numbers],
        "bytes": {index: chunk["bytes"][str(old)] for old, index in numbers.items() if str(old) in chunk["bytes"]},
        "latents": [latent | counted | {"groups": groups}],
    }


def _named(latent: dict[str, Any]) -> set[int]:
    """The other latents that a page shows with their labels."""
    return {row[0] for name in ("coactive", "neighbours") for row in latent[name]}


def _about(report: FinishedReport, saes: list[dict[str, Any]]) -> str:
    held = "; ".join(f"{len(one['only']):,} of the {one['nLatents']:,} latents of {one['name']}" for one in saes)
    return (
        f"One file of a report: it holds this overview and {held}. Left out are the other latents, the search index, "
        f"maps, comparisons, passages, judging and the tables. The whole report is {report.summary['report']}."
    )


def _page(report: FinishedReport, summary: dict[str, Any], data: dict[str, str], about: str) -> str:
    html = _ELSEWHERE.sub("", report.read("index.html").decode())
    style, script = (report.read(_only(report, asset, html)[1]).decode() for asset in (_STYLE, _SCRIPT))
    if "</style" in style.lower() or "</script" in script.lower() or "<!--" in script or '$("#inlined")' not in script:
        raise _earlier(report)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    pieces = (
        (_CSP, lambda found: f"{found[1]}{_POLICY.format(script=f'sha256-{digest}')}{found[2]}"),
        (_STYLE, lambda _: f"<style>{style}</style>"),
        (_SCRIPT, lambda _: f"<script>{script}</script>"),
        (_HEADING, lambda found: f'{found[1]}\n<p class="banner" id="one-file">{escape(about)}</p>'),
        (_SUMMARY, lambda _: f"{_json('summary', summary)}\n{_json('inlined', data)}"),
    )
    for pattern, piece in pieces:
        _only(report, pattern, html)
        html = pattern.sub(piece, html)
    return html


def _json(name: str, value: Any) -> str:
    return f'<script type="application/json" id="{name}">{htmlsafe_json_dumps(value)}</script>'


def _only(report: FinishedReport, pattern: re.Pattern[str], html: str) -> re.Match[str]:
    """The one place of a pattern in the page."""
    found = list(pattern.finditer(html))
    if len(found) != 1:
        raise _earlier(report)
    return found[0]


def _earlier(report: FinishedReport) -> StoreError:
    return StoreError(
        f"{report.storage.uri(report.folder)}/index.html: the page of another version. Render the report again: "
        f"sae-pipeline report --only report"
    )
