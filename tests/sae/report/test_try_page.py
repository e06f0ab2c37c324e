"""The view "Try it" from file://: stored passages and words, no model."""

import re
from collections.abc import Callable
from typing import Any

import pyarrow.parquet as pq
import pytest

from sae.report.inputs import open_inputs

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def passages(report: Any) -> list[dict[str, Any]]:
    with open_inputs(report.storage, report.spec) as (inputs,):
        return pq.read_table(inputs.passages).to_pylist()


def listed(page: Any) -> list[int]:
    """Latents beside the text."""
    return page.eval_on_selector_all(".on-token [data-latent]", "all => all.map(b => Number(b.dataset.latent))")


def painted(page: Any) -> list[int]:
    """Positions of painted tokens."""
    return page.eval_on_selector_all(".reading [class*=' a']", "all => all.map(t => Number(t.dataset.i))")


def test_journey_through_a_passage_with_the_keyboard(
    report: Any, visit: Callable[..., Any], passages: list[dict[str, Any]]
) -> None:
    page = visit(report.folder).open()
    page.click("nav >> text=Try it")
    page.wait_for_selector(".reader .firing li")
    assert page.locator(".choose option").count() == len(passages)
    page.select_option(".choose select", "2")
    passage = passages[2]
    page.wait_for_function("n => document.querySelectorAll('.reading .t').length === n", arg=len(passage["token_ids"]))
    page.focus(".reading")
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    start = next(i for i in range(40) if passage["latents"][8 * i] >= 0)
    stored = [latent for latent in passage["latents"][8 * (start + 5) : 8 * (start + 6)] if latent >= 0]
    assert listed(page) == stored
    page.keyboard.press("Enter")
    page.keyboard.press("Home")
    assert listed(page) == stored, "a pinned token stays"

    latent = stored[0]
    page.click(f".on-token [data-latent='{latent}']")
    expected = [i for i in range(40) if latent in passage["latents"][8 * i : 8 * i + 8]]
    page.wait_for_function("() => document.querySelector(\".reading [class*=' a']\")")
    assert painted(page) == expected
    assert page.get_attribute(f".on-token [data-latent='{latent}']", "aria-pressed") == "true"
    assert re.search(rf"p=2.*latent={latent}$", page.url)
    address = page.url.partition("#")[2]
    page.click(f".on-token [href$='latent/{latent}']")
    page.wait_for_selector(f"h1:text-is('Latent {latent}')")
    page.go_back()
    page.wait_for_selector(".reader")
    page.wait_for_function("() => document.querySelector(\".reading [class*=' a']\")")
    assert page.url.partition("#")[2] == address
    assert painted(page) == expected
    page.click("text=clear")
    page.wait_for_function("() => !document.querySelector(\".reading [class*=' a']\")")


def test_words_are_looked_up_and_say_that_no_model_ran(report: Any, visit: Callable[..., Any]) -> None:
    page = visit(report.folder).open("#/try")
    page.fill("textarea", "self \u6f22\u5b57")
    page.press("textarea", "Control+Enter")
    page.wait_for_selector(".words div")
    assert "no model was run" in page.text_content(".banner")
    terms = page.eval_on_selector_all(".words dt", "all => all.map(t => t.textContent)")
    assert terms[0] == "self"
    found = page.eval_on_selector_all(".words div:first-child .found a", "all => all.map(a => Number(a.textContent))")
    table = pq.read_table(report.folder / "tables/latents.parquet").to_pylist()
    prefer = {
        row["latent"]
        for row in table
        for raw, precision, lift in zip(row["token_bytes"], row["token_precision"], row["token_lift"], strict=True)
        if raw.strip() == b"self" and precision >= 0.1 and lift >= 2
    }
    assert found
    assert set(found) <= prefer
    assert len(found) == min(8, len(prefer))
    assert "no latent prefers" in page.text_content(".words div:last-child")
    assert page.locator("#steer").count() == 0


def test_given_activations_say_why_there_is_nothing(sweep_report: Any, visit: Callable[..., Any]) -> None:
    page = visit(sweep_report.folder).open("#/s/toy/try")
    assert "given without text" in page.text_content("#view")
    page.goto(f"{page.url.partition('#')[0]}#/try?p=99999&latent=99999999")
    page.wait_for_selector(".reader .firing li")


def test_hostile_passages_are_text(hostile_report: Any, visit: Callable[..., Any]) -> None:
    page = visit(hostile_report.folder).open("#/try")
    page.fill("textarea", "<img src=x onerror=window.PWN=1> </script>")
    page.click("text=Look up")
    page.wait_for_selector(".words div")
    for number in range(page.locator(".choose option").count()):
        page.select_option(".choose select", str(number))
        page.wait_for_selector(".reader")
    assert page.evaluate("typeof window.PWN") == "undefined"
    assert page.locator("#view img, #view script, #view iframe").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_narrow_screen(report: Any, visit: Callable[..., Any], scheme: str) -> None:
    page = visit(report.folder, viewport={"width": 390, "height": 800}, color_scheme=scheme).open("#/try")
    page.wait_for_selector(".reader .firing li")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
