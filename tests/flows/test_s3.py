"""The whole DAG on S3, through the command line, against an endpoint in a process of its own."""

import os
import random
from pathlib import Path
from typing import Any

import pytest

from sae.plan import PipelineConfig, make_plan
from sae.store import layout
from sae.store.artefacts.records import require_record
from sae.store.storage.filesystem import Storage
from tests.flows.conftest import tiny_config, with_settings
from tests.flows.processes import CommandLine, contents
from tests.processes import wait_for


@pytest.fixture
def config(s3_root: str, corpus: Path, tmp_path: Path) -> PipelineConfig:
    """The tiny pipeline with its root on S3."""
    return tiny_config(tmp_path, corpus, execution={"root": s3_root, "retry_delay_seconds": 0})


@pytest.fixture
def environment(shared_server: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Of a run: the tests' Prefect server, and a temporary folder of its own."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    return shared_server | {"TMPDIR": str(temporary)}


def strays(storage: Storage) -> list[str]:
    """Objects under the root that no commit record names, Prefect's results aside."""
    found = storage.sizes("")
    named = set()
    for path in found:
        ref, _, name = path.rpartition("/")
        if ref.count("/") == 1 and (name == "record.json" or name.startswith("part-")):
            part = None if name == "record.json" else int(name[5:10])
            record = require_record(storage, ref, part)
            named |= {path, *(record.path(entry.name) for entry in record.files)}
    return sorted(found.keys() - named)


def left_behind(environment: dict[str, Any]) -> list[str]:
    """What finished runs left in the temporary folder, torch's own caches aside."""
    return [name for name in os.listdir(environment["TMPDIR"]) if not name.startswith("torchinductor")]


def database_files() -> list[Path]:
    """The tests' Prefect database: runs, their parameters and logs, artifacts, blocks."""
    from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL

    path = Path(PREFECT_API_DATABASE_CONNECTION_URL.value().split("///", 1)[1])
    return sorted(path.parent.glob(f"{path.name}*"))


def test_a_run_on_s3_ends_in_a_report_is_found_again_and_gives_no_credentials_away(
    config: PipelineConfig, tmp_path: Path, environment: dict[str, Any]
) -> None:
    # Without the control, whose tasks are the same once more: the slow tests below have it.
    activations = config.activations.model_dump(mode="json") | {"n_tokens": 2000}
    evaluation = {"n_contexts": 16, "n_bootstrap": 20, "untrained": None}
    config = with_settings(config, {"activations": activations, "evaluation": evaluation})
    storage = Storage(config.execution.root)
    environment["PREFECT_LOGGING_LEVEL"] = "DEBUG"
    code, result, err = (first := CommandLine(config, tmp_path, "--verbose", **environment)).finish()
    assert code == 0, err
    assert result["report"].startswith(f"{storage.root}/reports/")
    assert storage.exists(result["report"].removeprefix(f"{storage.root}/"))
    assert len(contents(config)) > 20
    assert strays(storage) == []
    assert storage.list(layout.RESULTS) != []

    code, again, more = CommandLine(config, tmp_path, "--verbose", **environment).finish()
    assert code == 0, more
    assert {task["outcome"] for task in again["tasks"]} == {"cached"}
    assert again["report"] == result["report"]
    assert again["metrics"] == result["metrics"]

    assert left_behind(environment) == []
    assert first.alive() == []
    databases = database_files()
    assert databases
    texts = {str(path): path.read_bytes() for path in databases}
    texts |= {"output": f"{err}{more}{result}{again}".encode()}
    texts |= {name: storage.fs.cat_file(name) for name in storage.fs.find(storage.full(""))}
    assert any(b"pipeline" in text for text in texts.values())
    for secret in (os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]):
        assert [name for name, text in texts.items() if secret.encode() in text] == []


@pytest.mark.slow
def test_two_runs_at_once_on_s3_make_one_set_of_artefacts_equal_to_a_local_one(
    config: PipelineConfig, finished: PipelineConfig, tmp_path: Path, environment: dict[str, Any]
) -> None:
    runs = [CommandLine(config, tmp_path, **environment) for _ in range(2)]
    ends = [run.finish() for run in runs]
    for code, _, err in ends:
        assert code == 0, err
    assert ends[0][1]["report"] == ends[1][1]["report"]
    assert strays(Storage(config.execution.root)) == []
    assert contents(config) == contents(finished)
    assert left_behind(environment) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_run_on_s3_that_is_killed_goes_on_to_the_same_bytes(
    seed: int, config: PipelineConfig, finished: PipelineConfig, tmp_path: Path, environment: dict[str, Any]
) -> None:
    storage, draw = Storage(config.execution.root), random.Random(seed)
    n_objects = len(Storage(finished.execution.root).sizes(""))
    killed = CommandLine(config, tmp_path, **environment)
    moment = draw.randrange(n_objects)
    try:
        wait_for(lambda: len(storage.sizes("")) > moment, seconds=240)
    finally:
        killed.kill()
    code, _, err = CommandLine(config, tmp_path, **environment).finish()
    assert code == 0, err
    assert contents(config) == contents(finished)
    killed.finish()
    assert killed.alive() == []


@pytest.mark.slow
def test_objects_that_are_lost_or_damaged_on_s3_are_restored(
    config: PipelineConfig, tmp_path: Path, environment: dict[str, Any]
) -> None:
    code, result, err = CommandLine(config, tmp_path, **environment).finish()
    assert code == 0, err
    storage, before = Storage(config.execution.root), contents(config)
    for index, spec in enumerate(make_plan(config).specs()):
        for entry in require_record(storage, spec.ref).files[:1]:
            path = require_record(storage, spec.ref).path(entry.name)
            if index % 2:
                storage.remove(path)
            else:
                storage.replace(path, storage.read_bytes(path)[:-1])
    code, again, err = CommandLine(config, tmp_path, **environment).finish()
    assert code == 0, err
    assert contents(config) == before
    assert again["report"] == result["report"]
