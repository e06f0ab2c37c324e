"""What SAEs of one sweep are called in its report: apart, and by what they differ in."""

from typing import Any

import pytest

from flows.recipes import architectures
from sae.pipeline_config import PipelineConfig
from sae.plan import make_plan
from sae.report.config import ReportedSAE
from sae.sweep_names import name_sweep

POINTS = {"kind": "inline", "values": [[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]}
TOPK = {"architecture": "topk", "d_sae": 8, "k": 2}
STANDARD = {"architecture": "standard", "d_sae": 8, "l1_coefficient": 0.5}


def _entries(saes: list[dict[str, Any]], sets: tuple[str, ...] = ("toy",)) -> tuple[ReportedSAE, ...]:
    given = {"kind": "given", "sets": dict.fromkeys(sets, POINTS)}
    config = {"activations": given, "evaluation": {"untrained": None}, "saes": saes}
    report = make_plan(PipelineConfig.model_validate(config)).report
    assert report is not None
    return report.saes


def _names(saes: list[dict[str, Any]], sets: tuple[str, ...] = ("toy",)) -> list[str]:
    return [entry.name for entry in _entries(saes, sets)]


@pytest.mark.parametrize(
    ("saes", "names"),
    [
        ([{"sae": TOPK}], ["topk-8-k2"]),
        ([{"sae": TOPK}, {"sae": STANDARD}], ["topk-8-k2", "standard-8-l1-0.5"]),
        ([{"sae": TOPK, "grid": {"seed": [0, 1]}}], ["topk-8-k2-seed0", "topk-8-k2-seed1"]),
        ([{"sae": TOPK, "grid": {"lr": [0.01, 0.001]}}], ["topk-8-k2-lr0.01", "topk-8-k2-lr0.001"]),
        ([{"sae": TOPK, "grid": {"sae": {"k_aux": [4, 8]}}}], ["topk-8-k2-k_aux4", "topk-8-k2-k_aux8"]),
        (
            [{"sae": TOPK, "seed": 1}, {"sae": TOPK, "lr": 0.01}, {"sae": TOPK | {"k": 1}, "seed": 2}],
            ["topk-8-k2-lrdefault-seed1", "topk-8-k2-lr0.01-seed0", "topk-8-k1"],
        ),
    ],
)
def test_names_say_what_differs_and_no_more(saes: list[dict[str, Any]], names: list[str]) -> None:
    assert _names(saes) == names


def test_hook_points_are_named_where_there_are_several() -> None:
    saes = [{"sae": TOPK, "hook_point": name} for name in ("a", "b")]
    assert _names([*saes, saes[1] | {"seed": 1}], ("a", "b")) == [
        "a-topk-8-k2",
        "b-topk-8-k2-seed0",
        "b-topk-8-k2-seed1",
    ]


@pytest.mark.parametrize(
    ("grid", "families"),
    [
        ({"sae": {"k": [1, 2]}, "seed": [0, 1]}, ["topk 8"] * 4),
        ({"sae": {"d_sae": [4, 2048], "k": [1, 2]}}, ["topk 4"] * 2 + ["topk 2,048"] * 2),
        ({"lr": [0.01, 0.001], "seed": [0, 1]}, ["topk 8, lr 0.01"] * 2 + ["topk 8, lr 0.001"] * 2),
        # As many settings as it takes, what is said in words first.
        (
            {"lr": [0.01, 0.001], "init": ["tied", "kaiming"]},
            [f"topk 8, init {init}, lr {lr}" for lr in (0.01, 0.001) for init in ("tied", "kaiming")],
        ),
        ({"lr": [0.001, 0.001 + 1e-9]}, ["topk 8, lr 0.001", "topk 8, lr 0.001000001"]),
    ],
)
def test_a_family_is_a_config_but_for_sparsity_and_seed(grid: dict[str, Any], families: list[str]) -> None:
    assert [entry.family for entry in _entries([{"sae": TOPK | {"k": 1}, "grid": grid}])] == families


def test_sparsity_is_named_by_what_makes_it() -> None:
    saes = [{"sae": STANDARD, "grid": {"sae": {"l1_coefficient": [0.5, 3]}}}, {"sae": TOPK}]
    assert [entry.sparsity for entry in _entries(saes)] == ["l1 0.5", "l1 3", "k 2"]


def test_two_recipes_of_one_architecture_and_width_are_two_families() -> None:
    assert [named.family for named in name_sweep(architectures().saes)] == [
        "topk 2,048",
        "batch_topk 2,048",
        "standard 2,048, decoder unit",
        "standard 2,048, decoder free",
    ]
    saes = [{"sae": TOPK, "hook_point": name} for name in ("a", "b")]
    assert [entry.family for entry in _entries(saes, ("a", "b"))] == ["topk 8, a", "topk 8, b"]
