"""The latent page in a real browser: every number beside its table, every state said in words."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from sae.report.display import flat, show_tokens
from sae.report.numbers import decimal, percent, short, wilson

pytestmark = pytest.mark.browser

N_ROWS = 200_000


def latents_of(report: Any) -> list[dict[str, Any]]:
    return pq.read_table(report.folder / "tables/latents.parquet").to_pylist()


def examples_of(report: Any, latent: int, group: str) -> list[dict[str, Any]]:
    rows = pq.read_table(report.folder / "tables/examples.parquet", filters=[("latent", "=", latent)]).to_pylist()
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


def test_numbers_of_fifty_random_latents_equal_the_table(report: Any, visit: Callable[..., Any]) -> None:
    table = latents_of(report)
    page = visit(report.folder).open("#/latent/0")
    for latent in np.random.default_rng(1).permutation(300)[:50].tolist():
        go(page, latent)
        row, found = table[latent], page.evaluate(READ)
        assert found["pairs"]["fires on"] == percent(row["frequency"])
        assert found["pairs"]["firings"] == f"{row['n_fired']:,} of {N_ROWS:,}"
        assert found["neighbours"] == [
            [str(other), decimal(short(cosine), 2)]
            for other, cosine in zip(row["neighbours"], row["neighbour_cosines"], strict=True)
        ]
        assert found["up"] == [decimal(short(value), 2) for value in row["logits_up_values"]]
        signed = [f"{'−' if w < 0 else '+'}{decimal(short(abs(w)), 2)}" for w in row["neuron_weights"]]
        assert found["neurons"] == signed
        if row["dead"]:
            continue
        low, high = wilson(row["n_fired"], N_ROWS)
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
            assert found["values"] == [
                decimal(short(example["value"])) for example in examples_of(report, latent, "top")
            ]


def test_near_misses_name_the_token_and_are_silent_at_it(report: Any, visit: Callable[..., Any]) -> None:
    table = latents_of(report)
    page = visit(report.folder).open("#/latent/17")
    token = flat(show_tokens(table[17]["token_bytes"][:1])[0])
    heading = page.text_content("[data-group=miss] h2")
    assert heading.startswith(f"Near misses: {token}, silent")
    peaks = page.eval_on_selector_all("[data-group=miss] .t.peak", "spans => spans.map(s => [s.textContent, s.title])")
    assert peaks
    assert all(text == token and f"{token}  silent" in title for text, title in peaks)


def test_a_near_duplicate_is_announced_with_a_link(report: Any, visit: Callable[..., Any]) -> None:
    page = visit(report.folder).open("#/latent/11")
    banner = page.text_content(".banner")
    assert "Nearly a duplicate of latent 12" in banner
    assert ".970" in banner
    page.click(".banner a")
    page.wait_for_selector("h1:text-is('Latent 12')")


def test_width_and_scale_are_kept_in_the_address(report: Any, visit: Callable[..., Any]) -> None:
    page = visit(report.folder).open("#/latent/17")
    lengths = "() => [...document.querySelectorAll('.contexts li')].map(li => li.querySelectorAll('.t').length)"
    assert max(page.evaluate(lengths)) == 32
    page.keyboard.press("w")
    assert max(page.evaluate(lengths)) == 16
    assert "w=16" in page.url
    page.click("text=scale each row")
    assert "scale=row" in page.url
    page.reload()
    page.wait_for_selector(".contexts .t")
    assert max(page.evaluate(lengths)) == 16
    strongest = "() => [...document.querySelectorAll('[data-group=q0] li')].map(li => !!li.querySelector('.a6'))"
    assert all(page.evaluate(strongest))


def test_hovering_a_token_marks_its_activation_and_says_what_it_is(report: Any, visit: Callable[..., Any]) -> None:
    example = examples_of(report, 17, "top")[0]
    page = visit(report.folder).open("#/latent/17")
    page.hover("[data-group=top] .t.peak >> nth=0")
    text = page.text_content(".readout")
    raw = example["token_bytes"][example["peak"]]
    assert f"token {example['token_ids'][example['peak']]} · bytes {raw.hex(' ')}" in text
    assert f"position {example['pos']} of context {example['seq']}" in text
    assert page.get_attribute(".histogram .pointed", "visibility") == "visible"
    page.focus("[data-group=top] .context >> nth=0")
    page.keyboard.press("ArrowLeft")
    assert f"position {example['pos'] - 1} of" in page.text_content(".readout")


def test_a_click_on_a_token_lists_the_latents_that_prefer_it(report: Any, visit: Callable[..., Any]) -> None:
    example = examples_of(report, 17, "top")[0]
    raw = example["token_bytes"][example["peak"]]
    wanted = {
        row["latent"]
        for row in latents_of(report)
        for token, precision, lift in zip(row["token_bytes"], row["token_precision"], row["token_lift"], strict=True)
        if token == raw and precision >= 0.1 and lift >= 2
    }
    page = visit(report.folder).open("#/latent/17")
    page.click("[data-group=top] .t.peak >> nth=0")
    page.wait_for_selector("#n-results")
    assert page.text_content("#n-results") == f"{len(wanted)} of 300"
    assert 17 in wanted


def test_copying_gives_the_text_of_the_corpus(report: Any, visit: Callable[..., Any]) -> None:
    example = examples_of(report, 17, "top")[0]
    page = visit(report.folder, permissions=["clipboard-read", "clipboard-write"]).open("#/latent/17")
    page.hover("[data-group=top] li >> nth=0")
    page.click("[data-group=top] .copy button >> nth=0")
    page.wait_for_selector("text=copied")
    text = b"".join(example["token_bytes"]).decode(errors="replace")
    assert page.evaluate("navigator.clipboard.readText()") == text
    page.click("[data-group=top] .copy button >> nth=1")
    page.wait_for_function("t => navigator.clipboard.readText().then(found => found !== t)", arg=text)
    peak = example["token_bytes"][example["peak"]].decode(errors="replace")
    assert f"{peak}‹{decimal(example['value'])}›" in page.evaluate("navigator.clipboard.readText()")


def test_narrow_pages_put_the_statistics_under_the_strongest_contexts(report: Any, visit: Callable[..., Any]) -> None:
    page = visit(report.folder, viewport={"width": 390, "height": 844}).open("#/latent/17")
    top = "s => document.querySelector(s).getBoundingClientRect().top"
    assert (
        page.evaluate(top, "[data-group=top]")
        < page.evaluate(top, ".latent aside")
        < page.evaluate(top, "[data-group=q3]")
    )
    assert page.evaluate("document.documentElement.scrollWidth <= 390")
