"""Every fault by its name, with how often it is made when nothing else is said."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tests.bad_days import clocks, damage, disks, kills, networks, tiny_model
from tests.bad_days.place import Place

Make = Callable[[Place, int, int], Iterator[str]]
"""(place, tries, seed) -> what was found after each try.

Raises: AssertionError when anything was lost; NotHereError where this system does not let the fault be made.
"""
Somewhere = Callable[[Place, bool, int, int], Iterator[str]]
"""The same on a disk or (True) on a bucket."""


class Fault(NamedTuple):
    """One line of the table."""

    name: str
    make: Make
    share: float = 1.0
    """Of the tries that are asked for; a slow one is made less often."""
    least: int = 2


def _two(name: str, fault: Somewhere, share: float = 1.0) -> list[Fault]:
    """The same on a disk and on a bucket."""
    return [
        Fault(f"{name}, {where}", lambda p, tries, seed, there=there: fault(p, there, tries, seed), share)
        for where, there in (("disk", False), ("S3", True))
    ]


def _seedless(fault: Callable[..., Iterator[str]], *arguments: object) -> Somewhere:
    return lambda place, is_remote, tries, seed: fault(place, *arguments, is_remote, tries)


def _harm(harm: damage.Harm) -> Somewhere:
    return lambda place, is_remote, tries, seed: damage.damage(place, harm, is_remote, tries, seed)


def _kill(name: str) -> Make:
    return lambda place, tries, seed: kills.at_system_calls(place, name, tries, seed)


def _around_requests(place: Place, tries: int, seed: int) -> Iterator[str]:
    return kills.around_requests(place, "commit of a part", tries, seed)


@functools.cache
def _full_disk(place: Place, tries: int) -> dict[str, list[str]]:
    return disks.full_disk(place.fresh_folder(), tries)


def _disk(name: str) -> Fault:
    return Fault(f"disk full: {name}", lambda place, tries, seed: iter(_full_disk(place, tries)[name]))


KILL_SHARES = {"commit of a part": 5}
FAULTS: list[Fault] = [
    *(Fault(f"kill -9 before a system call, {name}", _kill(name), KILL_SHARES.get(name, 1)) for name in kills.JOBS),
    Fault("kill -9 around a request, S3", _around_requests, 0.5),
    Fault("kill -9 in an upload in pieces, S3", kills.torn_uploads, 0.5),
    *(
        Fault(
            f"{kind} on a tenth of requests: {work}",
            lambda p, tries, seed, make=make, kind=kind: make(p, kind, tries, seed),
            share=0.3,
            least=1,
        )
        for kind in networks.FAULTS
        for work, make in (("store and training's reads", networks.build_and_read), ("extraction", networks.extract))
    ),
    *(fault for harm in ("flipped byte", "truncated file", "deleted file") for fault in _two(harm, _harm(harm), 0.5)),
    *_two("two writers, equal bytes", _seedless(damage.two_writers, True), 0.5),
    *_two("two writers, other bytes", _seedless(damage.two_writers, False), 0.5),
    *(_disk(f"{work}, no {room} left") for work in disks.WORKS for room in disks.ROOMS),
    *(
        fault
        for what in ("part", "snapshot")
        for fault in _two(f"newer format of a {what}", _seedless(damage.newer_format, what), 0.2)
    ),
    Fault("NaN from a model", lambda p, tries, seed: iter(tiny_model.nan(p, tries)), 0.1, least=1),
    *_two("clock jumps, collector and writer", _seedless(clocks.collector), 0.2),
    *_two("clock jumps, staging folders", _seedless(clocks.staging_folders), 0.2),
    *_two("clock jumps, parts and snapshot", _seedless(clocks.build), 0.1),
]


def made(fault: Fault, place: Place, tries: int, seed: int = 0) -> list[str]:
    """What was found after each try of a fault."""
    return list(fault.make(place, max(fault.least, round(tries * fault.share)), seed))
