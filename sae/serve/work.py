"""One thread that computes, and a short queue before it: what does not fit is told to come again."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sae.serve.refusals import Refused

Result = TypeVar("Result")

MAX_WAITING = 32
DEADLINE_SECONDS = 30.0
"""From a request's arrival to its answer, waiting included."""


class Abandoned(Exception):
    """Raised inside a call whose result nobody waits for any more."""


class ClientGone(Exception):
    """The client closed its connection before it was answered."""


class Work:
    """Runs calls one at a time: models are hooked while they run, and torch uses all cores for one."""

    def __init__(self, max_waiting: int = MAX_WAITING, seconds: float = DEADLINE_SECONDS) -> None:
        self.max_waiting, self.seconds = max_waiting, seconds
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inference")
        self._lock = threading.Lock()
        self._abandon: set[threading.Event] = set()
        self._stopping = False

    async def run(self, call: Callable[[Callable[[], None]], Result], gone: Callable[[], Awaitable[object]]) -> Result:
        """The result of `call(check)`, computed in the thread; `check` raises once nobody waits any more.

        Args:
            gone: returns when the client has gone.

        Raises: Refused (503) when the queue is full, the deadline passes or the server stops; ClientGone; and what
            the call raises.
        """
        abandon = threading.Event()
        with self._lock:
            if self._stopping:
                raise _stopping()
            if len(self._abandon) > self.max_waiting:  # one of them is being computed
                raise Refused(503, f"{self.max_waiting} requests wait already", "server", "Try again", retry_after=1)
            self._abandon.add(abandon)

        def check() -> None:
            if abandon.is_set():
                raise Abandoned

        def work() -> Result:
            check()
            return call(check)

        job = self._thread.submit(work)
        job.add_done_callback(lambda _: self._leave(abandon))
        result = asyncio.wrap_future(job)
        leaving = asyncio.ensure_future(gone())
        both: set[asyncio.Future[Any]] = {result, leaving}
        try:
            await asyncio.wait(both, timeout=self.seconds, return_when=asyncio.FIRST_COMPLETED)
            if result.done():
                return result.result()
            if leaving.done():
                raise ClientGone
            raise Refused(
                503, f"not done after {self.seconds:g} s", "server", "Ask for less, or try again", retry_after=5
            )
        except (Abandoned, asyncio.CancelledError) as err:
            if self._stopping:
                raise _stopping() from err
            raise
        finally:
            abandon.set()
            result.cancel()
            leaving.cancel()

    def stop(self) -> None:
        """Refuse what waits and what comes; what is computed ends at its next check."""
        with self._lock:
            self._stopping = True
            for abandon in self._abandon:
                abandon.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _leave(self, abandon: threading.Event) -> None:
        with self._lock:
            self._abandon.discard(abandon)


def _stopping() -> Refused:
    return Refused(503, "the server is stopping", "server", "Start it again", retry_after=5)
