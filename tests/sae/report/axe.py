"""axe, the checker of accessibility, on views of a report."""

import json
from importlib import resources
from typing import Any

import pytest

MORE_OF_THE_SAME = [".contexts li:nth-child(n + 4)", ".pair-list tbody tr:nth-child(n + 9)", ".row:nth-child(n + 9)"]
"""Left out: axe takes seconds for a thousand tokens."""


def found_by_axe(page: Any) -> list[str]:
    """What axe calls serious or critical: rule, place, and what is wrong."""
    # Without preload: it would fetch the stylesheet, which file:// forbids.
    options = {"resultTypes": ["violations"], "preload": False, "rules": {"target-size": {"enabled": True}}}
    found = page.evaluate("([of, options]) => axe.run(of, options)", [{"exclude": MORE_OF_THE_SAME}, options])
    return [
        f"{one['id']} {node['target']} {node['failureSummary']}"
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


def assert_accessible(page: Any, views: dict[str, str]) -> None:
    """Nothing serious in any view, nor in the list of keys.

    Args:
        page: of playwright, on the report.
        views: the address of each view, and what is there when it is complete.
    """
    pytest.importorskip("axe_playwright_python", reason="axe is not installed")
    page.evaluate((resources.files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8"))
    problems = {}
    for address, there in views.items():
        page.evaluate("hash => location.hash = hash", address)
        page.wait_for_selector(there, state="visible")
        problems[address] = found_by_axe(page)
    page.keyboard.press("?")
    problems["help"] = found_by_axe(page)
    assert {where: found for where, found in problems.items() if found} == {}, json.dumps(problems, indent=1)
