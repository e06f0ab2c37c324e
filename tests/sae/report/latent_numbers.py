"""Every number of a latent's page beside the report's tables."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sae.report.display import show_tokens
from sae.report.numbers import decimal, percent, short, wilson


def latents_of(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "tables/latents.parquet").to_pylist()


def examples_of(folder: Path, latent: int, group: str) -> list[dict[str, Any]]:
    rows = pq.read_table(folder / "tables/examples.parquet", filters=[("latent", "=", latent)]).to_pylist()
    return [row for row in rows if row["group"] == group]


def go(page: Any, latent: int) -> None:
    page.evaluate("id => location.hash = `#/latent/${id}`", latent)
    page.wait_for_selector(f"h1:text-is('Latent {latent}')")


READ = """() => {
  const text = (node) => node.textContent;
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const rows = (selector) => all(`${selector} tbody tr`).map((row) => [...row.children].map(text));
  const pairs = Object.fromEntries(all('.pairs > div').map((row) => [...row.children].map(text)));
  const peers = (title) => all('.peers').filter((list) => list.parentElement.textContent.startsWith(title))
    .flatMap((list) => all('li', list).map((row) => [text(row.querySelector('a')), ...all('.v', row).map(text)]));
  return {
    pairs, label: text(document.querySelector('.label-row')), tokens: rows('[data-counted=tokens]'),
    previous: rows("[data-counted='previous tokens']"), syntax: rows('[data-counted=syntax]'),
    together: peers('Fires together'), neighbours: peers('Neighbours'),
    up: all('.effects.up .v').map(text), neurons: all('.tags b').map(text),
    bars: all('.histogram .bar title').map(text), values: all('[data-group=top] .v').map(text),
  };
}"""


def shown_rows(row: dict[str, Any], what: str, names: list[str]) -> list[list[str]]:
    figures = [[decimal(short(v), 2) for v in row[f"{what}_{name}"]] for name in ("precision", "recall", "lift")]
    return [list(entry) for entry in zip(names, *figures, strict=True)]


def labels_of(tokens: list[bytes]) -> list[str]:
    return ["".join(part if isinstance(part, str) else part[0] for part in show_tokens([raw])[0]) for raw in tokens]


def assert_numbers(page: Any, folder: Path, row: dict[str, Any], n_rows: int) -> None:
    """What the page of a latent says equals its row of `latents.parquet`.

    Args:
        page: of playwright, on the report.
        folder: of the report.
        row: the latent's, with every column.
        n_rows: rows the statistics are of.
    """
    latent = row["latent"]
    go(page, latent)
    found = page.evaluate(READ)
    assert found["pairs"]["fires on"] == percent(row["frequency"])
    assert found["pairs"]["firings"] == f"{row['n_fired']:,} of {n_rows:,}"
    assert found["neighbours"] == [
        [str(other), decimal(short(cosine), 2)]
        for other, cosine in zip(row["neighbours"], row["neighbour_cosines"], strict=True)
    ]
    assert found["up"] == [decimal(short(value), 2) for value in row["logits_up_values"]]
    signed = [f"{'−' if w < 0 else '+'}{decimal(short(abs(w)), 2)}" for w in row["neuron_weights"]]
    assert found["neurons"] == signed
    if row["dead"]:
        return
    low, high = wilson(row["n_fired"], n_rows)
    assert found["pairs"]["95 % interval"] == f"{percent(low)} to {percent(high)}"
    assert found["pairs"]["mean, max"] == f"{decimal(short(row['mean_act']))}, {decimal(short(row['max_act']))}"
    assert found["tokens"] == shown_rows(row, "token", labels_of(row["token_bytes"]))
    assert found["previous"] == shown_rows(row, "previous", labels_of(row["previous_bytes"]))
    assert found["syntax"] == shown_rows(row, "syntax", row["syntax"])
    assert found["together"] == [
        [str(other), percent(short(share)), f"× {decimal(short(lift))}"]
        for other, share, lift in zip(row["coactive"], row["coactive_share"], row["coactive_lift"], strict=True)
    ]
    counts = [int(text.split()[0].replace(",", "")) for text in found["bars"] if text[0].isdigit()]
    assert counts == [n for n in row["histogram"] if n]
    at = [int(text.split(": ")[1].split()[0].replace(",", "")) for text in found["bars"] if text[0] == "p"]
    assert at == row["positions"]
    if row["rule_kind"]:
        figures = f"P {decimal(short(row['rule_precision']), 2)} R {decimal(short(row['rule_recall']), 2)}"
        assert found["label"].endswith(figures)
    else:
        assert found["label"] == "no rule reached P .5"
    if row["n_fired"] >= 5:
        assert found["values"] == [decimal(short(example["value"])) for example in examples_of(folder, latent, "top")]
