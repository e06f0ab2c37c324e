"""A pipeline small enough to run many times."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sae.plan import PipelineConfig

WORDS = ("alpha", "beta", "gamma", "delta", "return", "import", "class", "def", "value", "None", "True", "self")


def write_corpus(folder: Path, n_documents: int = 40) -> None:
    """Text files with a little structure, different in every file."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(n_documents):
        words = [WORDS[(index * 7 + step * step) % len(WORDS)] for step in range(150)]
        lines = [" ".join(words[start : start + 6]) for start in range(0, len(words), 6)]
        (folder / f"document-{index:03d}.txt").write_text("\n".join(lines) + "\n")


def tiny_config(root: Path, corpus: Path, **sections: Any) -> PipelineConfig:
    """The whole DAG in seconds: a 1-layer model of width 16, 300 tokens of vocabulary, an SAE of 64 latents."""
    data: dict[str, Any] = {
        "subject": {
            "kind": "embedded",
            "vocab_size": 300,
            "d_model": 16,
            "n_heads": 2,
            "d_mlp": 32,
            "n_steps": 20,
            "batch_contexts": 8,
            "warmup_steps": 2,
        },
        "corpus": {
            "segments": [{"kind": "text", "urls": [f"{corpus}/*.txt"]}],
            "context_tokens": 16,
            "heldout_fraction": 0.2,
        },
        "activations": {"n_tokens": 4000, "part_bytes": 64 * 16 * 64, "row_group_bytes": 16 * 16 * 64},
        "saes": [{"sae": {"architecture": "topk", "d_sae": 64, "k": 4, "k_aux": 8}, "batch_rows": 128}],
        "evaluation": {"n_contexts": 16, "n_bootstrap": 20, "untrained": {"n_tokens": 2000}},
        "execution": {"root": str(root), "retry_delay_seconds": 0},
    }
    return PipelineConfig.model_validate_json(json.dumps(data | sections))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of small text files."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture
def shared_server(prefect_backend: None) -> dict[str, Any]:
    """An environment in which a run uses the tests' Prefect server, and so starts ten seconds sooner."""
    from prefect.settings import PREFECT_API_URL

    return {"PREFECT_API_URL": PREFECT_API_URL.value()}


def with_settings(config: PipelineConfig, changes: dict[str, Any]) -> PipelineConfig:
    """The config with whole sections replaced."""
    return PipelineConfig.model_validate_json(json.dumps(config.model_dump(mode="json") | changes))


@pytest.fixture(scope="session")
def first_calls() -> list[tuple[Callable[..., Any], dict[str, Any]]]:
    """Functions that workers were told to call by the first run, and how. Filled by it."""
    return []


@pytest.fixture(scope="session")
def first_run(
    tmp_path_factory: pytest.TempPathFactory,
    corpus: Path,
    prefect_backend: None,
    first_calls: list[tuple[Callable[..., Any], dict[str, Any]]],
) -> tuple[PipelineConfig, list[dict[str, Any]]]:
    """A run on a root that was not there, and what became of its tasks."""
    from flows.pipeline import pipeline
    from tasks import caching

    run_in_worker = caching.run_in_worker

    def noted(function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        first_calls.append((function, options))
        run_in_worker(function, *arguments, **options)

    config = tiny_config(tmp_path_factory.mktemp("finished") / "root", corpus)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(caching, "run_in_worker", noted)
        return config, pipeline(config)


@pytest.fixture(scope="session")
def finished(first_run: tuple[PipelineConfig, list[dict[str, Any]]]) -> PipelineConfig:
    """A finished run; tests copy its root before they change anything."""
    return first_run[0]


@pytest.fixture
def copy(finished: PipelineConfig, tmp_path: Path) -> PipelineConfig:
    """The finished run on a root of its own."""
    root = tmp_path / "root"
    shutil.copytree(finished.execution.root, root)
    return with_settings(finished, {"execution": {"root": str(root), "retry_delay_seconds": 0}})


@pytest.fixture(scope="session")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    """The default recipe from nothing: minutes."""
    from flows.recipes import default
    from tests.flows.processes import CommandLine

    folder = tmp_path_factory.mktemp("default")
    config = with_settings(default(), {"execution": {"root": str(folder / "root")}})
    code, _, err = CommandLine(config, folder).finish(3600)
    assert code == 0, err
    return config
