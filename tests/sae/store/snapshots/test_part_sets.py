"""What is finished of a part set: one listing says it, with an index or without, as every record by itself would."""

from pathlib import Path

import numpy as np
import pytest

from sae.errors import DamagedError, StoreError
from sae.store import layout
from sae.store.artefacts.records import is_intact
from sae.store.snapshots import part_sets
from sae.store.snapshots.moments import merge_sums
from sae.store.snapshots.part_sets import finished_parts, groups_of, require_parts, write_index
from sae.store.storage.filesystem import Storage
from tests.sae.store.snapshots.part_records import PartsSpec, make_part, make_parts, make_plan


@pytest.fixture
def in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large sets begin at four parts: seven parts are four groups of at most two."""
    monkeypatch.setattr(part_sets, "MAX_GROUPS", 4)


def index_all(storage: Storage, ref: str, n_parts: int) -> list[str]:
    """Write the indexes of all groups; returns their paths."""
    for group in groups_of(n_parts):
        write_index(storage, ref, n_parts, group)
    return [f"{layout.index_folder(ref)}/{name}" for name in storage.list(layout.index_folder(ref))]


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the parts whose own records are read from now on."""
    reads: list[int] = []

    def counted(storage, ref, part=None):  # type: ignore[no-untyped-def]
        reads.append(part)
        return original(storage, ref, part)

    for name in ("read_record", "require_record"):
        original = getattr(part_sets, name)
        monkeypatch.setattr(part_sets, name, counted)
    return reads


def test_a_set_is_divided_into_equal_groups_whatever_is_wanted_of_it() -> None:
    assert groups_of(3) == [range(1), range(1, 2), range(2, 3)]
    assert len(groups_of(10_000)) == 10_000
    large = groups_of(1_000_000)
    assert large[0] == range(100)
    assert [part for group in large for part in group] == list(range(1_000_000))
    some = groups_of(1_000_000, 250)
    assert some == [range(100), range(100, 200), range(200, 250)]
    assert groups_of(0) == groups_of(5, 0) == []


@pytest.mark.usefixtures("in_groups")
@pytest.mark.parametrize("indexed", [False, True])
def test_what_is_finished_is_what_every_part_by_itself_says(any_storage: Storage, indexed: bool) -> None:
    n_parts = 12
    spec, records = make_parts(any_storage, n_parts)
    if indexed:
        index_all(any_storage, spec.ref, n_parts)
    assert finished_parts(any_storage, spec.ref, n_parts).all()
    any_storage.remove(layout.record_path(spec.ref, 1))
    any_storage.remove(records[2].path("part.parquet"))
    any_storage.replace(records[5].path("part.parquet"), b"x" * 77)
    any_storage.replace(f"{layout.content_folder(spec.ref, 'f' * 16, 7)}/part.parquet", b"a writer that came too late")
    any_storage.remove(records[9].path("part.parquet"))
    any_storage.replace(f"{layout.content_folder(spec.ref, 'f' * 16, 9)}/part.parquet", b"a writer that came too late")
    found = finished_parts(any_storage, spec.ref, n_parts)
    assert found.tolist() == [is_intact(any_storage, spec.ref, part) for part in range(n_parts)]
    assert np.flatnonzero(~found).tolist() == [1, 2, 5, 9]


def test_a_damaged_record_is_not_finished(storage: Storage) -> None:
    spec, _ = make_parts(storage, 3)
    storage.replace(layout.record_path(spec.ref, 1), b"{}")
    assert finished_parts(storage, spec.ref, 3).tolist() == [True, False, True]
    with pytest.raises(DamagedError, match=r"part-00001\.json") as error:
        list(require_parts(storage, spec.ref, 3, 3))
    assert error.value.part == 1


def test_a_part_without_a_file_is_named(storage: Storage) -> None:
    spec, records = make_parts(storage, 3)
    storage.remove(records[2].path("part.parquet"))
    with pytest.raises(DamagedError, match=r"part\.parquet: missing") as error:
        list(require_parts(storage, spec.ref, 3, 3))
    assert (error.value.ref, error.value.part) == (spec.ref, 2)
    storage.remove(layout.record_path(spec.ref, 2))
    with pytest.raises(StoreError, match="was never finished"):
        list(require_parts(storage, spec.ref, 3, 3))
    assert len(list(require_parts(storage, spec.ref, 3, 2))) == 2


