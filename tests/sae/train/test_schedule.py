import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.train.schedule import count_steps, learning_rate, waking_rate, warmed_up


def test_warm_up_constant_and_decay_at_worked_points() -> None:
    rates = [learning_rate(step, 100, 2.0, 0.1, 0.2) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9:81] == [2.0] * 72
    assert rates[90] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(0.1)


def test_what_is_dead_is_woken_by_tens_of_the_peak_while_the_rate_falls() -> None:
    rates = [waking_rate(step, 100, 2.0, 0.1, 0.2) for step in range(100)]
    assert rates[:81] == [learning_rate(step, 100, 2.0, 0.1, 0.2) for step in range(81)]
    assert rates[81:] == [20.0] * 19
    assert {waking_rate(step, 7, 0.5, 0, 0) for step in range(7)} == {0.5}


def test_a_coefficient_rises_to_its_value_and_stays() -> None:
    found = [warmed_up(step, 100, 5.0, 0.05) for step in range(100)]
    assert found == pytest.approx([1.0, 2.0, 3.0, 4.0] + [5.0] * 96)
    assert {warmed_up(step, 100, 5.0, 0) for step in range(100)} == {5.0}


def test_without_warm_up_and_decay_the_rate_is_constant() -> None:
    assert {learning_rate(step, 7, 0.5, 0, 0) for step in range(7)} == {0.5}


@given(st.integers(1, 300), st.floats(0, 1), st.floats(0, 1))
def test_the_rate_is_always_positive_and_never_above_the_peak(n_steps: int, warmup: float, decay: float) -> None:
    for step in range(n_steps):
        assert 0 < learning_rate(step, n_steps, 3.0, warmup, decay) <= 3.0


@pytest.mark.parametrize(
    ("n_tokens", "rows", "batch", "steps"),
    [(100, 100, 10, 10), (105, 105, 10, 11), (210, 105, 10, 22), (1, 105, 10, 1)],
)
def test_steps_of_epochs_with_a_short_last_batch(n_tokens: int, rows: int, batch: int, steps: int) -> None:
    assert count_steps(n_tokens, rows, batch) == steps


@given(st.integers(1, 500), st.integers(1, 60), st.integers(1, 60))
def test_the_steps_counted_are_the_steps_that_consume_the_tokens(n_tokens: int, rows: int, batch: int) -> None:
    batch = min(batch, rows)
    sizes = [batch] * (rows // batch) + ([rows % batch] if rows % batch else [])
    consumed = n_steps = 0
    while consumed < n_tokens:
        consumed += sizes[n_steps % len(sizes)]
        n_steps += 1
    assert count_steps(n_tokens, rows, batch) == n_steps
