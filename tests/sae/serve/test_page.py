"""The page with its server: any text, and steering, in a real browser."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.browser

TEXT = "def f"
LIVE = "#view > section:first-of-type"
"""Where the typed text's latents are shown; stored passages are further down."""
REFUSED = re.compile("Failed to load resource: the server responded with a status of (422|503)")
"""Chromium writes every refusal to the console."""


@pytest.fixture
def visit(browser: Any, server: Any) -> Iterator[Callable[..., Any]]:
    """`visit(address)`: a page of the server; anything that should not happen fails the test."""
    problems: list[str] = []
    contexts = []

    def open_page(address: str = "", **options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: REFUSED.match(message.text) or problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("request", lambda one: one.url.startswith((f"{server.url}/", "data:")) or problems.append(one.url))
        page.goto(f"{server.url}/{address}")
        page.wait_for_selector("#view h1, #overview:not([hidden]) h1", state="visible")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def texts(page: Any, selector: str) -> list[str]:
    return page.eval_on_selector_all(selector, "all => all.map(one => one.textContent)")


def test_any_text_is_encoded_and_painted(visit: Callable[..., Any], server: Any) -> None:
    page = visit()
    page.click("nav >> text=Try it")
    page.fill("[aria-label=Text]", TEXT)
    page.press("[aria-label=Text]", "Control+Enter")
    page.wait_for_selector(f"{LIVE} .firing li")
    answer = server.post("latents", text=TEXT, sae="live", top=8).json
    assert texts(page, f"{LIVE} .reading .t")[1:] == list(TEXT)
    page.focus(".reading >> nth=0")
    page.keyboard.press("End")
    shown = page.eval_on_selector_all(
        ".on-token >> nth=0 >> [data-latent]", "all => all.map(b => [Number(b.dataset.latent), b.textContent])"
    )
    assert [latent for latent, _ in shown] == [latent for latent, _ in answer["tokens"][-1]["top"]]
    latent = shown[0][0]
    page.click(f".on-token >> nth=0 >> [data-latent='{latent}']")
    page.wait_for_function("() => document.querySelector(\".reading [class*=' a']\")")
    values = server.post("latent", text=TEXT, sae="live", latent=latent).json["values"]
    painted = page.eval_on_selector_all(f"{LIVE} .reading [class*=' a']", "all => all.map(t => Number(t.dataset.i))")
    assert painted == [i for i, value in enumerate(values) if value > 0]
    page.focus(".reading >> nth=0")
    page.keyboard.press("Home")
    assert "not trained" in page.text_content(".on-token >> nth=0")


def test_a_latent_is_steered_from_its_page(visit: Callable[..., Any], server: Any) -> None:
    page = visit("#/s/live/latent/20")
    page.click("text=steer this latent")
    page.wait_for_selector(".intervention")
    assert page.input_value("[aria-label=latent]") == "20"
    page.select_option(".intervention select", "scale")
    page.fill("[aria-label='strength as a number']", "1")
    page.fill("[aria-label=Prompt]", TEXT)
    page.fill("[name=n]", "6")
    page.click("text=Generate")
    page.wait_for_selector(".verdict")
    assert page.text_content(".verdict").startswith("No difference")
    assert page.locator(".differs").count() == 0

    page.select_option(".intervention select", "clamp")
    with page.expect_request("**/api/generate") as sent:
        page.fill("[aria-label='strength as a number']", "6")
        page.click("text=another latent")
        page.fill("[aria-label=latent] >> nth=1", "21")
        page.select_option(".intervention >> nth=1 >> select", "ablate")
        page.press("[aria-label=Prompt]", "Control+Enter")
    page.wait_for_function("() => document.querySelector('.verdict')?.textContent.startsWith('The texts differ')")
    asked = json.loads(sent.value.post_data)
    assert [one["mode"] for one in asked["interventions"]] == ["clamp", "ablate"]
    answer = server.post("generate", **asked).json
    for number, side in enumerate(("plain", "steered")):
        expected = [token["differs"] for token in answer[side]["tokens"]]
        marked = page.eval_on_selector_all(
            f".outcome section:nth-child({number + 1}) .t:not(.given)", "all => all.map(t => t.matches('.differs'))"
        )
        assert marked == expected
    page.focus(".outcome .reading >> nth=1")
    assert "probability" in page.text_content(".outcome .readout")
    page.click("[aria-label='remove this intervention'] >> nth=1")
    assert page.locator(".intervention").count() == 1


def test_refusals_and_a_busy_server_are_said(visit: Callable[..., Any]) -> None:
    page = visit("#/s/live/try")
    page.fill("[aria-label=Text]", "too long for a context of sixteen")
    page.click("text=Encode")
    page.wait_for_selector(".state.failed")
    assert "34 tokens, the context takes 16" in page.text_content(".state.failed")
    busy = {"error": {"what": "32 requests wait already", "where": "server", "do": "Try again"}}
    answers = iter([503])

    def answer(route: Any) -> None:
        if status := next(answers, None):
            route.fulfill(status=status, headers={"Retry-After": "1"}, json=busy)
        else:
            route.continue_()

    page.route("**/api/latents", answer)
    page.fill("[aria-label=Text]", TEXT)
    page.click("text=Encode")
    page.wait_for_function("() => document.querySelector('.state').textContent.includes('trying again in 1 s')")
    page.wait_for_selector(f"{LIVE} .firing li")
    assert page.text_content(".state") == ""
    assert page.locator(".state.failed").count() == 0


def test_an_sae_without_a_model_says_so(visit: Callable[..., Any]) -> None:
    page = visit("#/s/given/try")
    page.wait_for_selector("#view :text('no model to run')")
    assert page.locator("#steer, [aria-label=Text]").count() == 0
    page.goto(f"{page.url.partition('#')[0]}#/s/given/latent/1")
    page.wait_for_selector("h1:text-is('Latent 1')")
    assert page.locator("text=steer this latent").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_narrow_screen(visit: Callable[..., Any], scheme: str) -> None:
    page = visit("#/s/live/try?latent=3", viewport={"width": 390, "height": 800}, color_scheme=scheme)
    page.wait_for_selector(".intervention")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
