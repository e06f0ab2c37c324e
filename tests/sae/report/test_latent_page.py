"""The latent page in a real browser: every number beside its table, every state said in words."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sae.report.display import flat, show_tokens
from sae.report.numbers import decimal
from tests.sae.report.latent_numbers import assert_numbers, examples_of, latents_of

pytestmark = pytest.mark.browser

N_ROWS = 200_000


@pytest.mark.slow
def test_numbers_of_fifty_random_latents_equal_the_table(report: Any, visit: Callable[..., Any]) -> None:
    table = latents_of(report.folder)
    page = visit(report.folder).open("#/latent/0")
    for latent in np.random.default_rng(1).permutation(300)[:50].tolist():
        assert_numbers(page, report.folder, table[latent], N_ROWS)


def test_near_misses_name_the_token_and_are_silent_at_it(report: Any, visit: Callable[..., Any]) -> None:
    table = latents_of(report.folder)
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
    example = examples_of(report.folder, 17, "top")[0]
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
    example = examples_of(report.folder, 17, "top")[0]
    raw = example["token_bytes"][example["peak"]]
    wanted = {
        row["latent"]
        for row in latents_of(report.folder)
        for token, precision, lift in zip(row["token_bytes"], row["token_precision"], row["token_lift"], strict=True)
        if token == raw and precision >= 0.1 and lift >= 2
    }
    page = visit(report.folder).open("#/latent/17")
    page.click("[data-group=top] .t.peak >> nth=0")
    page.wait_for_selector("#n-results")
    assert page.text_content("#n-results") == f"{len(wanted)} of 300"
    assert 17 in wanted


def test_copying_gives_the_text_of_the_corpus(report: Any, visit: Callable[..., Any]) -> None:
    example = examples_of(report.folder, 17, "top")[0]
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
