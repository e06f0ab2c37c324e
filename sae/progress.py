"""How long work tells the caller where it stands. The library reports; flows and tasks decide how it is shown."""

from typing import Protocol


class Progress(Protocol):
    """Called as work goes on, cheaply and often; the receiver decides how often to show it."""

    def __call__(self, done: int, total: int, unit: str, note: str = "") -> None:
        """Report `done` of `total` units (tokens, rows, steps, files); `note` is a short live figure.

        Raises: StopRequested when the work is to end now: training saves a checkpoint first, the rest just ends.
        """


def silent(done: int, total: int, unit: str, note: str = "") -> None:
    """Show nothing."""
