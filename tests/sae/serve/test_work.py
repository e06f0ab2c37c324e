"""The queue before the thread that computes."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from sae.serve.refusals import Refused
from sae.serve.work import ClientGone, Work


async def stays() -> None:
    await asyncio.Event().wait()


def until_abandoned(check: Callable[[], None]) -> None:
    while True:
        check()
        time.sleep(0.001)


async def becomes(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


def test_results_and_errors_come_back() -> None:
    async def run() -> None:
        work = Work()
        assert await work.run(lambda _: 7, stays) == 7
        with pytest.raises(ZeroDivisionError):
            await work.run(lambda _: 1 // 0, stays)
        work.stop()

    asyncio.run(run())


def test_what_does_not_fit_is_refused_at_once_and_room_comes_back() -> None:
    async def run() -> None:
        work = Work(max_waiting=2)
        go = threading.Event()
        running = [asyncio.ensure_future(work.run(lambda _: go.wait(5), stays)) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Refused, match="2 requests wait") as refused:
            await work.run(lambda _: None, stays)
        assert (refused.value.status, refused.value.headers) == (503, {"Retry-After": "1"})
        go.set()
        assert await asyncio.gather(*running) == [True] * 3
        assert await work.run(lambda _: 1, stays) == 1
        work.stop()

    asyncio.run(run())


@pytest.mark.parametrize("how", ["deadline", "client"])
def test_a_call_nobody_waits_for_ends(how: str) -> None:
    async def leaves() -> None:
        await asyncio.sleep(0.05)

    async def run() -> None:
        work = Work(max_waiting=0, seconds=0.1 if how == "deadline" else 30)
        with pytest.raises(Refused if how == "deadline" else ClientGone):
            await work.run(until_abandoned, stays if how == "deadline" else leaves)
        await becomes(lambda: not work._abandon)
        assert await work.run(lambda _: 1, stays) == 1
        work.stop()

    asyncio.run(run())


def test_stopping_ends_what_runs_and_what_waits() -> None:
    async def run() -> None:
        work = Work()
        begun = threading.Event()

        def long(check: Callable[[], None]) -> None:
            begun.set()
            until_abandoned(check)

        running = [asyncio.ensure_future(work.run(long, stays)) for _ in range(3)]
        await becomes(begun.is_set)
        work.stop()
        found = await asyncio.gather(*running, work.run(long, stays), return_exceptions=True)
        assert [getattr(each, "status", each) for each in found] == [503] * 4
        assert all("stopping" in str(each) for each in found)

    asyncio.run(run())