@pytest.mark.usefixtures("in_groups")
def test_with_indexes_no_record_is_read_and_nothing_else_changes(
    any_storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_parts = 7
    spec, records = make_parts(any_storage, n_parts)
    without = list(require_parts(any_storage, spec.ref, n_parts, n_parts))
    assert len(index_all(any_storage, spec.ref, n_parts)) == 3  # the last group is one part
    reads = count_reads(monkeypatch)
    found = list(require_parts(any_storage, spec.ref, n_parts, n_parts))
    assert finished_parts(any_storage, spec.ref, n_parts).all()
    assert set(reads) == {6}
    assert [group.sums for group in found] == [group.sums for group in without]
    paths = [group.table.path(i) for group in found for i in range(len(group.table))]
    assert paths == [record.path("part.parquet") for record in records]
    # Half a group is not what its index speaks of.
    reads.clear()
    (whole, half) = require_parts(any_storage, spec.ref, n_parts, 3)
    assert reads == [2]
    assert half.sums == merge_sums([records[2].metrics])
    assert whole.sums == merge_sums(record.metrics for record in records[:2])


@pytest.mark.usefixtures("in_groups")
@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "of a later version"])
def test_a_damaged_index_is_passed_over(
    storage: Storage, damage: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, records = make_parts(storage, 8)
    if damage == "of a later version":
        monkeypatch.setattr(part_sets, "INDEX_VERSION", "2")
    path = Path(storage.full(index_all(storage, spec.ref, 8)[1]))
    monkeypatch.undo()
    monkeypatch.setattr(part_sets, "MAX_GROUPS", 4)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 16 * (damage == "flipped")
    path.write_bytes({"cut": data[:-9], "empty": b""}.get(damage, bytes(data)))
    assert finished_parts(storage, spec.ref, 8).all()
    groups = list(require_parts(storage, spec.ref, 8, 8))
    assert [int(content) for group in groups for content in group.table.content] == [
        int(record.content, 16) for record in records
    ]
    assert ("damaged; the parts' own records are read" in caplog.text) == (damage != "of a later version")


@pytest.mark.usefixtures("in_groups")
def test_an_index_does_not_outlive_the_part_it_speaks_of(storage: Storage) -> None:
    spec, records = make_parts(storage, 8)
    index_all(storage, spec.ref, 8)
    # Somebody deletes a part and makes it anew, and the bytes are others.
    storage.remove(layout.record_path(spec.ref, 3))
    storage.remove(records[3].path("part.parquet"))
    assert not finished_parts(storage, spec.ref, 8)[3]
    new = make_part(storage, spec, 3, version=1)
    assert new.content != records[3].content
    named = [group.table.path(i) for group in require_parts(storage, spec.ref, 8, 8) for i in range(len(group.table))]
    assert named[3] == new.path("part.parquet")
    write_index(storage, spec.ref, 8, range(2, 4))
    assert finished_parts(storage, spec.ref, 8).all()


@pytest.mark.usefixtures("in_groups")
def test_an_index_is_written_for_a_whole_finished_group_only(storage: Storage) -> None:
    spec = PartsSpec(size=1)
    make_plan(storage, spec, 8)
    for part in (0, 1, 2):
        make_part(storage, spec, part)
    for parts in (range(1), range(1, 3), range(3)):
        write_index(storage, spec.ref, 8, parts)
    assert storage.list(layout.index_folder(spec.ref)) == []
    with pytest.raises(StoreError, match="was never finished"):
        write_index(storage, spec.ref, 8, range(2, 4))
    write_index(storage, spec.ref, 8, range(2))
    write_index(storage, spec.ref, 8, range(2))  # another machine's
    assert len(storage.list(layout.index_folder(spec.ref))) == 1
