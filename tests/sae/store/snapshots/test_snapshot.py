"""Snapshots: the same parts in the same order as their records say, compact on disk and in memory."""

import io
import json
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae.errors import StoreError
from sae.store import layout
from sae.store.artefacts.provenance import provenance
from sae.store.artefacts.record import Record
from sae.store.artefacts.record import encode as encode_record
from sae.store.artefacts.records import require_record
from sae.store.part.encoding import Dtype, Encoding, encode
from sae.store.part.writer import PartLayout
from sae.store.reading.blocks import iter_rows
from sae.store.snapshots import part_sets, part_table_file
from sae.store.snapshots.moments import decode_vector, merge_sums
from sae.store.snapshots.part_table import PartTable, joined, table_of
from sae.store.snapshots.part_table_file import read_table, write_tables
from sae.store.snapshots.snapshot import SnapshotSpec, commit_snapshot, read_snapshot
from sae.store.storage.filesystem import Storage
from tests.conftest import MakeSnapshot
from tests.sae.store.snapshots.part_records import layout_of, make_parts


@st.composite
def part_records(draw: st.DrawFn) -> list[Record]:
    """Records of parts of a few sets, some without rows, some in files beyond 4 GiB."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    sizes = draw(st.lists(st.integers(0, 5), min_size=1, max_size=12))
    large = draw(st.booleans())
    n_sets = draw(st.integers(1, 3))
    dtype = draw(st.sampled_from(get_args(Dtype)))

    def encoding() -> Encoding:
        if dtype == "int8":
            return encode(torch.from_numpy(rng.standard_normal((4, 3))), dtype)[1]
        return Encoding(dtype=dtype, exponent=int(rng.integers(3)) if dtype == "float16" else 0)

    return [
        Record(
            ref=f"parts/{int(rng.integers(n_sets)):016x}",
            part=int(rng.integers(1 << 20)),
            code_version=1,
            spec={},
            inputs={},
            content=f"{int(rng.integers(1 << 63)) * 2 + 1:016x}",
            files=({"name": "part.parquet", "n_bytes": 1 + int(rng.integers(1 << 30)) + (large << 33), "xxh3": ""},),
            metrics={"layout": layout_of(rng, n_groups, encoding=encoding()).model_dump(mode="json")},
            produced=provenance(0.0),
        )
        for n_groups in sizes
    ]


def written(tables: list[PartTable]) -> bytes:
    buffer = io.BytesIO()
    write_tables(buffer, tables, {"more": "words"})
    return buffer.getvalue()


@given(part_records(), st.data())
def test_a_table_says_what_the_records_in_json_say(records: list[Record], data: st.DataObject) -> None:
    cuts = sorted({0, len(records), *data.draw(st.lists(st.integers(1, max(len(records) - 1, 1)), max_size=4))})
    pieces = [table_of(records[start:stop]) for start, stop in pairwise(cuts)]
    found, metadata = read_table(io.BytesIO(written(pieces)))
    dtype = records[0].metrics["layout"]["encoding"]["dtype"]
    assert found.dtype == dtype
    assert metadata["more"] == "words"
    for table in (table_of(records), joined(pieces), found):
        assert len(table) == len(records)
        for index, record in enumerate(records):
            assert table.refs[table.part_set[index]] == record.ref
            assert table.part[index] == record.part
            assert table.path(index) == record.path("part.parquet")
            assert table.n_bytes[index] == record.files[0].n_bytes
            encoding = table.encoding(index)
            if dtype == "int8":
                assert encoding is None
                encoding = Encoding.model_validate(record.metrics["layout"]["encoding"])
            assert table.layout(index, encoding).model_dump(mode="json") == record.metrics["layout"]
    assert set(found.refs) == {record.ref for record in records}


@given(part_records(), st.integers(1, 5), st.integers(0, 12), st.integers(0, 12))
def test_the_same_parts_give_the_same_bytes_however_they_come(
    records: list[Record], at_once: int, first: int, second: int
) -> None:
    first, second = sorted((first % (len(records) + 1), second % (len(records) + 1)))
    cuts = sorted({0, first, second, len(records)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part_table_file, "PARTS_AT_ONCE", at_once)
        whole = written([table_of(records)])
        assert written([table_of(records[a:b]) for a, b in pairwise(cuts)]) == whole
        assert len(read_table(io.BytesIO(whole))[0]) == len(records)


def test_parts_of_two_kinds_are_refused(storage: Storage) -> None:
    narrow, _ = make_parts(storage, 2, size=1)
    records = [require_record(storage, narrow.ref, part) for part in range(2)]
    wide = records[1].model_copy(
        update={"metrics": {"layout": layout_of(np.random.default_rng(0), 1, d_in=7).model_dump(mode="json")}}
    )
    for refuse in (
        lambda: table_of([records[0], wide]),
        lambda: joined([table_of([records[0]]), table_of([wide])]),
        lambda: written([table_of([records[0]]), table_of([wide])]),
    ):
        with pytest.raises(StoreError, match="a snapshot has one kind"):
            refuse()


@pytest.mark.parametrize("n_tokens", [None, 85, 1])
def test_a_snapshot_lists_the_parts_of_its_sets_in_order(any_storage: Storage, n_tokens: int | None) -> None:
    sets = [make_parts(any_storage, n_parts, size) for size, n_parts in ((3, 5), (1, 2), (2, 4))]
    spec = SnapshotSpec(parts=tuple(spec.ref for spec, _ in sets), n_tokens=n_tokens)
    record = commit_snapshot(any_storage, spec)
    snapshot = read_snapshot(any_storage, spec.ref)
    expected = [record for _, records in sets for record in records][: None if n_tokens is None else -(-n_tokens // 10)]
    assert [(part.ref, part.part) for part in snapshot.parts] == [(each.ref, each.part) for each in expected]
    assert [part.path for part in snapshot.parts] == [each.path("part.parquet") for each in expected]
    layouts = [PartLayout.model_validate(each.metrics["layout"]) for each in expected]
    assert [part.layout for part in snapshot.parts] == layouts
    assert [part.n_rows for part in snapshot.parts] == snapshot.part_rows.tolist() == [each.n_rows for each in layouts]
    assert snapshot.row_groups == [[group.n_rows for group in each.row_groups] for each in layouts]
    assert [
        snapshot.group_rows_flat[start:stop].tolist() for start, stop in pairwise(snapshot.group_starts.tolist())
    ] == snapshot.row_groups
    assert snapshot.n_rows == sum(each.n_rows for each in layouts) == record.metrics["n_rows"]
    assert record.metrics["n_parts"] == len(snapshot.parts) == len(expected)
    assert record.metrics["n_bytes"] == sum(each.files[0].n_bytes for each in expected)
    sums = merge_sums(each.metrics for each in expected)
    assert snapshot.sums["n_special"] == sums["n_special"] == record.metrics["n_special"]
    assert snapshot.mean.tolist() == (decode_vector(sums["sum"]) / snapshot.n_rows).tolist()
    variance = sums["sum_sq"] / snapshot.n_rows - float(snapshot.mean @ snapshot.mean)
    assert snapshot.mean_sq_norm == max(variance, 0.0)
    assert set(snapshot.refs) == {each.ref for each in expected}


def test_parts_are_found_by_index_as_in_any_sequence(storage: Storage) -> None:
    spec, records = make_parts(storage, 5)
    commit_snapshot(storage, SnapshotSpec(parts=(spec.ref,), n_tokens=None))
    parts = read_snapshot(storage, SnapshotSpec(parts=(spec.ref,), n_tokens=None).ref).parts
    assert len(parts) == 5
    assert [part.part for part in parts[1:4]] == [1, 2, 3]
    assert parts[-1].path == records[4].path("part.parquet")
    assert parts[2] is parts[2] is parts[-3]
    for outside in (5, -6):
        with pytest.raises(IndexError, match="of 5"):
            parts[outside]


def test_indexes_do_not_change_a_snapshot(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_sets, "MAX_GROUPS", 4)
    spec, _ = make_parts(storage, 11)
    snapshots = [SnapshotSpec(parts=(spec.ref,), n_tokens=n_tokens) for n_tokens in (None, 75)]
    contents = [commit_snapshot(storage, each).content for each in snapshots]
    for group in part_sets.groups_of(11):
        part_sets.write_index(storage, spec.ref, 11, group)
    assert len(storage.list(layout.index_folder(spec.ref))) == 4
    for each in snapshots:
        storage.remove(layout.record_path(each.ref))
    assert [commit_snapshot(storage, each).content for each in snapshots] == contents


def test_the_head_is_short_and_speaks_for_itself(storage: Storage) -> None:
    spec, _ = make_parts(storage, 40)
    record = commit_snapshot(storage, SnapshotSpec(parts=(spec.ref,), n_tokens=None))
    head = json.loads(storage.read_bytes(record.path("snapshot.json")))
    assert head["parts"] == [spec.ref]
    assert (head["n_parts"], head["d_in"], head["dtype"]) == (40, 3, "float16")
    assert len(storage.read_bytes(record.path("snapshot.json"))) < 1000


def test_scales_and_offsets_of_int8_are_read_from_records_when_they_are_used(
    storage: Storage, make_snapshot: MakeSnapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((20, 4), np.float32) * scale for scale in (1.0, 30.0)]
    snapshot = make_snapshot(storage, parts, row_group_rows=8, dtype="int8")
    read: list[int | None] = []
    monkeypatch.setattr(
        "sae.store.snapshots.snapshot.require_record", lambda *about: read.append(about[2]) or require_record(*about)
    )
    assert [part.n_rows for part in snapshot.parts] == [20, 20]
    assert read == []
    for index in (1, 0, 1):
        expected = require_record(storage, snapshot.refs[0], index).metrics["layout"]["encoding"]
        assert snapshot.parts[index].layout.encoding.model_dump(mode="json") == expected
    assert read == [1, 0]
    for index, block in enumerate(iter_rows(storage, snapshot)):
        whole = parts[index // 3]
        assert np.abs(block.act - whole[index % 3 * 8 :][: len(block.act)]).max() < np.ptp(whole, axis=0).max() / 200


def test_a_part_of_int8_that_was_made_anew_is_refused(storage: Storage, make_snapshot: MakeSnapshot) -> None:
    rng = np.random.default_rng(0)
    snapshot = make_snapshot(storage, [rng.standard_normal((20, 4), np.float32)], row_group_rows=8, dtype="int8")
    path = layout.record_path(snapshot.refs[0], 0)
    record = require_record(storage, snapshot.refs[0], 0)
    storage.replace(path, encode_record(record.model_copy(update={"content": "f" * 16})))
    with pytest.raises(StoreError, match="made anew with other bytes"):
        _ = snapshot.parts[0].layout
