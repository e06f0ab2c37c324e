"""A report inside a notebook: static HTML with inline styles and no script, which every notebook shows, or a frame.

from sae.report.notebook import open_report

report = open_report("runs/reports/0123456789abcdef")
report                 # what is in it
report.latent(1043)    # one latent with its contexts
report.show(1043)      # its page in a frame, from a server on this machine; report.show(): the whole report
"""

import functools
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sae.report.display import Segment, plain, show_tokens
from sae.report.finished import FinishedReport, open_finished
from sae.report.loopback import address_of
from sae.report.numbers import decimal, percent, short, wilson
from sae.report.rules import latent_label

TITLES = {
    "top": "Strongest",
    "q3": "75–100 %",
    "q2": "50–75 %",
    "q1": "25–50 %",
    "q0": "0–25 %",
    "random": "Random firings",
    "miss": "Near misses",
}
_STEPS = ("#fff1de", "#fce0be", "#facf9e", "#f7bc7d", "#f4a95a", "#f1952f")
"""Colours of sae/report/site/style/base.css; dark text on each of them is readable in dark notebooks too."""


class Html(str):
    """A piece of HTML that a notebook shows as such."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        return str(self)


@dataclass(frozen=True)
class OpenReport:
    """A report that was rendered; what it shows is read from its tables when asked for."""

    report: FinishedReport

    def latent(self, number: int, *, sae: str | None = None, n_contexts: int = 5) -> Html:
        """One latent: its rule, how often it fires, and up to `n_contexts` contexts of every group.

        Args:
            sae: its name or key in the report; None: the first one.

        Raises: ConfigError when the report has no such SAE or latent.
        """
        known = self.report.sae(sae)
        self.report.check_latent(known, number)
        row = self._rows("latents", known["key"], number)[0]
        label = latent_label(row)
        examples = self._rows("examples", known["key"], number)
        return Html(
            _pieces().latent(
                id=number,
                sae=known["name"],
                label=label,
                firing=_firing(row, known["nRows"]),
                groups=[
                    {"title": title, "note": _note(group, row), "contexts": contexts}
                    for group, title in TITLES.items()
                    if (
                        contexts := [
                            _context(example, row["max_act"])
                            for example in examples
                            if example["group"] == group and example["rank"] < n_contexts
                        ]
                    )
                ],
            )
        )

    def show(self, latent: int | None = None, *, sae: str | None = None, height: int = 640) -> Html:
        """The report, or one latent of it, in a frame: all that the page can do, in the notebook.

        A thread of this process serves the folder on 127.0.0.1, so the browser must run on the kernel's machine: behind
        a remote kernel (JupyterHub, Colab, ssh) the frame stays empty, and `latent` is the way. When the kernel
        ends, so does the server; the frames of a saved notebook are empty until they are run again.

        Args:
            latent: None: the whole report.
            sae: whose latent, by name or key; None: the first one's.
            height: of the frame, in pixels.

        Raises: ConfigError when the report has no such SAE or latent; StoreError when it has no manifest.
        """
        known = self.report.sae(sae)
        view = "" if sae is None else f"#/s/{known['key']}"
        if latent is not None:
            self.report.check_latent(known, latent)
            view = f"#/s/{known['key']}/embed/latent/{latent}"
        address = f"{address_of(self.report)}/index.html{view}"
        return Html(_pieces().frame(title=self.report.summary["title"], address=address, height=height))

    def _repr_html_(self) -> str:
        columns = ["sae", "dead", "dense", "rule_kind"]
        with self._open("latents") as file:
            table = pq.read_table(file, columns=columns)
        rows = []
        for known in self.report.summary["saes"]:
            mine = table.filter(pc.equal(table["sae"], known["key"]))
            live = mine.num_rows - pc.sum(mine["dead"]).as_py()
            ruled = mine.num_rows - mine["rule_kind"].null_count
            rows.append(
                [
                    known["name"],
                    f"{mine.num_rows:,}",
                    f"{live:,}",
                    f"{pc.sum(mine['dense']).as_py():,}",
                    f"{ruled:,} ({percent(ruled / live)} of the live)" if live else "0",
                ]
            )
        return str(
            _pieces().report(
                title=self.report.summary["title"],
                columns=["SAE", "latents", "live", "dense", "with a rule of P .5"],
                rows=rows,
                address=self.report.storage.uri(f"{self.report.folder}/index.html"),
            )
        )

    def _rows(self, table: str, key: str, latent: int) -> list[dict[str, Any]]:
        with self._open(table) as file:
            found = pq.read_table(file, filters=[("sae", "=", key), ("latent", "=", latent)])
        return list(found.to_pylist())

    def _open(self, table: str) -> Any:
        storage = self.report.storage
        return storage.fs.open(storage.full(f"{self.report.folder}/tables/{table}.parquet"), "rb")


def open_report(uri: str) -> OpenReport:
    """A report for a notebook.

    Args:
        uri: the artefact (root/reports/fingerprint), anything inside it, or a copy of its folder.

    Raises: StoreError when there is no finished report.
    """
    return OpenReport(open_finished(uri))


@functools.cache
def _pieces() -> Any:
    """The macros of notebook.html.j2."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["decimal"] = decimal
    text = (resources.files("sae.report") / "site/notebook.html.j2").read_text(encoding="utf-8")
    return environment.from_string(text).module


def _firing(row: dict[str, Any], n_rows: int) -> str:
    low, high = wilson(row["n_fired"], n_rows)
    if row["dead"]:
        return f"Never fired in {n_rows:,} rows (95 % upper bound {high:.1e})."
    return (
        f"Fires on {percent(row['frequency'])} ({percent(low)} to {percent(high)}; {row['n_fired']:,} of {n_rows:,}), "
        f"mean {decimal(short(row['mean_act']))}, max {decimal(short(row['max_act']))}."
    )


def _note(group: str, row: dict[str, Any]) -> str:
    if group == "miss":
        return "its most frequent token, on which it does not fire"
    bounds = {
        "q3": (row["q75"], row["max_act"]),
        "q2": (row["q50"], row["q75"]),
        "q1": (row["q25"], row["q50"]),
        "q0": (0.0, row["q25"]),
    }
    return f"{decimal(bounds[group][0])} to {decimal(bounds[group][1])}" if group in bounds else ""


def _context(example: dict[str, Any], maximum: float) -> dict[str, Any]:
    tokens = []
    shown: list[list[Segment]] = show_tokens(example["token_bytes"])
    for index, (segments, value) in enumerate(zip(shown, example["activations"], strict=True)):
        style = ""
        if value > 0 and maximum > 0:
            step = int(np.clip(np.ceil(len(_STEPS) * value / maximum), 1, len(_STEPS)))
            style = f";background:{_STEPS[step - 1]};color:#1b1f24;border-bottom:2px solid #b5651d"
        if index == example["peak"]:
            style += ";font-weight:bold"
        title = f"{decimal(short(value))}" if value > 0 else "silent"
        tokens.append({"segments": segments, "style": style, "title": title})
    where = f"{plain(example['doc_name'] or '', 120)}, {example['split']}, context {example['seq']}:{example['pos']}"
    return {"value": decimal(short(example["value"])), "where": where, "tokens": tokens}
