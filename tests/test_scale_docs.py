"""docs/scale.md shows what docs/scale.py computes."""

import runpy
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "scale.py"))


def test_the_table_is_the_scripts(script: dict[str, Any]) -> None:
    table = script["table"]({"10 TB": script["SMALL"], "10 PB": script["LARGE"]}, script["World"]())
    assert table in (DOCS / "scale.md").read_text()


def test_the_table_of_meshes_is_the_planners(script: dict[str, Any]) -> None:
    assert script["mesh_table"](script["TRAININGS"]) in (DOCS / "scale.md").read_text()


def test_what_a_store_of_eight_parts_takes(script: dict[str, Any]) -> None:
    # Eight parts of 2^17 rows of 8,204 bytes, in 32 row groups each.
    store = script["Store"](bytes=8 * 2**17 * (4096 * 2 + 12), workers=2)
    found = dict(script["figures"](store, script["World"](tokens_per_second=2**17, task_seconds=1)))
    assert found["vectors"] == "1.05e+06"
    assert found["parts, row groups"] == "8 of 1 GiB, 256 of 32 MiB"
    assert found["workers, time"] == "2, 4.0 s"
    assert found["requests that write"] == "280, $0.00"  # per part 32 pieces, begin, end and the record
    assert found["Prefect tasks"].startswith("8 of 1 part")
    assert found["listing"].startswith("1 page")
    assert found["requests that read"] == "1.02e+03, $0.00"  # each in 4 pieces of 8 MiB
