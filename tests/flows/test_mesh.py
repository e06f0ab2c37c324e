"""The train flow with an SAE on two processes: the SAE that one trains; a lost process is retried by Prefect."""

import contextlib
import json
import logging
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from pyarrow import Table
from pyarrow.parquet import read_table

import sae
from sae.plan import ExecutionConfig, PipelineConfig, make_plan
from sae.store.artefacts.records import local_files, require_record
from sae.store.storage.filesystem import Storage
from tasks import caching
from tasks.gang import run_gang
from tests.flows.conftest import with_settings
from tests.flows.processes import strays

SAE = {"sae": {"architecture": "topk", "d_sae": 64, "k": 4, "k_aux": 8}, "batch_rows": 128, "n_tokens": 40_000}


def on_mesh(config: PipelineConfig, root: Path, **mesh: int) -> PipelineConfig:
    """A training of some hundred steps on a copy of a finished root."""
    shutil.copytree(config.execution.root, root)
    execution: dict[str, Any] = {"root": str(root), "retry_delay_seconds": 0, "threads": 1, "mesh": mesh}
    return with_settings(config, {"saes": [SAE], "execution": execution | {"checkpoint_every_steps": 20}})


def train(config: PipelineConfig) -> tuple[sae.SAE, str]:
    """Run the flow. Returns: the SAE and the digest of its files."""
    from flows.train import train

    train(config)
    (spec,) = make_plan(config).saes
    storage = Storage(config.execution.root)
    return sae.load(storage.uri(spec.ref)), require_record(storage, spec.ref).content


def ranks() -> list[int]:
    """Processes of a gang that this process has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if "tasks.rank" in (folder / "cmdline").read_text():
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                if Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1] == str(os.getpid()):
                    found.append(int(folder.name))
    return found


@pytest.mark.slow
def test_two_processes_train_the_sae_that_one_does(finished: PipelineConfig, tmp_path: Path) -> None:
    alone, _ = train(on_mesh(finished, tmp_path / "alone", latents=1))
    for mesh in ({"latents": 2}, {"data": 2}):
        shared, _ = train(on_mesh(finished, tmp_path / next(iter(mesh)), **mesh))
        cosines = torch.cosine_similarity(alone.W_dec, shared.W_dec)
        assert cosines.quantile(0.1) > 0.99  # float32: now and then two latents swap places near the k-th


@pytest.mark.parametrize(
    ("data", "latents", "n_nodes", "n_used"), [(1, 8, 2, 2), (2, 8, 2, 1), (2, 6, 4, 2), (3, 8, 3, 1), (2, 3, 6, 3)]
)
def test_latents_are_evaluated_on_as_few_machines_as_have_equally_many(
    data: int, latents: int, n_nodes: int, n_used: int, tmp_path: Path
) -> None:
    from flows.run import Run

    nodes = [{"address": f"10.0.0.{number}"} for number in range(1, n_nodes + 1)]
    mesh = {"data": data, "latents": latents}
    execution = ExecutionConfig.model_validate({"root": str(tmp_path), "mesh": mesh, "nodes": nodes})
    gang = Run(execution, None, None, (), []).gang_of_latents("statistics")
    assert gang is not None
    assert (gang.mesh.data, gang.mesh.latents) == (1, latents)
    assert gang.nodes == execution.nodes[:n_used]
    assert latents % n_used == 0
    assert latents // n_used <= data * latents // n_nodes, "more on a machine than in training"


def evaluated(config: PipelineConfig) -> tuple[dict[str, Any], Table]:
    """Run the two stages. Returns: the figures, and the table of latents."""
    from flows.report import report

    (evaluation,), (statistics,) = make_plan(config).evaluations, make_plan(config).statistics
    storage = Storage(config.execution.root)
    for stage in ("evaluation", "statistics"):
        report(config, only=stage)
    with local_files(storage, require_record(storage, evaluation.ref)) as folder:
        figures = json.loads((folder / "evaluation.json").read_text())
    with local_files(storage, require_record(storage, statistics.ref)) as folder:
        return figures, read_table(folder / "latents.parquet")


@pytest.mark.slow
def test_two_processes_evaluate_and_count_as_one_does(finished: PipelineConfig, tmp_path: Path) -> None:
    """Of an SAE that one process has trained."""
    found = []
    for mesh in ({"latents": 1}, {"latents": 2}):
        saes = {"saes": finished.model_dump(mode="json")["saes"]}
        config = with_settings(on_mesh(finished, tmp_path / str(mesh["latents"]), **mesh), saes)
        for stage in ("evaluations", "statistics"):
            shutil.rmtree(Path(config.execution.root) / stage)
        with mock.patch.object(caching, "run_gang", wraps=run_gang) as gangs:
            found.append(evaluated(config))
        called = [call.args[0].__name__ for call in gangs.call_args_list]
        of_both = ["evaluate_sae", "evaluate_sae", "statistics_of_parts", "merge_statistics"]  # also of the control
        assert called == (of_both if mesh["latents"] > 1 else [])
    (alone, of_one), (shared, of_two) = found
    for figure in ("fvu", "l0", "n_dead"):
        assert shared[figure] == pytest.approx(alone[figure], rel=1e-4)
    for figure in ("sae", "kl"):
        assert shared["ce"][figure] == pytest.approx(alone["ce"][figure], rel=1e-5, abs=1e-7)
    n_fired = [np.array(table["n_fired"]) for table in (of_one, of_two)]
    assert n_fired[1].sum() == pytest.approx(n_fired[0].sum(), rel=1e-4)
    assert (n_fired[0] != n_fired[1]).mean() < 0.1  # float32: now and then two latents swap places near the k-th


@pytest.mark.slow
def test_a_killed_process_costs_a_retry_and_no_byte(
    finished: PipelineConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, undisturbed = train(on_mesh(finished, tmp_path / "undisturbed", latents=2))
    config, killed = on_mesh(finished, tmp_path / "killed", latents=2), []

    def kill() -> None:
        while not any(Path(config.execution.root).glob("saes/*/checkpoints/*/*.json")):
            time.sleep(0.01)
        killed.append(ranks()[-1])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with caplog.at_level(logging.WARNING, "tasks.retries"):
        _, disturbed = train(config)
    killer.join()
    assert disturbed == undisturbed
    assert any("was killed by SIGKILL" in record.getMessage() for record in caplog.records)
    assert ranks() == []
    assert strays(config.execution.root) == []
