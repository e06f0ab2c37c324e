"""Several runs at once on one root: all succeed, and there is one set of artefacts."""

import json
from pathlib import Path
from typing import Any

import pytest

from sae.plan import PipelineConfig
from tests.flows.conftest import tiny_config
from tests.flows.processes import CommandLine, contents, strays


def own_server(folder: Path) -> dict[str, Any]:
    return {"PREFECT_HOME": str(folder / "prefect"), "PREFECT_API_URL": None}


@pytest.mark.slow
def test_two_runs_of_one_config_at_once_make_one_set_of_artefacts(tmp_path: Path, corpus: Path) -> None:
    config = tiny_config(tmp_path / "root", corpus)
    # Each starts its own server, both on one database that is not there yet.
    runs = [CommandLine(config, tmp_path, **own_server(tmp_path)) for _ in range(2)]
    ends = [run.finish() for run in runs]
    for code, _, err in ends:
        assert code == 0, err
    assert ends[0][1]["report"] == ends[1][1]["report"]
    assert ends[0][1]["metrics"] == ends[1][1]["metrics"]
    assert len(contents(config)) > 30
    assert strays(config.execution.root) == []


@pytest.mark.slow
def test_two_configs_at_once_share_what_they_share(tmp_path: Path, corpus: Path, shared_server: dict[str, Any]) -> None:
    config = tiny_config(tmp_path / "root", corpus)
    saes = [{"sae": {"architecture": "topk", "d_sae": 64, "k": 6, "k_aux": 8}, "batch_rows": 128}]
    other = PipelineConfig.model_validate_json(json.dumps(config.model_dump(mode="json") | {"saes": saes}))
    runs = [CommandLine(each, tmp_path, **shared_server) for each in (config, other)]
    for code, _, err in [run.finish() for run in runs]:
        assert code == 0, err
    ours, theirs = contents(config), contents(other)
    shared = {name.partition("/")[0] for name in ours.keys() & theirs.keys()}
    assert shared >= {"segments", "tokens", "tokenizers", "subjects", "parts", "activations"}
    assert {name.partition("/")[0] for name in ours.keys() - theirs.keys()} == {
        "saes",
        "evaluations",
        "statistics",
        "reports",
    }
    assert strays(config.execution.root) == []
