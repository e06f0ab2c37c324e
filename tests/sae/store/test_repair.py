"""Damage: found on use by whoever reads, named, and mended by the same work; other bytes change nothing."""

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch

from sae.architectures.config import TopKConfig
from sae.errors import DamagedError, StoreError, TransientError
from sae.evaluate.config import EvaluationConfig, EvaluationSpec
from sae.evaluate.evaluate import evaluate_sae
from sae.report.config import ReportConfig, ReportedSAE, ReportSpec
from sae.report.inputs import open_inputs
from sae.statistics.config import StatisticsConfig, StatisticsSpec
from sae.statistics.statistics import count_parts, merge_statistics, statistics_of_part
from sae.store import layout
from sae.store.artefacts import files
from sae.store.artefacts.records import commit, is_intact, local_files, read_record, require_record, verify
from sae.store.part.writer import PartLayout
from sae.store.reading.blocks import iter_rows
from sae.store.reading.loader import Loader
from sae.store.reading.shuffle import ShuffleConfig
from sae.store.snapshots.snapshot import read_snapshot
from sae.store.storage.filesystem import Storage
from sae.store.text.contexts import read_contexts, read_document_names
from sae.subject.load import load_subject, load_tokenizer
from tests.conftest import MakeSnapshot
from tests.sae.store.things import ThingSpec, make

HOOK_POINT = "gpt_neox.layers.0.mlp.act"


class SubjectSpec(ThingSpec):
    stage: ClassVar[str] = "subjects"


def everything(storage: Storage) -> dict[str, bytes]:
    """Every file below the root that is not hidden."""
    return {name: storage.read_bytes(name) for name in storage.sizes("")}


class Use(NamedTuple):
    """Something that reads a stored file."""

    ref: str
    part: int | None
    names: tuple[str, ...]
    read: Callable[[], Any]


@pytest.fixture
def read_store(
    make_world: Callable, make_given_world: Callable, one_layer_model: Path
) -> tuple[Storage, dict[str, Use]]:
    """A small store, and every kind of artefact file in it with the function that reads it."""
    world = make_world(d_in=12, sae_config=TopKConfig(d_sae=16, k=3))
    storage, tokens = world.storage, world.tokens[0]
    statistics = StatisticsSpec(
        config=StatisticsConfig(n_top=3, n_samples=16, n_per_group=2, context_tokens=5, n_neighbours=3),
        sae=world.sae_ref,
        snapshots=world.snapshots,
        tokens=world.tokens,
        hook_point=HOOK_POINT,
        seed=0,
    )
    for part in range(count_parts(storage, statistics)):
        statistics_of_part(storage, statistics, part)
    merge_statistics(storage, statistics)
    evaluation = EvaluationSpec(
        config=EvaluationConfig(n_bootstrap=10, untrained=None),
        sae=world.sae_ref,
        architecture=world.sae.config,
        train_snapshot=world.snapshots["train"],
        heldout_snapshot=world.snapshots["heldout"],
        hook_point=HOOK_POINT,
        seed=0,
    )
    evaluate_sae(storage, evaluation)
    entry = ReportedSAE(
        name="a",
        family="topk 8",
        sparsity="k 2",
        sae=world.sae_ref,
        evaluation=evaluation.ref,
        statistics=statistics.ref,
    )
    report = ReportSpec(config=ReportConfig(), saes=(entry,))
    with storage.staging() as folder:
        shutil.copytree(one_layer_model, folder, dirs_exist_ok=True)
        subject = commit(storage, SubjectSpec(size=1), folder, {}, seconds=0.0)
    known = make_given_world(np.eye(12), directions=np.eye(12, dtype=np.float32))
    shutil.copytree(known.storage.full(""), storage.full(""), dirs_exist_ok=True)
    given_snapshot = read_snapshot(storage, known.snapshots["train"])
    given_evaluation = evaluation.model_validate(
        evaluation.model_dump() | {"train_snapshot": given_snapshot.ref, "heldout_snapshot": None}
    )
    snapshot = read_snapshot(storage, world.snapshots["train"])
    part = snapshot.parts[1]

    def read_report() -> None:
        with open_inputs(storage, report):
            pass

    def rows() -> list:
        return list(iter_rows(storage, snapshot, [1]))

    return storage, {
        "training contexts": Use(tokens, None, ("train.parquet",), lambda: read_contexts(storage, tokens, "train")),
        "held-out contexts": Use(tokens, None, ("heldout.parquet",), lambda: read_contexts(storage, tokens, "heldout")),
        "documents": Use(tokens, None, ("documents.parquet",), lambda: read_document_names(storage, tokens)),
        "snapshot": Use(
            snapshot.ref, None, ("snapshot.json", "snapshot.parquet"), lambda: read_snapshot(storage, snapshot.ref)
        ),
        "activations": Use(part.ref, part.part, ("part.parquet",), rows),
        "subject": Use(
            subject.ref, None, tuple(e.name for e in subject.files), lambda: load_subject(storage, subject.ref)
        ),
        "tokenizer": Use(subject.ref, None, ("tokenizer.json",), lambda: load_tokenizer(storage, subject.ref)),
        "SAE": Use(
            world.sae_ref, None, ("sae.safetensors", "cfg.json"), lambda: statistics_of_part(storage, statistics, 0)
        ),
        "partial statistics": Use(
            statistics.ref, 1, ("partial.safetensors",), lambda: merge_statistics(storage, statistics)
        ),
        "statistics": Use(
            statistics.ref, None, ("statistics.json", "latents.parquet", "examples.parquet"), read_report
        ),
        "evaluation": Use(evaluation.ref, None, ("evaluation.json",), read_report),
        "true features": Use(
            given_snapshot.parts[0].ref,
            None,
            ("directions.safetensors",),
            lambda: evaluate_sae(storage, given_evaluation),
        ),
    }


