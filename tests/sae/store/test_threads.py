"""Results in order, few items ahead, and no work after a failure."""

import threading
import time
from collections.abc import Iterator

import pytest

from sae.store.threads import in_order


def test_results_come_in_order_and_few_items_are_taken_ahead() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for i in range(200):
            taken += 1
            yield i

    for done, result in enumerate(in_order(lambda i: time.sleep(0.001 * (i % 3)) or i * i, items(), 4, "test")):
        assert result == done * done
        assert taken <= done + 16
    assert taken == 200


def test_several_are_worked_on_at_once() -> None:
    together = threading.Barrier(3, timeout=30)
    assert list(in_order(lambda i: together.wait() < 3, range(6), 3, "test")) == [True] * 6


def test_a_failure_comes_in_its_place_and_ends_the_work() -> None:
    begun = []

    def work(i: int) -> int:
        begun.append(i)
        if i == 5:
            raise ValueError(i)
        return i

    results = in_order(work, range(1000), 2, "test")
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="5"):
        next(results)
    assert len(begun) < 20
