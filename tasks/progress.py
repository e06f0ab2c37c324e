"""Progress of long work, for the person at the terminal and for Prefect's UI."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import TaskRunContext
from tqdm import tqdm

from sae.progress import Bar, Progress

logger = logging.getLogger(__name__)

ARTIFACT_SECONDS = 5.0
"""Between updates of Prefect's progress artifact."""
LINE_SECONDS = 15.0
"""Between plain lines where there is no terminal."""


class _Bar:
    """A bar with rate and time left; plain lines where stderr is not a terminal."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar = Bar(title)
        self._artifact: Any = None
        self._started = time.monotonic()
        self._next_artifact = self._started + ARTIFACT_SECONDS
        self._next_line = self._started + LINE_SECONDS

    def __call__(self, done: int, total: int, unit: str, note: str = "") -> None:
        if sys.stderr.isatty():
            self._bar(done, total, unit, note)
        now = time.monotonic()
        if now >= self._next_line and not sys.stderr.isatty():
            self._next_line = now + LINE_SECONDS
            logger.info("%s", self._line(done, total, unit, note, now - self._started))
        if now >= self._next_artifact:
            self._next_artifact = now + ARTIFACT_SECONDS
            self._update_artifact(100.0 * done / max(total, 1))

    def close(self) -> None:
        self._bar.close()
        if self._artifact is not None:
            self._update_artifact(100.0)

    def _line(self, done: int, total: int, unit: str, note: str, seconds: float) -> str:
        rate = done / max(seconds, 1e-9)
        left = tqdm.format_interval((total - done) / rate) if rate > 0 else "?"
        text = f"{self._title}: {done:,} of {total:,} {unit} ({rate:,.0f}/s, {left} left)"
        return f"{text} {note}" if note else text

    def _update_artifact(self, percent: float) -> None:
        if TaskRunContext.get() is None:
            return
        # A progress display must never fail the work it shows.
        with contextlib.suppress(Exception):
            if self._artifact is None:
                self._artifact = create_progress_artifact(progress=percent, description=self._title)
            else:
                update_progress_artifact(artifact_id=self._artifact, progress=percent)


@contextlib.contextmanager
def show_progress(title: str) -> Iterator[Progress]:
    """A progress callback that is shown while the block runs."""
    bar = _Bar(title)
    try:
        yield bar
    finally:
        bar.close()
