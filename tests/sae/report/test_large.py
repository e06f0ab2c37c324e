"""Budgets of a large report, in bytes, and the walk through it. `make bench` prints times: they depend on a machine."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.sae.report.walk import Walk

KB = 1000
SIZES = [(2_048, 256), pytest.param((65_536, 4_096), marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=SIZES, ids=lambda sizes: f"{sizes[0]}")
def large(request: pytest.FixtureRequest, render: Callable[..., Any]) -> Any:
    """A report on a large SAE and a smaller one, files of the usual size."""
    n_latents, n_other = request.param
    return render(whole=True, n_latents=n_latents, n_other=n_other, chunk_bytes=256 << 10)


def sizes_of(folder: Path, pattern: str) -> list[int]:
    found = [path.stat().st_size for path in folder.glob(pattern)]
    assert found, pattern
    return found


def test_the_first_view_is_small(large: Any) -> None:
    html = (large.folder / "index.html").read_text()
    named = re.findall(r'<(?:link rel="stylesheet" href|script src)="(assets/[^"]+)"', html)
    assert len(named) == 2
    script = next(large.folder / name for name in named if name.endswith(".js"))
    assert script.stat().st_size <= 120 * KB
    first_view = len(html.encode()) + sum((large.folder / name).stat().st_size for name in named)
    assert first_view <= 400 * KB
    summary = html.split('id="summary">')[1].split("</script>")[0]
    assert len(summary.encode()) < 100 * KB


def test_no_file_of_data_is_large(large: Any) -> None:
    saes = large.folder / "data"
    assert max(sizes_of(saes, "*/latents/*.js")) <= 300 * KB
    assert max(sizes_of(saes, "*/index/*/*.js")) <= 128 << 10
    assert max(sizes_of(saes, "*/labels/*.js")) <= 1000 * KB
    assert max(sizes_of(saes, "**/*.js")) <= 1000 * KB


@pytest.mark.browser
@pytest.mark.slow
def test_journey(large: Any, visit: Callable[..., Any]) -> None:
    Walk(visit(large.folder).open()).go()
