"""Work on many things at a time whose results come in order, and no more ahead than that."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int, name: str, *, at_once: int | None = None
) -> Iterator[Result]:
    """`function` of every item, in order.

    Args:
        name: what the threads are called.
        at_once: items that are taken and whose results are not, at most; four times as many as threads by default.

    Raises: whatever `function` does, in its item's place; what has not begun then never does.
    """
    at_once = at_once or 4 * threads
    with ThreadPoolExecutor(threads, thread_name_prefix=name) as pool:
        ahead: deque[Future[Result]] = deque()
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) >= at_once:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
