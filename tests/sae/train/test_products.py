from collections.abc import Iterator

import pytest
import torch
from pydantic import ValidationError

from sae.architectures import StandardConfig, TopKConfig
from sae.store.artefacts.checkpoints import Checkpoints, new_attempt
from sae.store.reading.order import Cursor
from sae.store.storage.filesystem import Storage
from sae.train import products
from sae.train import run as training_run
from sae.train.checkpoint import RunPosition, load_checkpoint, save_checkpoint
from sae.train.config import TrainConfig
from sae.train.products import probe_library, products_by
from sae.train.rows import RowsInMemory
from sae.train.run import DataMoments, TrainingRun

SWITCH = getattr(torch.backends.mkldnn, "matmul", None)
needs_switch = pytest.mark.skipif(SWITCH is None, reason="this torch has no switch for oneDNN's products")


@pytest.fixture
def setting() -> Iterator[str]:
    """A setting of the process that no library is asked for by."""
    before = SWITCH.fp32_precision
    SWITCH.fp32_precision = "none"
    yield "none"
    SWITCH.fp32_precision = before


@needs_switch
@pytest.mark.parametrize("library", ["blas", "onednn"])
def test_the_setting_of_the_process_is_as_before_also_after_an_error(
    library: products.ProductLibrary, setting: str
) -> None:
    def fail() -> None:
        with products_by(library):
            assert SWITCH.fp32_precision != setting
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert SWITCH.fp32_precision == setting
    assert torch.get_float32_matmul_precision() == "highest"


@needs_switch
def test_a_setting_of_the_caller_does_not_reach_inside_and_is_put_back() -> None:
    before = SWITCH.fp32_precision
    SWITCH.fp32_precision = "bf16"
    try:
        with products_by("blas"):
            assert SWITCH.fp32_precision == "ieee"
        assert SWITCH.fp32_precision == "bf16"
    finally:
        SWITCH.fp32_precision = before


def test_the_probed_library_is_as_accurate_as_float32() -> None:
    a, b = torch.randn(300, 700), torch.randn(700, 200)
    exact = a.double() @ b.double()
    with products_by(probe_library()):
        found = a @ b
    assert float((found - exact).norm() / exact.norm()) < 2e-6


@needs_switch
def test_an_inaccurate_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded = torch.Tensor.__matmul__

    def coarse(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.dtype is torch.float32 and SWITCH.fp32_precision == "bf16":
            return rounded(a.bfloat16().float(), b.bfloat16().float())
        return rounded(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", coarse)
    assert probe_library() == "blas"


def test_elsewhere_than_on_the_cpu_nothing_is_probed() -> None:
    assert probe_library("meta") == "blas"


def test_without_the_switch_products_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_SWITCH", None)
    assert probe_library() == "blas"
    with products_by("onednn"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).tolist() == [[2, 2], [2, 2]]


X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


def _run(probed: products.ProductLibrary, monkeypatch: pytest.MonkeyPatch) -> TrainingRun:
    monkeypatch.setattr(training_run, "probe_library", lambda device: probed)
    return TrainingRun(
        TrainConfig(sae=TopKConfig(d_sae=16, k=2)), DataMoments.of(X), n_steps=4, rows=RowsInMemory(X, len(X), 0)
    )


def _resumed(saved: TrainingRun, fresh: TrainingRun, storage: Storage) -> TrainingRun:
    saved.advance(X)
    first, second = (Checkpoints(storage, "saes/0123456789abcdef", RunPosition, new_attempt()) for _ in range(2))
    save_checkpoint(first, saved, Cursor(epoch=0, batch=1))
    load_checkpoint(second, fresh)
    return fresh


def test_a_resumed_run_keeps_the_library_that_it_began_with(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _resumed(_run("blas", monkeypatch), _run("onednn", monkeypatch), storage)
    assert (run.state.step, run.state.products) == (1, "blas")
    run.advance(X)
    run.curve.rows = [(0.0,) * 8]
    assert run.metrics()["products"] == "blas"


def test_a_run_resumed_where_its_library_is_inaccurate_leaves_it_and_says_so(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = _resumed(_run("onednn", monkeypatch), _run("blas", monkeypatch), storage)
    assert run.state.products == "blas"
    assert "not accurate to float32 here" in caplog.text


def test_steps_leave_the_setting_of_the_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = SWITCH and SWITCH.fp32_precision
    _run("onednn", monkeypatch).advance(X)
    assert (SWITCH and SWITCH.fp32_precision) == before


def test_a_selection_in_bfloat16_is_refused_where_nothing_is_selected() -> None:
    with pytest.raises(ValidationError, match="standard SAEs select nothing"):
        TrainConfig(sae=StandardConfig(d_sae=16, l1_coefficient=0.1), selection="bfloat16")
    config = TrainConfig(sae=TopKConfig(d_sae=16, k=2), selection="bfloat16")
    run = TrainingRun(config, DataMoments.of(X), n_steps=4, rows=RowsInMemory(X, len(X), 0))
    run.advance(X)
    assert float(run.curve.last["l0"]) == 2
