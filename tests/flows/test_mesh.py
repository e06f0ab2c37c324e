"""The train flow with an SAE on two processes: the SAE that one trains; a lost process is retried by Prefect."""

import contextlib
import logging
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import sae
from sae.plan import PipelineConfig, make_plan
from sae.store.artefacts.records import require_record
from sae.store.storage.filesystem import Storage
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

    killer = threading.Thread(target=kill)
    killer.start()
    with caplog.at_level(logging.WARNING, "tasks.retries"):
        _, disturbed = train(config)
    killer.join()
    assert disturbed == undisturbed
    assert any("was killed by SIGKILL" in record.getMessage() for record in caplog.records)
    assert ranks() == []
    assert strays(config.execution.root) == []
