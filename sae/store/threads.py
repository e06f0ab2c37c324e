"""Work on many things at a time whose results come in order, and no more ahead than that."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(function: Callable[[Item], Result], items: Iterable[Item], threads: int, name: str) -> Iterator[Result]:
    """`function` of every item, in order; at most four times as many items as threads are taken ahead.

    Args:
        name: what the threads are called.

    Raises: whatever `function` does, in its item's place; what has not begun then never does.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix=name) as pool:
        ahead: deque[Future[Result]] = deque()
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) >= 4 * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
