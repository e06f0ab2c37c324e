"""The figures of a run, in a terminal and in Prefect's tables."""

from typing import Any

from flows.headline import headline_lines, headline_markdown


def _rows(n_saes: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"sae": f"topk-64-k{k}", "split": "heldout", "fvu": 1 / k, "l0": float(k), "dead": 0.25, "fvu_pca": 0.5}
        for k in range(1, n_saes + 1)
    ]
    return [*rows, {"sae": "control: untrained subject", "split": "heldout", "fvu": 0.5, "l0": 3.0, "dead": None}]


def test_one_sae_and_its_control_are_shown_with_every_figure() -> None:
    assert headline_lines(_rows(1)) == [
        "sae topk-64-k1  split heldout  fvu 1  l0 1  dead 0.25  fvu_pca 0.5",
        "sae control: untrained subject  split heldout  fvu 0.5  l0 3  dead n/a",
    ]


def test_a_sweep_is_a_table_whose_columns_are_aligned() -> None:
    rows = [{"sae": row["sae"], "fvu_neurons": 0.4} | row for row in _rows(3)]  # the order of a record is no matter
    assert headline_lines(rows) == [
        "sae                           fvu  l0  dead  fvu_neurons",
        "topk-64-k1                      1   1  0.25          0.4",
        "topk-64-k2                    0.5   2  0.25          0.4",
        "topk-64-k3                  0.333   3  0.25          0.4",
        "control: untrained subject    0.5   3   n/a          0.4",
    ]


def test_a_few_saes_stand_side_by_side_in_markdown_and_many_below_each_other() -> None:
    few, many = headline_markdown(_rows(3)).splitlines(), headline_markdown(_rows(30)).splitlines()
    assert few[0] == "| sae | topk-64-k1 | topk-64-k2 | topk-64-k3 | control: untrained subject |"
    assert few[3] == "| fvu | 1 | 0.5 | 0.333 | 0.5 |"
    assert few[-1] == "| fvu_pca | 0.5 | 0.5 | 0.5 | n/a |"
    assert many[0] == "| sae | split | fvu | l0 | dead | fvu_pca |"
    assert many[3] == "| topk-64-k2 | heldout | 0.5 | 2 | 0.25 | 0.5 |"
    assert len(many) == 33
    assert headline_markdown([]) == "No evaluation."
