"""Sweeps written as grids."""

import itertools
from typing import Any

import pytest
from pydantic import ValidationError

from sae.architectures import TopKConfig
from sae.pipeline_config import PipelineConfig
from sae.train.config import TrainConfig
from sae.train.grid import TrainGrid, expand_grids

TOPK = {"architecture": "topk", "d_sae": 8, "k": 2}
POINTS = {"kind": "given", "sets": {"toy": {"kind": "inline", "values": [[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]}}}


def _config(*saes: Any) -> PipelineConfig:
    return PipelineConfig.model_validate({"activations": POINTS, "evaluation": {"untrained": None}, "saes": list(saes)})


def test_a_grid_stands_for_every_combination_and_the_last_setting_varies_fastest() -> None:
    grid = {"sae": {"d_sae": [8, 16], "k": [1, 2, 4]}, "seed": [0, 1]}
    found = _config({"sae": TOPK, "lr": 0.01, "grid": grid}).saes
    expected = [
        TrainConfig(sae=TopKConfig(d_sae=d_sae, k=k), lr=0.01, seed=seed)
        for d_sae, k, seed in itertools.product([8, 16], [1, 2, 4], [0, 1])
    ]
    assert list(found) == expected


def test_a_written_out_sweep_is_the_same_config() -> None:
    short = _config({"sae": TOPK, "grid": {"seed": [0, 1]}}, {"sae": TOPK, "seed": 2})
    assert short == _config(*({"sae": TOPK, "seed": seed} for seed in (0, 1, 2)))
    assert PipelineConfig.model_validate_json(short.model_dump_json()) == short


def test_architectures_and_whole_sections_are_values_too() -> None:
    architectures = {"sae": {"architecture": ["topk", "batch_topk"]}, "init": ["tied", {"weights": "runs/x"}]}
    found = _config({"sae": TOPK, "grid": architectures}).saes
    assert [(each.sae.architecture, str(each.init)) for each in found] == [
        (name, init) for name in ("topk", "batch_topk") for init in ("tied", "weights='runs/x'")
    ]
    betas = _config({"sae": TOPK, "grid": {"adam_betas": [[0.9, 0.99], [0.5, 0.9]]}}).saes
    assert [each.adam_betas for each in betas] == [(0.9, 0.99), (0.5, 0.9)]


def test_configs_in_python_may_have_grids_and_need_none() -> None:
    config = TrainConfig(sae=TopKConfig(d_sae=8, k=2))
    assert _config(config, {"sae": config.sae, "grid": {"seed": [1]}}).saes[1].seed == 1
    assert _config({"sae": TOPK, "grid": {}}).saes == (config,)
    assert [each.seed for each in _config(TrainGrid(sae=config.sae, grid={"seed": [0, 1]})).saes] == [0, 1]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"seed": 3}, r"saes.1.grid.seed: a list of values, at least one, not 3"),
        ({"sae": {"k": []}}, r"saes.1.grid.sae.k: a list of values, at least one, not \[\]"),
        ([1, 2], r"saes.1.grid: a table of settings"),
        ({"lr": {"peak": [1.0]}}, r"saes.1.grid.lr.peak: 'lr' is a plain value"),
        ({"seed": list(range(40)), "lr": [0.1] * 40}, r"saes.1.grid: 1,600 SAEs"),
        ({"sae": {"k": [2, 64]}}, r"k = 64 is larger than d_sae = 8"),
        ({"sed": [1, 2]}, r"sed\n  Extra inputs are not permitted"),
        ({"seed": [1, 1]}, r"saes.2: the same as saes.1"),
    ],
)
def test_what_is_no_grid_is_refused_with_its_place(grid: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _config({"sae": TOPK}, {"sae": TOPK, "lr": 0.01, "grid": grid})


@pytest.mark.parametrize("saes", [None, 3, "topk", {"a": 1}])
def test_what_is_no_list_is_left_to_the_config(saes: Any) -> None:
    assert expand_grids(saes) is saes
