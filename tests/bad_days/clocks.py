"""Clocks that are years ahead or behind: nothing that has an owner is deleted, and no byte depends on them."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from sae.store import layout
from sae.store.storage import staging
from tests.bad_days import small_store
from tests.bad_days.place import Place, uninterrupted
from tests.bad_days.small_store import PARTS

YEARS = 365.25 * 86400
JUMPS = (10 * YEARS, -10 * YEARS)


def collector(place: Place, is_remote: bool, tries: int) -> Iterator[str]:
    """A writer is stopped between its files and its record, while a collector's clock is wrong."""
    for number in range(tries):
        jump = JUMPS[number % 2]
        storage = place.fresh(is_remote)
        small_store.write(storage, 0)
        go_on = place.fresh_folder() / "go-on"
        environment = {"TMPDIR": str(place.fresh_folder())}
        place.children.start("part, with a stop", storage.root, 1, str(go_on), environment=environment)
        deadline = time.monotonic() + 60
        while not go_on.with_suffix(".stopped").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        # On a bucket the collector may take the files of a writer without a record: it puts them back.
        deleted = place.rivals.run("collect", storage.root, 86400, clock=jump, environment=environment)
        assert deleted.signal == 0
        if not is_remote:
            assert json.loads(deleted.said) == []
        go_on.touch()
        assert place.children.end().said == "null"
        record = layout.record_path(PARTS.ref, 1)
        small_store.check_whole(storage, {record, layout.record_path(PARTS.ref, 0)})
        small_store.check_resumed(storage, uninterrupted(), small_store.build, collected=True)
        yield f"{'ahead' if jump > 0 else 'behind'}: nothing owned is lost"


def staging_folders(place: Place, is_remote: bool, tries: int) -> Iterator[str]:
    """Unfinished files of this machine's living, of another machine, and of somebody who is about to lock them."""
    for number in range(tries):
        jump = JUMPS[number % 2]
        storage = place.fresh(is_remote)
        scratch = place.fresh_folder() if is_remote else Path(storage.full(layout.STAGING))
        environment = {"TMPDIR": str(scratch)}
        small_store.write(storage, 0)
        prefix = "sae-pipeline-" if is_remote else ""
        with staging.private_folder(scratch, prefix) as alive:
            (alive / "half").write_text("x")
            theirs, unborn = scratch / f"{prefix}1-theirs", scratch / f"{prefix}2-unborn"
            for folder in (theirs, unborn):
                (folder / staging.FILES).mkdir(parents=True)
            (theirs / staging.LOCK).write_text("another kernel")
            kept = sorted(os.listdir(scratch))
            for work, arguments in (("build", ()), ("collect", (86400,))):
                end = place.children.run(work, storage.root, *arguments, clock=jump, environment=environment)
                assert end.signal == 0
                assert end.said in ("null", "[]"), end.said
            assert sorted(os.listdir(scratch)) == kept
            assert (alive / "half").exists()
        yield f"{'ahead' if jump > 0 else 'behind'}: nothing owned is lost"
        assert small_store.problems(storage) == []


def build(place: Place, is_remote: bool, tries: int) -> Iterator[str]:
    """A run whose clock jumps between its parts."""
    for number in range(tries):
        storage = place.fresh(is_remote)
        for part in range(small_store.N_PARTS):
            jump = JUMPS[(part + number) % 2]
            assert place.children.run("part", storage.root, part, clock=jump).said == "null"
        assert place.children.run("build", storage.root, clock=JUMPS[number % 2]).said == "null"
        small_store.check_resumed(storage, uninterrupted(), small_store.build, collected=True)
        yield "equal bytes"
