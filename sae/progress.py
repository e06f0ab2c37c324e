"""How long work tells the caller where it stands. The library reports; flows and tasks decide how it is shown."""

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

from tqdm import tqdm

SCALED_UNITS = ("tokens", "rows", "bytes")


class Progress(Protocol):
    """Called as work goes on, cheaply and often; the receiver decides how often to show it."""

    def __call__(self, done: int, total: int, unit: str, note: str = "") -> None:
        """Report `done` of `total` units (tokens, rows, steps, files); `note` is a short live figure.

        Raises: StopRequested when the work is to end now: training saves a checkpoint first, the rest just ends.
        """


def silent(done: int, total: int, unit: str, note: str = "") -> None:
    """Show nothing."""


class Bar:
    """A bar with rate, time left and the last note, on stderr; drawn from the first report on."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar: tqdm[Any] | None = None

    def __call__(self, done: int, total: int, unit: str, note: str = "") -> None:
        """Draw it, if the last time is long enough ago."""
        if self._bar is None or self._bar.total != total:
            self.close()
            self._bar = tqdm(
                desc=self._title,
                total=total,
                initial=done,
                unit=f" {unit}",
                unit_scale=unit in SCALED_UNITS,
                leave=False,
                dynamic_ncols=True,
            )
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Take it away."""
        if self._bar is not None:
            self._bar.close()


@contextlib.contextmanager
def show_bar(title: str) -> Iterator[Progress]:
    """A bar while the block runs."""
    bar = Bar(title)
    try:
        yield bar
    finally:
        bar.close()
