"""Curves in TensorBoard and W&B, by the real packages where they are installed."""

import importlib.machinery
import importlib.util
import json
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
from pydantic import TypeAdapter
from pydantic_core import to_jsonable_python

from sae.architectures import TopKConfig
from sae.errors import ConfigError
from sae.pipeline_config import ExecutionConfig
from sae.store.artefacts.records import read_record
from sae.store.storage.filesystem import Storage
from sae.train.config import SAESpec, TensorBoardLog, TrainConfig, WandbLog
from sae.train.curve import TrainingCurve
from sae.train.logs import CurveLogs
from sae.train.loop import train_saes


@pytest.fixture
def specs(storage: Storage, make_snapshot: Callable[..., Any]) -> list[SAESpec]:
    act = np.random.default_rng(0).standard_normal((120, 6)).astype(np.float32)
    snapshot = make_snapshot(storage, [act], row_group_rows=20)
    return [
        SAESpec(
            config=TrainConfig(sae=TopKConfig(d_sae=16, k=2), batch_rows=32, n_tokens=240, seed=seed),
            snapshot=snapshot.ref,
            order_seed=0,
        )
        for seed in (0, 1)
    ]


@pytest.fixture
def wandb_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What a package named wandb is called with."""
    calls: list[tuple[str, Any]] = []

    class Run:
        def __init__(self, **arguments: Any) -> None:
            calls.append(("init", arguments))

        def log(self, figures: dict[str, float], step: int) -> None:
            calls.append(("log", (step, figures)))
            if step == 7:
                raise OSError("the disk is full")

        def finish(self, quiet: bool) -> None:
            calls.append(("finish", quiet))

    module = types.ModuleType("wandb")
    module.init = Run
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="a test")
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


@pytest.fixture
def tolerant() -> Iterator[None]:
    """Other people's packages warn of each other's plans."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _interrupt(done: int, *_: object) -> None:
    if done == 5:
        raise InterruptedError


@pytest.mark.parametrize("log", [TensorBoardLog(), WandbLog()], ids=lambda log: log.kind)
def test_a_missing_package_is_one_error_that_names_the_extra(
    log: TensorBoardLog | WandbLog, storage: Storage, specs: list[SAESpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == log.kind else find(name, *more)
    )
    message = rf"training_logs.0: {log.kind} is not installed. Run pip install 'sae-pipeline\[{log.kind}\]', or leave"
    with pytest.raises(ConfigError, match=message):
        train_saes(storage, specs, checkpoint_every_steps=0, logs=[log])
    assert read_record(storage, specs[0].ref) is None


@pytest.mark.usefixtures("tolerant")
def test_tensorboard_has_the_curve_of_every_sae_also_of_an_interrupted_one(
    storage: Storage, specs: list[SAESpec], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install 'sae-pipeline[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = TensorBoardLog(folder=str(tmp_path / "events"))
    with pytest.raises(InterruptedError):
        train_saes(storage, specs, checkpoint_every_steps=3, logs=[log], progress=_interrupt)
    records = train_saes(storage, specs, checkpoint_every_steps=3, logs=[log])
    assert len(list((tmp_path / "events").iterdir())) == 2
    for spec, record in zip(specs, records, strict=True):
        events = EventAccumulator(str(tmp_path / "events" / f"topk-16-{spec.fingerprint}")).Reload()
        assert set(events.Tags()["scalars"]) == {"n_tokens", "loss", "fvu", "l0", "aux", "dead", "lr"}
        points = events.Scalars("fvu")
        assert [point.step for point in points] == list(range(1, 9))
        assert points[-1].value == pytest.approx(record.metrics["fvu"])


@pytest.mark.usefixtures("tolerant")
def test_wandb_has_a_run_of_its_own_for_every_sae(
    storage: Storage, specs: list[SAESpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'sae-pipeline[wandb]'")
    for name, value in (("MODE", "offline"), ("DIR", str(tmp_path)), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    train_saes(storage, specs, checkpoint_every_steps=3, logs=[WandbLog(project="tests")])
    runs = sorted(path.name for path in (tmp_path / "wandb").glob("offline-run-*"))
    assert sorted(name.rpartition("-")[2] for name in runs) == sorted(spec.fingerprint for spec in specs)


def test_wandb_is_told_names_config_and_points(
    storage: Storage, specs: list[SAESpec], wandb_calls: list[tuple[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InterruptedError):
        train_saes(storage, specs[:1], checkpoint_every_steps=3, logs=[WandbLog()], progress=_interrupt)
    assert [name for name, _ in wandb_calls] == ["init", *["log"] * 5, "finish"]
    first = wandb_calls[0][1]
    assert (first["project"], first["id"], first["resume"]) == ("sae-pipeline", specs[0].fingerprint, "allow")
    assert first["config"]["config"]["sae"]["k"] == 2
    json.dumps(first)
    wandb_calls.clear()
    with caplog.at_level(logging.WARNING):
        train_saes(storage, specs[:1], checkpoint_every_steps=3, logs=[WandbLog()])
    # It goes on after the checkpoint of step 3, and a log that fails does not end the training.
    assert [given[0] for name, given in wandb_calls if name == "log"] == [4, 5, 6, 7]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"{specs[0].ref}: its wandb log is given up, training goes on: OSError('the disk is full')"
    assert read_record(storage, specs[0].ref) is not None


@pytest.mark.usefixtures("wandb_calls")
def test_logs_change_no_result(
    storage: Storage, specs: list[SAESpec], tmp_path: Path, make_snapshot: Callable[..., Any]
) -> None:
    logged = [record.content for record in train_saes(storage, specs, checkpoint_every_steps=0, logs=[WandbLog()])]
    other = Storage(str(tmp_path / "other"))
    act = np.random.default_rng(0).standard_normal((120, 6)).astype(np.float32)
    make_snapshot(other, [act], row_group_rows=20)
    assert [record.content for record in train_saes(other, specs, checkpoint_every_steps=0)] == logged


def test_a_folder_of_that_name_is_no_package(
    storage: Storage, specs: list[SAESpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match="wandb is not installed"):
        train_saes(storage, specs, checkpoint_every_steps=0, logs=[WandbLog()])


def test_logs_reach_a_worker_process_as_json() -> None:
    logs = ExecutionConfig.model_validate({"training_logs": [{"kind": "tensorboard"}, {"kind": "wandb"}]}).training_logs
    hint = get_type_hints(train_saes, include_extras=True)["logs"]
    assert TypeAdapter(hint).validate_json(json.dumps(to_jsonable_python(list(logs)))) == list(logs)


def test_without_logs_nothing_is_opened(specs: list[SAESpec]) -> None:
    logs = CurveLogs((), specs[0], TrainingCurve(3))
    logs.write()
    logs.close()
