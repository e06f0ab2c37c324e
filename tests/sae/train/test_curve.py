"""What the curve notices: losses that are not finite, and errors that explode."""

import pytest
import torch

from sae.errors import TrainingError
from sae.train.curve import TrainingCurve
from sae.train.live import live_note
from sae.train.losses import Losses
from sae.train.schedule import batch_of


def _losses(fvu: float, total: float | None = None) -> Losses:
    fvu_, loss = torch.tensor(fvu), torch.tensor(fvu if total is None else total)
    return Losses(total=loss, fvu=fvu_, l0=torch.tensor(2.0), aux=torch.tensor(0.0), fired=torch.ones(4).bool())


def _fill(fvus: list[float]) -> TrainingCurve:
    curve = TrainingCurve(len(fvus), "batch {}".format)
    for step, fvu in enumerate(fvus, 1):
        curve.add(step, 10 * step, _losses(fvu), lambda: 0.0, 0.1)
    return curve


def test_an_error_that_explodes_ends_the_run() -> None:
    with pytest.raises(TrainingError, match=r"exploded.*step 4 of 5 \(batch 4\) it was 150 times .*, 0.9 at the start"):
        _fill([0.9, 0.5, 80.0, 150.0, 0.4])


def test_a_bad_start_is_no_explosion_and_may_come_down() -> None:
    assert len(_fill([5000.0, 40_000.0, 120.0, 0.4]).rows) == 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_first_step_whose_loss_is_not_finite_is_named(bad: float) -> None:
    curve = TrainingCurve(600, "batch {}".format)  # a point every fourth step
    for step in (1, 2, 3):
        curve.add(step, step, _losses(0.5, bad if step > 1 else 0.5), lambda: 0.0, 0.1)
    with pytest.raises(TrainingError, match=r"stopped being finite at step 2 of 600 \(batch 2\)"):
        curve.add(4, 4, _losses(0.5), lambda: 0.0, 0.1)


def test_batches_are_counted_as_the_loader_does() -> None:
    assert [batch_of(step, 210, 32) for step in (0, 6, 7, 20)] == [(0, 0), (0, 6), (1, 0), (2, 6)]


def test_the_live_line_before_and_after_the_first_point() -> None:
    point = {"fvu": 0.2134, "l0": 24.02, "dead": 0.031, "loss": 0.2345}
    assert live_note([{}, point], 52_100.4, 0.25) == (
        "52,100 tokens/s, waited 0.2 s for data; fvu - 0.213; l0 - 24; dead - 3%; loss - 0.234"
    )


def test_the_live_line_of_many_is_a_range() -> None:
    points = [{"fvu": 0.1 * n, "l0": 8.0 * n, "dead": 0.0, "loss": 0.5} for n in range(1, 6)]
    assert live_note([{}, *points], 100) == (
        "100 tokens/s; fvu 0.100 to 0.500; l0 8 to 40; dead 0% to 0%; loss 0.5 to 0.5"
    )
    assert live_note([{}] * 5, 100).endswith("loss - - - - -")
