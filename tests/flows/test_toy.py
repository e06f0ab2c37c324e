"""The small pictures: eight tokens in four dimensions, and more features than neurons."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RUN = ("run", "toy", "--set", "evaluation.replicates.n_seeds=2")
"""tests/sae/evaluate/test_concepts.py has the recipe's twenty seeds."""


def sae_pipeline(*arguments: str, home: Path) -> dict[str, Any]:
    """Run the real command in a process of its own; its last line as JSON."""
    environment = os.environ | {"PREFECT_HOME": str(home), "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120"}
    environment.pop("PREFECT_API_URL", None)
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments, "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("toy")
    return sae_pipeline(*RUN, "--root", str(folder / "root"), home=folder / "prefect"), folder


def test_toy_runs_from_the_command_line_and_ends_with_a_report(toy: tuple[dict[str, Any], Path]) -> None:
    result, _ = toy
    assert Path(result["report"]).is_file()
    assert {task["outcome"] for task in result["tasks"]} == {"computed"}
    assert result["metrics"][0]["fvu"] <= 0.05
    assert result["metrics"][0]["l0"] <= 3.5


@pytest.mark.slow
def test_a_second_toy_run_with_prefect_s_database_gone_computes_nothing(toy: tuple[dict[str, Any], Path]) -> None:
    _, folder = toy
    again = sae_pipeline(*RUN, "--root", str(folder / "root"), home=folder / "another-prefect-home")
    assert {task["outcome"] for task in again["tasks"]} == {"cached"}
