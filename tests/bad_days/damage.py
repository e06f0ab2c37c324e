"""Bytes that are not what they were: found by whoever uses them, named, and computed again to the same bytes."""

import json
import random
import time
from collections.abc import Iterator
from typing import Literal

import pytest

from sae.errors import DamagedError, StoreError
from sae.store import layout
from sae.store.artefacts.record import FORMAT
from sae.store.artefacts.records import read_record, require_record
from sae.store.part.writer import PartLayout
from sae.store.storage.filesystem import Storage
from sae.store.upkeep.collect import delete_garbage, find_garbage
from tests.bad_days import small_store
from tests.bad_days.place import Place, uninterrupted
from tests.bad_days.small_store import N_PARTS, PARTS, SNAPSHOT

Harm = Literal["flipped byte", "truncated file", "deleted file"]


def damage(place: Place, harm: Harm, is_remote: bool, tries: int, seed: int = 0) -> Iterator[str]:
    """Harm a part or a file of the snapshot, then read as training does.

    Yields: what was found. Raises: AssertionError when harm went unnoticed or was not mended.
    """
    draw = random.Random(seed)
    origin = place.fresh(is_remote)
    small_store.build(origin)
    rows = small_store.read(origin)
    for _ in range(tries):
        storage = place.copy(origin)
        part = draw.choice([None, *range(N_PARTS)])
        record = require_record(storage, SNAPSHOT.ref if part is None else PARTS.ref, part)
        entry = draw.choice(record.files)
        path = record.path(entry.name)
        storage.fs.invalidate_cache()
        _harm(storage, path, harm, draw, record.metrics.get("layout"))
        with pytest.raises(DamagedError) as caught:
            small_store.read(storage)
        assert (caught.value.ref, caught.value.part) == (record.ref, part), caught.value
        assert storage.uri(path) in str(caught.value)
        found, _ = small_store.build_and_read(storage)
        assert found == rows
        small_store.check_resumed(storage, uninterrupted(), small_store.build, collected=False)
        yield "found on use and named; restored to equal bytes"


def _harm(storage: Storage, path: str, harm: Harm, draw: random.Random, places: object) -> None:
    if harm == "deleted file":
        storage.remove(path)
        return
    data = bytearray(storage.read_bytes(path))
    if harm == "truncated file":
        del data[draw.randrange(len(data) // 2) :]
    elif places is None:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    else:  # among the values: nobody needs the rest of a part
        part = PartLayout.model_validate(places)
        group = draw.choice(part.row_groups)
        data[group.offset + draw.randrange(group.n_rows * part.row_bytes)] ^= 1 << draw.randrange(8)
    storage.replace(path, bytes(data))


def newer_format(place: Place, what: Literal["part", "snapshot"], is_remote: bool, tries: int) -> Iterator[str]:
    """A record of a version to come: nobody reads on, and nobody touches it."""
    for number in range(tries):
        storage = place.fresh(is_remote)
        small_store.build(storage)
        path = layout.record_path(PARTS.ref, number % N_PARTS) if what == "part" else layout.record_path(SNAPSHOT.ref)
        fields = json.loads(storage.read_bytes(path))
        storage.replace(path, json.dumps(fields | {"format": FORMAT + 1, "of_the_future": number}).encode())
        before = _everything(storage)
        for use in (small_store.build, small_store.read if what == "snapshot" else small_store.write_snapshot):
            with pytest.raises(
                StoreError, match=f"in format {FORMAT + 1}, this version reads up to {FORMAT}"
            ) as caught:
                use(storage)
            assert not isinstance(caught.value, DamagedError)
        for each in list(find_garbage(storage, grace_seconds=0)):
            delete_garbage(storage, each)
        assert _everything(storage) == before
        yield "refused by name, nothing touched"


def _everything(storage: Storage) -> dict[str, bytes]:
    return {path: storage.read_bytes(path) for path in storage.sizes("")}


def two_writers(place: Place, equal: bool, is_remote: bool, tries: int) -> Iterator[str]:
    """Two processes commit one part at the same moment."""
    versions = (0, 0) if equal else (0, 1)
    contents = {}
    for version in set(versions):
        alone = place.fresh(False)
        small_store.write(alone, 1, version)
        contents[version] = require_record(alone, PARTS.ref, 1).content
    for _ in range(tries):
        storage = place.fresh(is_remote)
        at = time.monotonic() + 0.2
        writers = (place.children, place.rivals)
        for writer, version in zip(writers, versions, strict=True):
            writer.start("part", storage.root, 1, version, at=at, environment={"TMPDIR": str(place.fresh_folder())})
        said = [writer.end().said for writer in writers]
        record = read_record(storage, PARTS.ref, 1)
        assert record is not None, said
        before = _everything(storage)
        assert small_store.problems(storage) == []
        if equal:
            assert said == ["null"] * 2, said
            assert record.content == contents[0]
        else:
            winner = said.index("null")
            assert said[1 - winner].startswith("StoreError: "), said
            assert "the same work gave other bytes" in said[1 - winner]
            assert record.content == contents[versions[winner]]
            with pytest.raises(StoreError, match="the same work gave other bytes"):
                small_store.write(storage, 1, versions[1 - winner])
        small_store.collect(storage)
        assert before.items() >= _everything(storage).items()
        if equal:
            small_store.check_resumed(storage, uninterrupted(), small_store.build, collected=False)
        yield "both succeed with one set of bytes" if equal else "one wins and is kept, the other is refused"
