"""The commit protocol: the record is the truth, the first one wins, damage is named."""

import json
from pathlib import Path
from typing import ClassVar

import pytest

from sae.errors import ConfigError, DamagedError, StoreError
from sae.store import layout
from sae.store.artefacts.record import FORMAT
from sae.store.artefacts.records import is_intact, local_files, read_record, require_record, verify
from sae.store.storage.filesystem import Storage
from tests.sae.store.things import ThingSpec, make


def test_an_artefact_exists_when_its_record_does(any_storage: Storage) -> None:
    spec = ThingSpec(size=1)
    assert read_record(any_storage, spec.ref) is None
    with pytest.raises(StoreError, match="never finished"):
        require_record(any_storage, spec.ref)
    record = make(any_storage, spec, {"a.txt": b"alpha", "sub/b.txt": b"beta"})
    assert read_record(any_storage, spec.ref) == record
    assert record.inputs == {"source": "sources/0123456789abcdef", "more[0]": "sources/aaaaaaaaaaaaaaaa"}
    with local_files(any_storage, record) as folder:
        assert (folder / "sub/b.txt").read_bytes() == b"beta"


def test_a_second_writer_with_equal_bytes_changes_nothing(any_storage: Storage) -> None:
    first = make(any_storage, ThingSpec(size=1), {"a": b"same"})
    second = make(any_storage, ThingSpec(size=1), {"a": b"same"})
    assert second == first  # with the first one's time of making
    assert verify(any_storage, first) == []


def test_verify_finds_a_flipped_byte_and_a_truncation(storage: Storage) -> None:
    record = make(storage, ThingSpec(size=1), {"a": b"hello", "b": b"world"})
    Path(storage.full(record.path("a"))).write_bytes(b"hellO")
    Path(storage.full(record.path("b"))).write_bytes(b"wor")
    problems = verify(storage, record)
    assert "differs from the recorded hash" in problems[0]
    assert "3 bytes, recorded 5" in problems[1]


def test_verify_looks_at_parts_and_at_the_records_themselves(any_storage: Storage) -> None:
    spec = ThingSpec(size=1)
    record = make(any_storage, spec, {"a": b"plan"})
    part = make(any_storage, spec, {"a": b"part"}, part=3)
    make(any_storage, spec, {"a": b"other part"}, part=4)
    assert verify(any_storage, record) == []
    any_storage.remove(part.path("a"))
    assert verify(any_storage, record) == verify(any_storage, part) == [f"{any_storage.uri(part.path('a'))}: missing"]
    any_storage.replace(layout.record_path(spec.ref, 4), b"{")
    any_storage.remove(layout.record_path(spec.ref))
    problems = verify(any_storage, record)
    assert len(problems) == 3
    assert "record.json: missing" in problems[0]
    assert "part-00004.json: the commit record is damaged" in problems[2]


def test_parts_have_records_of_their_own(any_storage: Storage) -> None:
    spec = ThingSpec(size=2)
    make(any_storage, spec, {"a": b"0"}, part=0)
    make(any_storage, spec, {"a": b"1"}, part=1)
    assert read_record(any_storage, spec.ref) is None
    records = [require_record(any_storage, spec.ref, part) for part in (0, 1)]
    assert [any_storage.read_bytes(record.path("a")) for record in records] == [b"0", b"1"]


def test_a_newer_format_is_refused_before_anything_else_is_read(storage: Storage) -> None:
    spec = ThingSpec(size=1)
    make(storage, spec, {"a": b"x"})
    path = Path(storage.full(layout.record_path(spec.ref)))
    path.write_text(json.dumps({"format": FORMAT + 1, "whatever": "it says then"}))
    for use in (read_record, is_intact):
        with pytest.raises(
            StoreError, match=rf"format {FORMAT + 1}, this version reads up to {FORMAT}\. Use a newer"
        ) as error:
            use(storage, spec.ref)
        assert not isinstance(error.value, DamagedError)
    with pytest.raises(StoreError, match=f"format {FORMAT + 1}"):
        make(storage, spec, {"a": b"x"})


def test_a_record_of_the_wrong_place_is_damaged(storage: Storage) -> None:
    spec = ThingSpec(size=1)
    make(storage, spec, {"a": b"x"}, part=1)
    storage.replace(layout.record_path(spec.ref, 2), storage.read_bytes(layout.record_path(spec.ref, 1)))
    with pytest.raises(DamagedError, match=r"part-00002\.json.*it is the record of .*, part 1"):
        read_record(storage, spec.ref, 2)


def test_identity_follows_content_and_code_version_only() -> None:
    class Newer(ThingSpec):
        code_version: ClassVar[int] = 2

    assert ThingSpec(size=1).ref == ThingSpec(size=1).ref
    assert len({ThingSpec(size=1).ref, ThingSpec(size=2).ref, Newer(size=1).ref}) == 3


def test_nothing_is_left_in_staging_after_success_or_failure(storage: Storage) -> None:
    make(storage, ThingSpec(size=1), {"a": b"x"})
    with pytest.raises(RuntimeError), storage.staging():
        raise RuntimeError
    assert storage.list(layout.STAGING) == []


def test_only_the_first_exclusive_create_wins(any_storage: Storage) -> None:
    assert any_storage.create_exclusive("x/y", b"first")
    assert not any_storage.create_exclusive("x/y", b"second")
    assert any_storage.read_bytes("x/y") == b"first"


def test_protocols_without_exclusive_create_are_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="gs:// has no exclusive create"):
        Storage("gs://bucket/x")


def test_an_unwritable_root_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot be written"):
        Storage(str(tmp_path / "file" / "root")).check_writable()
