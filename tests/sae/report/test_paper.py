"""A latent on paper: one page, and what was left out is said."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.sae.report.latent_numbers import latents_of

pytestmark = pytest.mark.browser

MARGIN = dict.fromkeys(("top", "bottom", "left", "right"), "12.7mm")
"""Half an inch, what browsers print with."""


def n_pages(pdf: bytes) -> int:
    return len(re.findall(rb"/Type\s*/Page\b(?!s)", pdf))


def with_full_data(folder: Any) -> list[int]:
    """Latents of the first SAE that have everything a page can show."""
    filled = ("tokens", "previous_tokens", "syntax", "coactive", "neighbours", "neurons", "logits_up", "logits_down")
    rows = [row for row in latents_of(folder) if row["sae"] == "large"]
    return [row["latent"] for row in rows if row["n_fired"] >= 100 and all(row[name] for name in filled)]


@pytest.mark.slow
@pytest.mark.parametrize("paper", ["A4", "Letter"])
def test_a_latent_with_everything_fits_one_page(paper: str, whole_report: Any, visit: Callable[..., Any]) -> None:
    candidates = with_full_data(whole_report.folder)
    assert len(candidates) > 100
    labelled = next(latent for latent in candidates if latent < 60 and latent % 8 in (2, 4, 6))
    visited = visit(whole_report.folder)
    for latent in [labelled, *np.random.default_rng(0).permutation(candidates)[:5].tolist()]:
        page = visited.open(f"#/s/large/latent/{latent}")
        page.wait_for_selector(".elsewhere dd:not(:text-is('…'))")
        page.wait_for_selector(".peers .rule code")
        assert n_pages(page.pdf(format=paper, margin=MARGIN)) == 1, latent
        page.goto("about:blank")


def test_contexts_left_out_are_counted(whole_report: Any, visit: Callable[..., Any]) -> None:
    page = visit(whole_report.folder).open("#/s/large/latent/17")
    assert page.locator(".on-paper >> visible=true").count() == 0
    assert page.locator("[data-group] li >> visible=true").count() == 50
    page.emulate_media(media="print")
    page.wait_for_selector("p.on-paper >> nth=0", state="visible")
    for group in page.query_selector_all("[data-group]"):
        shown = [item.is_visible() for item in group.query_selector_all("li")]
        n_shown = sum(shown)
        assert 0 < n_shown < len(shown)
        assert all(shown[:n_shown])
        assert group.query_selector("p.on-paper").inner_text() == f"{len(shown) - n_shown} more in the report"


def test_a_context_on_paper_keeps_its_peak_and_says_where_it_was_cut(
    whole_report: Any, visit: Callable[..., Any]
) -> None:
    page = visit(whole_report.folder).open("#/s/large/latent/17")
    page.emulate_media(media="print")
    line = page.locator("[data-group=top] .context").first
    tokens = line.locator(".t")
    visible = line.locator(".t >> visible=true")
    assert tokens.count() == 32
    assert visible.count() == 16
    assert line.locator(".t.peak").is_visible()
    assert line.inner_text().count("…") == 2


def test_an_embedded_latent_is_printed_alike(whole_report: Any, visit: Callable[..., Any]) -> None:
    page = visit(whole_report.folder).open("#/s/large/embed/latent/17")
    page.wait_for_selector(".peers .rule code")
    assert n_pages(page.pdf(format="A4", margin=MARGIN)) == 1
