"""What SAEs of one sweep are called in its report: apart, and by what they differ in."""

from typing import Any

import pytest

from sae.pipeline_config import PipelineConfig
from sae.plan import make_plan

POINTS = {"kind": "inline", "values": [[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]}
TOPK = {"architecture": "topk", "d_sae": 8, "k": 2}
STANDARD = {"architecture": "standard", "d_sae": 8, "l1_coefficient": 0.5}


def _names(saes: list[dict[str, Any]], sets: tuple[str, ...] = ("toy",)) -> list[str]:
    given = {"kind": "given", "sets": dict.fromkeys(sets, POINTS)}
    config = {"activations": given, "evaluation": {"untrained": None}, "saes": saes}
    report = make_plan(PipelineConfig.model_validate(config)).report
    assert report is not None
    return [entry.name for entry in report.saes]


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
