"""Plant a mutation: run a function of the library with a part of its source replaced."""

import contextlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Mutation:
    """A mistake that implementations make.

    Attributes:
        function: where it is made.
        old: part of the function's source, there once.
        new: what stands there instead.
        check: of the conformance suite; it must fail.
    """

    function: Callable[..., Any]
    old: str
    new: str
    check: Callable[[], None]


@contextlib.contextmanager
def planted(mutation: Mutation) -> Iterator[None]:
    """The function has the mistake while the block runs, for everyone who has imported it."""
    function: Any = inspect.unwrap(mutation.function)  # decorators stay around it
    source = textwrap.dedent(inspect.getsource(function))
    source = source[source.index("def ") :]
    assert source.count(mutation.old) == 1, f"{mutation.old!r} is {source.count(mutation.old)} times in\n{source}"
    assert not function.__code__.co_freevars
    found: dict[str, Any] = {}
    exec(compile(source.replace(mutation.old, mutation.new), "<mutation>", "exec"), function.__globals__, found)
    before = function.__code__
    function.__code__ = found[function.__name__].__code__
    try:
        yield
    finally:
        function.__code__ = before
