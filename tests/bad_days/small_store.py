"""A store of a few small parts that is built step by step, and what must be true of it after any bad day."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from sae.errors import DamagedError, TransientError
from sae.extract.config import GivenPartsSpec, InlineSource
from sae.store import layout
from sae.store.artefacts.records import commit, is_intact, read_record
from sae.store.part.encoding import Encoding
from sae.store.part.writer import write_part
from sae.store.reading.loader import Loader
from sae.store.reading.shuffle import ShuffleConfig
from sae.store.snapshots.moments import encode_vector
from sae.store.snapshots.snapshot import PART_FILE, SnapshotSpec, commit_snapshot, read_snapshot
from sae.store.storage.filesystem import Storage
from sae.store.upkeep.collect import Garbage, delete_garbage, find_garbage
from sae.store.upkeep.verify import all_targets, verify_targets
from tests.sae.store.things import ThingSpec, make

N_PARTS, PART_ROWS, D_IN, ROW_GROUP_ROWS = 3, 1500, 16, 300
PARTS = GivenPartsSpec(
    source=InlineSource(values=((0.0, 1.0), (1.0, 0.0))),
    content="bad days",
    split="train",
    heldout_fraction=0,
    dtype="float16",
    part_bytes=1,
    row_group_bytes=1,
    seed=0,
)
SNAPSHOT = SnapshotSpec(parts=(PARTS.ref,), n_tokens=None)
BIG = ThingSpec(size=1)
BIG_BYTES = 11 << 20
"""More than two of the smallest pieces that S3 takes."""
PATIENCE = 30
"""How often work is tried again that a TransientError ended, as its task would be."""


def write(storage: Storage, part: int, version: int = 0) -> None:
    """Write and commit one part; another version has other bytes."""
    rng = np.random.default_rng([part, version])
    act = rng.standard_normal((PART_ROWS, D_IN), np.float32).astype(np.float16)
    numbers = np.arange(part * PART_ROWS, (part + 1) * PART_ROWS, dtype=np.int32)
    zeros = np.zeros(PART_ROWS, np.int32)
    with storage.staging() as folder:
        encoding = Encoding(dtype="float16")
        places = write_part(
            folder / PART_FILE, act, numbers, zeros, zeros, row_group_rows=ROW_GROUP_ROWS, encoding=encoding
        )
        wide = act.astype(np.float64)
        metrics = {
            "layout": places.model_dump(mode="json"),
            "n_rows": PART_ROWS,
            "sum": encode_vector(wide.sum(0)),
            "sum_sq": float((wide**2).sum()),
        }
        commit(storage, PARTS, folder, metrics, seconds=0.0, part=part)


def write_plan(storage: Storage) -> None:
    """Commit the part set itself."""
    with storage.staging() as folder:
        plan = {"n_parts": N_PARTS, "tokens_per_part": PART_ROWS, "d_in": D_IN}
        commit(storage, PARTS, folder, plan, seconds=0.0)


def write_snapshot(storage: Storage) -> None:
    """Freeze the parts."""
    commit_snapshot(storage, SNAPSHOT)


def write_big(storage: Storage) -> None:
    """Commit a file that is uploaded in pieces."""
    make(storage, BIG, {"big": np.random.default_rng(0).bytes(BIG_BYTES)})


def build(storage: Storage) -> None:
    """Whatever is not finished yet, in order: what the same command does when it is run again."""
    for part in range(N_PARTS):
        if not is_intact(storage, PARTS.ref, part):
            write(storage, part)
    if not is_intact(storage, PARTS.ref):
        write_plan(storage)
    if not is_intact(storage, SNAPSHOT.ref):
        write_snapshot(storage)


def read(storage: Storage) -> bytes:
    """All rows of an epoch, as training sees them."""
    loader = Loader(
        storage, read_snapshot(storage, SNAPSHOT.ref), 256, 0, shuffle=ShuffleConfig(n_streams=2, window_row_groups=4)
    )
    try:
        return b"".join(loader.__next__().numpy().tobytes() for _ in range(loader.batches_per_epoch))
    finally:
        loader.close()


def build_and_read(storage: Storage) -> tuple[bytes, list[DamagedError]]:
    """Build and read; what is found to be damaged on use is computed again. Returns: the rows, and what was damaged."""
    found: list[DamagedError] = []
    while True:
        build(storage)
        try:
            return read(storage), found
        except DamagedError as err:
            assert len(found) < N_PARTS + 1, found
            found.append(err)
            if err.part is None:
                write_snapshot(storage)
            else:
                write(storage, err.part)


def patiently(work: Callable[[], Any]) -> tuple[Any, int]:
    """Do work again as long as it ends with a TransientError. Returns: its result, and how often it did."""
    for failures in range(PATIENCE):
        try:
            return work(), failures
        except TransientError:
            continue
    return work(), PATIENCE


# What must be true.


def contents(storage: Storage) -> dict[str, Any]:
    """Every file outside the staging folder; of records all but when and where they were made."""
    found: dict[str, Any] = {}
    for file in storage.walk(""):
        if file.path.startswith(layout.STAGING):
            continue
        data = storage.read_bytes(file.path)
        found[file.path] = data
        if file.path.count("/") == 2 and file.path.endswith(".json"):
            fields = json.loads(data)
            found[file.path] = {name: fields[name] for name in fields if name not in ("produced", "checksum")}
    return found


def named(storage: Storage) -> set[str]:
    """Every record, and every file that one names."""
    paths = set()
    for target in all_targets(storage):
        record = read_record(storage, target.ref, target.part)
        assert record is not None
        paths |= {layout.record_path(*target), *(record.path(entry.name) for entry in record.files)}
    return paths


def problems(storage: Storage) -> list[str]:
    """Every difference between a finished artefact's bytes and its record."""
    checked = verify_targets(storage, all_targets(storage))
    return [problem.text for each in checked for problem in each.problems]


def check_whole(storage: Storage, at_least: set[str]) -> None:
    """All that was committed is there, byte for byte, and so is whatever has a record."""
    found = problems(storage)
    assert found == [], found
    assert at_least <= named(storage), sorted(at_least - named(storage))


def collect(storage: Storage) -> list[Garbage]:
    """Delete what no record names, however young it is; nothing else goes."""
    kept = named(storage)
    before = {path: storage.read_bytes(path) for path in kept}
    found = list(find_garbage(storage, grace_seconds=0))
    assert all(delete_garbage(storage, each) for each in found), found
    left = {file.path for file in storage.walk("")}
    # A staging folder without a lock may be one that is being made: it is left alone for a week.
    left = {path for path in left if not (path.startswith(layout.STAGING) and path.endswith("/.lock"))}
    assert left == kept, sorted(left ^ kept)
    assert {path: storage.read_bytes(path) for path in kept} == before
    assert list(storage.torn_uploads()) == []
    return found


def check_resumed(storage: Storage, expected: dict[str, Any], work: Callable[[Storage], Any], collected: bool) -> None:
    """The same work, done again, ends with the bytes of an uninterrupted run; before or after garbage is collected.

    Args:
        expected: `contents` of a root on which nothing went wrong.
        collected: whether garbage is collected first.
    """
    if collected:
        collect(storage)
    work(storage)
    check_whole(storage, set())
    collect(storage)
    found = contents(storage)
    different = sorted(path for path in found.keys() | expected.keys() if found.get(path) != expected.get(path))
    assert different == [], different
