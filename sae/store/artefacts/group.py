"""Processes that make one artefact together: what they must agree on beside the tensors."""

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Group:
    """Of one process alone. Every process calls the methods in the same order.

    Attributes:
        rank, world: of the processes. The first one writes what is written once.
        share: which of `world` equal shares of the artefact's rows this process writes. The first has share 0.
    """

    rank = share = 0
    world = 1

    def agree(self, wish: bool) -> bool:
        """Whether any process wishes it."""
        return self.agree_each([wish])[0]

    def agree_each(self, wishes: Sequence[bool]) -> list[bool]:
        """Whether any process wishes it, for several things at once."""
        return list(wishes)

    def tell(self, text: str) -> str:
        """What the first process says."""
        return text

    def collect(self, number: int) -> list[int]:
        """The numbers of all processes, by share. Each below 2^63."""
        return [number]

    def once(self, action: Callable[[], None]) -> None:
        """Let the first process do something; the others wait until it is done.

        Raises: what the action raises; on the others TransientError.
        """
        action()


ALONE = Group()


class Rows(NamedTuple):
    """What a process has of the tensors with a row for each of n things, when processes share them by rows.

    Share p of P is the rows [n p // P, n (p + 1) // P).
    """

    n: int
    own: slice
    """The rows in this process's tensors."""
    has: Callable[[str], bool]
    """Whether a tensor of this name has such rows."""

    def share(self, part: int, n_parts: int) -> slice:
        """Where one of so many equal shares lies."""
        return slice(self.n * part // n_parts, self.n * (part + 1) // n_parts)

    def to_write(self, group: Group) -> slice:
        """The group's share of this process, as rows of its own tensors: it lies in them, because as many processes
        have each of them."""
        share = self.share(group.share, group.world)
        return slice(share.start - self.own.start, share.stop - self.own.start)
