"""Bootstrap intervals against theory and against a plain resampling loop."""

import numpy as np
import pytest

from sae.evaluate import bootstrap
from sae.evaluate.bootstrap import ratio_interval, ratio_intervals


def test_interval_of_a_mean_is_two_standard_errors_wide() -> None:
    values = np.random.default_rng(0).standard_normal(400) + 5
    low, high = ratio_interval(values, np.ones(400), 4000, "test")
    error = values.std() / np.sqrt(400)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)


def test_numerator_and_denominator_are_redrawn_together() -> None:
    sizes = np.random.default_rng(0).integers(1, 1000, 50).astype(float)
    assert ratio_interval(3 * sizes, sizes, 200, "test") == pytest.approx([3, 3])


def test_interval_does_not_depend_on_the_blocks(monkeypatch) -> None:
    values = np.arange(10.0)
    whole = ratio_interval(values, np.ones(10), 100, "test", 1)
    monkeypatch.setattr(bootstrap, "BLOCK_ELEMENTS", 35)
    assert ratio_interval(values, np.ones(10), 100, "test", 1) == whole
    assert ratio_interval(values, np.ones(10), 100, "test", 2) != whole


def test_no_interval_without_draws_or_contexts() -> None:
    assert ratio_interval(np.ones(5), np.ones(5), 0, "test") is None
    assert ratio_interval(np.ones(1), np.ones(1), 100, "test") is None
    assert ratio_interval(np.ones(5), np.zeros(5), 100, "test") is None


def test_several_ratios_share_their_draws() -> None:
    rng = np.random.default_rng(0)
    above, below = rng.random((30, 3)), rng.random((30, 3)) + 1
    below[:, 2] = 0
    found = ratio_intervals(above, below, 200, "test")
    assert found[0] == pytest.approx(ratio_interval(above[:, 0], below[:, 0], 200, "test"))
    assert found[1] == pytest.approx(ratio_interval(above[:, 1], below[:, 1], 200, "test"))
    assert found[2] is None
