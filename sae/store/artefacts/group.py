"""Processes that make one artefact together: what they must agree on beside the tensors."""

from collections.abc import Callable


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
        return wish

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