def damages(data: bytes) -> Iterator[bytes | None]:
    """Missing, cut short, and one bit flipped at several places."""
    rng = np.random.default_rng(len(data))
    yield None
    yield from (data[:n] for n in (0, len(data) // 2, len(data) - 1))
    for place in (0, len(data) - 1, *rng.integers(0, len(data), 4)):
        changed = bytearray(data)
        changed[place] ^= 1 << int(rng.integers(8))
        yield bytes(changed)


def test_damage_is_found_by_whoever_reads(read_store: tuple[Storage, dict[str, Use]]) -> None:
    storage, uses = read_store
    for kind, use in uses.items():
        use.read()
        record = require_record(storage, use.ref, use.part)
        for name in use.names:
            path = Path(storage.full(record.path(name)))
            intact = path.read_bytes()
            for damaged in damages(intact):
                path.unlink(missing_ok=True)
                if damaged is not None:
                    path.write_bytes(damaged)
                assert is_intact(storage, use.ref, use.part) == (damaged is not None and len(damaged) == len(intact))
                if kind == "activations" and damaged is not None and _rows_are_whole(storage, use, intact, damaged):
                    use.read()
                    continue
                with pytest.raises(DamagedError, match="Run the same command again") as error:
                    use.read()
                assert (error.value.ref, error.value.part) == (use.ref, use.part), kind
                assert str(path) in str(error.value)
            path.write_bytes(intact)
        use.read()


def _rows_are_whole(storage: Storage, use: Use, intact: bytes, damaged: bytes) -> bool:
    """Whether the damage spares all values: footer and page headers are not needed."""
    part = PartLayout.model_validate(require_record(storage, use.ref, use.part).metrics["layout"])
    for group in part.row_groups:
        spans = [(group.offset, group.n_rows * part.row_bytes), *((o, group.n_rows * 4) for o in group.identity)]
        if any(damaged[start : start + size] != intact[start : start + size] for start, size in spans):
            return False
    return True


def test_a_file_that_was_checked_is_checked_again_once_it_changed(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SETTLED_NS", 0)  # as if the file had been written long ago
    record = make(storage, ThingSpec(size=1), {"a": b"x" * 1000})
    time.sleep(0.05)
    before = files._hash_unchanged.cache_info().hits
    for _ in range(3):
        with local_files(storage, record):
            pass
    assert files._hash_unchanged.cache_info().hits == before + 2
    with open(storage.full(record.path("a")), "r+b") as file:
        file.write(b"y")
    os.utime(storage.full(record.path("a")), ns=(0, 0))
    with pytest.raises(DamagedError, match="content differs from the recorded hash"), local_files(storage, record):
        pass


def test_only_the_files_that_are_wanted_are_looked_at(any_storage: Storage) -> None:
    record = make(any_storage, ThingSpec(size=1), {"a": b"1", "b": b"2"})
    any_storage.remove(record.path("b"))
    with local_files(any_storage, record, "a") as folder:
        assert (folder / "a").read_bytes() == b"1"
    with pytest.raises(DamagedError, match="b: missing"), local_files(any_storage, record):
        pass


def test_a_file_that_cannot_be_read_is_not_called_damaged() -> None:
    # Reading the first page of one's own memory fails like a bad sector: EIO.
    with pytest.raises(TransientError, match="Input/output error"):
        files.local_difference(Path("/proc/self/mem"), files.FileEntry(name="mem", n_bytes=0, xxh3="0"))


def test_damage_that_is_read_ahead_reaches_the_caller(storage: Storage, make_snapshot: MakeSnapshot) -> None:
    rows = np.arange(400, dtype=np.float32).repeat(4).reshape(400, 4)
    snapshot = make_snapshot(storage, [rows[:200], rows[200:]], row_group_rows=10)
    path = Path(storage.full(snapshot.parts[1].path))
    data = bytearray(path.read_bytes())
    data[snapshot.parts[1].layout.row_groups[11].offset] ^= 1
    path.write_bytes(bytes(data))
    loader = Loader(storage, snapshot, 8, 0, shuffle=ShuffleConfig(n_streams=2, window_row_groups=4))
    read: list[torch.Tensor] = []
    with pytest.raises(DamagedError, match="row group 11") as error:
        read.extend(loader)
    assert (error.value.ref, error.value.part) == (snapshot.parts[1].ref, 1)
    assert loader.cursor.batch == len(read) > 0  # the next batch is the one that could not be read
    loader.close()


@pytest.mark.parametrize("damage", [None, b"", b"alph", b"alphA", b"alpha and more"])
def test_the_same_work_puts_damaged_files_back_and_touches_nothing_else(
    any_storage: Storage, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    contents = {"a.txt": b"alpha", "sub/b.txt": b"beta"}
    for part in (None, 3):
        record = make(any_storage, ThingSpec(size=1), contents, part)
        before = everything(any_storage)
        inode = _inode(any_storage, record.path("sub/b.txt"))
        any_storage.remove(record.path("a.txt"))
        if damage is not None:
            any_storage.replace(record.path("a.txt"), damage)
        assert is_intact(any_storage, record.ref, part) == (damage == b"alphA")
        caplog.clear()
        assert make(any_storage, ThingSpec(size=1), contents, part) == record
        assert caplog.text.count("restored") == 1
        assert is_intact(any_storage, record.ref, part)
        assert everything(any_storage) == before
        assert _inode(any_storage, record.path("sub/b.txt")) == inode


def _inode(storage: Storage, path: str) -> int | None:
    return Path(storage.full(path)).stat().st_ino if storage.is_local else None


@pytest.mark.parametrize("harm", ["none", "deleted", "flipped"])
def test_other_bytes_are_refused_and_change_nothing(any_storage: Storage, harm: str) -> None:
    record = make(any_storage, ThingSpec(size=1), {"a": b"one", "b": b"two"})
    if harm == "deleted":
        any_storage.remove(record.path("a"))
    if harm == "flipped":
        any_storage.replace(record.path("a"), b"onE")
    before = everything(any_storage)
    with pytest.raises(StoreError, match=r"other bytes in a \(recorded: .* threads.*now: .* threads") as error:
        make(any_storage, ThingSpec(size=1), {"a": b"other", "b": b"two"})
    assert not isinstance(error.value, DamagedError)  # computing it once more would not help
    assert everything(any_storage) == before


def test_what_a_killed_writer_left_torn_is_overwritten(any_storage: Storage) -> None:
    contents = {"a": b"whole", "b": b"also whole"}
    content = make(any_storage, ThingSpec(size=1), contents).content
    torn = ThingSpec(size=2)
    any_storage.replace(f"{layout.content_folder(torn.ref, content)}/a", b"who")
    any_storage.replace(f"{layout.content_folder(torn.ref, content)}/b", b"ALSO WHOLE")
    assert not is_intact(any_storage, torn.ref)
    record = make(any_storage, torn, contents)
    assert is_intact(any_storage, torn.ref)
    assert verify(any_storage, record) == []


def test_a_file_on_a_bad_sector_is_put_back(storage: Storage) -> None:
    record = make(storage, ThingSpec(size=1), {"empty": b"", "a": b"x"})
    path = Path(storage.full(record.path("empty")))
    path.unlink()
    path.symlink_to("/proc/self/mem")
    with pytest.raises(TransientError), local_files(storage, record):
        pass
    make(storage, ThingSpec(size=1), {"empty": b"", "a": b"x"})
    assert verify(storage, record) == []
    assert not path.is_symlink()


def test_any_damage_to_a_record_is_found(memory_storage: Storage) -> None:
    spec = ThingSpec(size=1)
    record = make(memory_storage, spec, {"a.txt": b"alpha", "b": b"beta"}, part=5)
    path = layout.record_path(spec.ref, 5)
    intact = memory_storage.read_bytes(path)
    rng = np.random.default_rng(0)
    texts = [intact[:n] for n in range(len(intact) - 1)]  # the last byte ends the line
    for place in range(len(intact)):
        changed = bytearray(intact)
        changed[place] ^= 1 << int(rng.integers(8))
        texts.append(bytes(changed))
    logging.disable(logging.WARNING)
    for text in texts:
        memory_storage.fs.pipe_file(memory_storage.full(path), text)
        damage = None
        try:
            found = read_record(memory_storage, spec.ref, 5)
        except DamagedError as err:
            damage = err
        if damage is None:
            assert found == record, text  # 1e-05 and 1E-05
        else:
            assert (damage.ref, damage.part) == (spec.ref, 5)
            assert "part-00005.json: the commit record is damaged" in str(damage)
            assert not is_intact(memory_storage, spec.ref, 5)
    logging.disable(logging.NOTSET)


def _with_byte(data: bytes, place: int, value: int) -> bytes:
    return data[:place] + bytes([data[place] ^ value]) + data[place + 1 :]


def record_damages(data: bytes) -> dict[str, bytes]:
    def at(key: bytes) -> int:
        return data.index(key) + len(key)

    return {
        "empty": b"",
        "truncated": data[:100],
        "not UTF-8": _with_byte(data, 20, 0x80),
        "format": _with_byte(data, at(b'"format": '), 2),
        "content": _with_byte(data, at(b'"content": "'), 1),
        "files": _with_byte(data, at(b'"n_bytes": '), 1),
        "checksum": _with_byte(data, at(b'"checksum": "'), 1),
        "time": _with_byte(data, at(b'"created": "'), 1),
    }


@pytest.mark.parametrize("part", [None, 2])
def test_a_damaged_record_is_set_aside_and_made_again(
    any_storage: Storage, part: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    contents = {"a": b"alpha", "b": b"beta"}
    spec = ThingSpec(size=1)
    path = layout.record_path(spec.ref, part)
    intact = make(any_storage, spec, contents, part)
    aside: list[bytes] = []
    for name, damaged in record_damages(any_storage.read_bytes(path)).items():
        any_storage.replace(path, damaged)
        caplog.clear()
        assert not is_intact(any_storage, spec.ref, part), name
        assert len(caplog.records) == 1
        assert any("the commit record is damaged" in problem for problem in verify(any_storage, intact))
        with pytest.raises(DamagedError, match="the commit record is damaged"):
            require_record(any_storage, spec.ref, part)
        record = make(any_storage, spec, contents, part)
        assert record.model_copy(update={"produced": intact.produced}) == intact, name
        assert read_record(any_storage, spec.ref, part) == record
        assert is_intact(any_storage, spec.ref, part)
        aside.append(damaged)
    kept = [name for name in any_storage.list(spec.ref) if ".damaged-" in name]
    assert sorted(any_storage.read_bytes(f"{spec.ref}/{name}") for name in kept) == sorted(aside)


def test_a_damaged_record_of_other_content_is_kept(any_storage: Storage) -> None:
    spec = ThingSpec(size=1)
    record = make(any_storage, spec, {"a": b"alpha"})
    path = layout.record_path(spec.ref)
    for damage in ("time", "checksum", "files", "content"):
        any_storage.replace(path, record_damages(any_storage.read_bytes(path))[damage])
        before = everything(any_storage)
        with pytest.raises(StoreError, match=r"the same work gave other bytes .*damaged record names") as error:
            make(any_storage, spec, {"a": b"other"})
        assert not isinstance(error.value, DamagedError)
        assert everything(any_storage) == before
        assert make(any_storage, spec, {"a": b"alpha"}).content == record.content
