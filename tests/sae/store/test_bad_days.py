"""Bad days: real processes killed, sockets broken, disks filled. Nothing committed is lost or silently wrong.

Each fault checks for itself that what was committed is whole byte for byte, that collecting garbage takes only what no
record names, and that the same work, done again, ends with the bytes of an uninterrupted run. Here a few of each are
made; `python -m tests.benchmarks bad_days` makes many and counts.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bad_days import disks, kills
from tests.bad_days.children import children
from tests.bad_days.place import NotHereError, Place
from tests.bad_days.table import FAULTS, Fault, made

FEW = 6
"""Tries of a fault that is made as often as any."""
SLOW = (
    "extraction",
    "lost answer",
    "reset",
    "stall",
    "two writers, equal bytes, S3",
    "repair",
    "disk full",
    "in pieces",
    "clock jumps, parts and snapshot",
    "newer format of a part, S3",
    "flipped byte, S3",
    "truncated file, S3",
)
"""In names of faults that are left to `make test-all`."""


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple]:
    with children() as one, children() as other:
        yield one, other


@pytest.fixture
def place(hosts: tuple, s3_environment: dict[str, str], s3_server: str, tmp_path: Path) -> Place:
    return Place(tmp_path / "place", *hosts, s3_server)


CASES = [
    pytest.param(fault, id=fault.name, marks=[pytest.mark.slow] if any(word in fault.name for word in SLOW) else [])
    for fault in FAULTS
]


@pytest.mark.parametrize("fault", CASES)
def test_nothing_committed_is_lost_or_silently_wrong(fault: Fault, place: Place) -> None:
    try:
        outcomes = made(fault, place, FEW)
    except NotHereError as reason:
        pytest.skip(str(reason))
    assert len(outcomes) >= fault.least


def test_a_disk_without_room_is_named_and_nothing_is_half_written(place: Place) -> None:
    try:
        found = disks.full_disk(place.fresh_folder(), tries=4)
    except NotHereError as reason:
        pytest.skip(str(reason))
    for outcomes in found.values():
        assert sum(outcome.startswith("named error, nothing half-written") for outcome in outcomes) >= 2, found


@pytest.mark.slow
@pytest.mark.parametrize("job", kills.JOBS)
def test_a_kill_before_any_system_call_leaves_the_old_or_the_new_state(job: str, place: Place) -> None:
    try:
        outcomes = list(kills.at_system_calls(place, job, tries=None))
    except NotHereError as reason:
        pytest.skip(str(reason))
    assert len(outcomes) > 50
    if job != "collection of garbage":
        assert {outcome.split()[0] for outcome in outcomes} == {"old", "new"}


@pytest.mark.slow
def test_a_kill_around_any_request_leaves_the_old_or_the_new_state(place: Place) -> None:
    outcomes = list(kills.around_requests(place, "commit of a part", tries=None))
    assert {outcome.split()[0] for outcome in outcomes} == {"old", "new"}


@pytest.mark.slow
def test_an_upload_torn_at_any_request_is_given_up_or_done(place: Place) -> None:
    outcomes = set(kills.torn_uploads(place, tries=None))
    assert any("torn upload given up" in outcome for outcome in outcomes)
    assert any(outcome.startswith("committed") for outcome in outcomes)
