"""The remix: the same rows, each once and with its own vector, wherever they are mixed and however often."""

import os
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae.errors import ConfigError, DamagedError, StoreError
from sae.extract.config import DealtPartsSpec, RemixSpec
from sae.extract.remix import (
    count_parts,
    deal_part,
    dealt_snapshot,
    finish_dealing,
    finish_remix,
    gather_part,
    identity_sum,
    remove_dealt,
)
from sae.store.artefacts.files import BLOCK_BYTES
from sae.store.artefacts.records import commit, local_files, require_record, verify
from sae.store.part.encoding import Dtype, Encoding
from sae.store.part.writer import write_part
from sae.store.reading.blocks import iter_rows
from sae.store.reading.reader import RowGroupReader
from sae.store.snapshots.snapshot import Snapshot, SnapshotSpec, commit_snapshot, read_snapshot
from sae.store.storage.filesystem import Storage
from tests.conftest import write_snapshot

few = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


def remix_spec(source: Snapshot, rows_per_part: int, row_group_rows: int = 7, seed: int = 0) -> RemixSpec:
    row_bytes = source.parts[0].layout.row_bytes
    return RemixSpec(
        source=source.ref, part_bytes=rows_per_part * row_bytes, row_group_bytes=row_group_rows * row_bytes, seed=seed
    )


def remix(storage: Storage, spec: RemixSpec, order: Sequence[int] | None = None) -> Snapshot:
    """All tasks of a remix, those of the parts in any order."""
    dealt = DealtPartsSpec(remix=spec)
    n_source, n_parts = count_parts(storage, spec)
    for part in _ordered(n_source, order):
        deal_part(storage, dealt, part)
    finish_dealing(storage, dealt)
    for part in _ordered(n_parts, order):
        gather_part(storage, spec, part)
    finish_remix(storage, spec)
    snapshot = SnapshotSpec(parts=(spec.ref,), n_tokens=None)
    commit_snapshot(storage, snapshot)
    return read_snapshot(storage, snapshot.ref)


def empty(storage: Storage) -> Storage:
    """The root in memory without what an earlier example left."""
    storage.fs.store.clear()
    return storage


def _ordered(n: int, order: Sequence[int] | None) -> list[int]:
    return sorted(range(n), key=lambda part: (order[part % len(order)], part)) if order else list(range(n))


def rows_of(storage: Storage, snapshot: Snapshot, parts: Sequence[int] | None = None) -> Iterator[tuple]:
    """Every row: context, position, token, and the bytes of its vector as they are stored."""
    reader = RowGroupReader(storage, snapshot)
    for part in range(len(snapshot.parts)) if parts is None else parts:
        layout = snapshot.parts[part].layout
        for group, place in enumerate(layout.row_groups):
            raw = np.empty((place.n_rows, layout.row_bytes), np.uint8)
            reader.read_into(part, group, raw)
            yield from zip(*reader.read_identity(part, group).tolist(), map(bytes, raw), strict=True)
    reader.close()


def parts_of(rng: np.random.Generator, sizes: Sequence[int], d_in: int, dtype: str = "float32") -> list[np.ndarray]:
    return [rng.standard_normal((size, d_in)).astype(dtype) for size in sizes]


@few
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    rows_per_part=st.integers(5, 60),
    row_group_rows=st.integers(1, 20),
    source_groups=st.integers(1, 20),
    dtype=st.sampled_from(["float16", "float32"]),
    seed=st.integers(0, 3),
)
def test_a_remix_holds_the_rows_of_its_source_each_once_bit_for_bit(
    memory_storage: Storage,
    sizes: list[int],
    rows_per_part: int,
    row_group_rows: int,
    source_groups: int,
    dtype: str,
    seed: int,
) -> None:
    rng, storage = np.random.default_rng(seed), empty(memory_storage)
    token = [rng.integers(-1, 5, size).astype(np.int32) for size in sizes]
    source = write_snapshot(storage, parts_of(rng, sizes, 3, dtype), row_group_rows=source_groups, token=token)
    mixed = remix(storage, remix_spec(source, rows_per_part, row_group_rows, seed))
    assert sorted(rows_of(storage, mixed)) == sorted(rows_of(storage, source))
    held = [part.layout.n_rows for part in mixed.parts]
    assert sum(held) == mixed.n_rows == source.n_rows
    assert max(held) <= rows_per_part
    assert max(held) - min(held) <= 1
    assert all(place.n_rows <= row_group_rows for part in mixed.parts for place in part.layout.row_groups)
    np.testing.assert_allclose(mixed.mean, source.mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(mixed.mean_sq_norm, source.mean_sq_norm, rtol=1e-9)
    for ref in (mixed.ref, mixed.parts[0].ref):
        assert verify(storage, require_record(storage, ref)) == []


@few
@given(st.lists(st.integers(5, 45), min_size=1, max_size=4), st.permutations(range(6)))
def test_the_bytes_do_not_depend_on_the_order_in_which_tasks_run(
    memory_storage: Storage, sizes: list[int], order: list[int]
) -> None:
    acts = parts_of(np.random.default_rng(0), sizes, 2)
    contents = []
    for each in (None, order):
        storage = empty(memory_storage)
        mixed = remix(storage, remix_spec(write_snapshot(storage, acts), 11), each)
        contents.append([part.path for part in mixed.parts])  # a path holds the digest of the content
    assert contents[0] == contents[1]


def test_a_remix_works_on_every_kind_of_root(any_storage: Storage) -> None:
    source = write_snapshot(any_storage, parts_of(np.random.default_rng(0), [50, 30], 4, "float16"), row_group_rows=16)
    spec = remix_spec(source, 25)
    mixed = remix(any_storage, spec)
    assert sorted(rows_of(any_storage, mixed)) == sorted(rows_of(any_storage, source))
    remove_dealt(any_storage, spec)
    assert not any(any_storage.sizes(ref) for ref in (dealt_snapshot(spec).ref, DealtPartsSpec(remix=spec).ref))
    assert verify(any_storage, require_record(any_storage, mixed.parts[0].ref)) == []


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_rows_of_one_encoding_keep_their_bits(storage: Storage, dtype: Dtype) -> None:
    rng = np.random.default_rng(0)
    (act,) = parts_of(rng, [40], 5)
    # Parts with the same extremes have the same encoding, of int8 too; these need an exponent.
    acts = [np.concatenate([act.max(0, keepdims=True), act.min(0, keepdims=True), act[i::3]]) * 1e5 for i in range(3)]
    source = write_snapshot(storage, acts, row_group_rows=8, dtype=dtype)
    assert len({part.layout.encoding for part in source.parts}) == 1
    mixed = remix(storage, remix_spec(source, 10))
    assert {part.layout.encoding for part in mixed.parts} == {source.parts[0].layout.encoding}
    assert sorted(rows_of(storage, mixed)) == sorted(rows_of(storage, source))


def values_by_row(storage: Storage, snapshot: Snapshot) -> np.ndarray:
    """Decoded vectors in order of `seq`. [rows, d_in] float32"""
    blocks = [(block.seq.copy(), block.act.astype(np.float32)) for block in iter_rows(storage, snapshot)]
    return np.concatenate([act for _, act in blocks])[np.argsort(np.concatenate([seq for seq, _ in blocks]))]


def test_float16_rows_of_several_exponents_keep_their_values(storage: Storage) -> None:
    acts = parts_of(np.random.default_rng(0), [30, 30, 30], 4)
    acts[1] *= 1e4
    acts[2] *= 1e5
    source = write_snapshot(storage, acts, row_group_rows=8, dtype="float16")
    assert len({part.layout.encoding.exponent for part in source.parts}) > 1
    mixed = remix(storage, remix_spec(source, 30))
    before, after = values_by_row(storage, source), values_by_row(storage, mixed)
    # What a larger exponent takes away is below float16's normal range, times two to it.
    exponent = max(part.layout.encoding.exponent for part in mixed.parts)
    np.testing.assert_allclose(after, before, rtol=0, atol=2.0 ** (exponent - 25))
    assert (after == before)[np.abs(before) >= 2.0 ** (exponent - 14)].all()


def test_int8_rows_of_several_scales_are_off_by_half_a_step_of_their_new_one(storage: Storage) -> None:
    acts = [act * 3**i + i for i, act in enumerate(parts_of(np.random.default_rng(0), [50] * 3, 4))]
    source = write_snapshot(storage, acts, row_group_rows=8, dtype="int8")
    mixed = remix(storage, remix_spec(source, 50))
    before, after = values_by_row(storage, source), values_by_row(storage, mixed)
    step = max((before[:, i].max() - before[:, i].min()) / 255 for i in range(4))
    assert np.abs(after - before).max() <= 0.5001 * step
    np.testing.assert_allclose(mixed.mean, after.mean(0, dtype=np.float64), rtol=1e-6)


@pytest.mark.slow
def test_every_row_comes_as_often_to_every_bucket_and_every_place(memory_storage: Storage) -> None:
    """Over seeds: chi-squared, of 24 and 11 degrees of freedom, stays below its 99.9 % quantile."""
    source = write_snapshot(memory_storage, parts_of(np.random.default_rng(0), [7, 5], 1), row_group_rows=5)
    n_seeds, places, first = 36, Counter(), Counter()
    for seed in range(n_seeds):
        mixed = remix(memory_storage, remix_spec(source, 4, seed=seed))
        for part in range(3):
            seqs = [seq for seq, *_ in rows_of(memory_storage, mixed, [part])]
            places.update((seq, part) for seq in seqs)
            first[seqs[0]] += 1
    counts = np.array([[places[seq, part] for part in range(3)] for seq in range(12)])
    assert ((counts - n_seeds / 3) ** 2 / (n_seeds / 3)).sum() < 51.2
    firsts = np.array([first[seq] for seq in range(12)])
    assert ((firsts - n_seeds / 4) ** 2 / (n_seeds / 4)).sum() < 31.3


@given(
    rows=st.lists(st.tuples(*[st.integers(-(2**31), 2**31 - 1)] * 3), min_size=1, max_size=20, unique=True),
    random=st.randoms(use_true_random=False),
)
def test_the_sum_of_identities_knows_rows_and_not_their_order(rows, random) -> None:
    def total(rows) -> int:
        return identity_sum(np.array(rows, np.int64).astype(np.int32).reshape(-1, 3).T)

    shuffled = random.sample(rows, len(rows))
    assert total(shuffled) == total(rows)
    assert total([*rows, rows[0]]) != total(rows)
    assert total(rows[1:]) != total(rows)
    assert total([*rows[1:], rows[0][::-1]]) == total(rows) or rows[0][::-1] != rows[0]
    if len(rows) > 1:  # positions exchanged between two rows
        (a, b, c), (d, e, f), *others = rows
        assert b == e or a == d or total([(a, e, c), (d, b, f), *others]) != total(rows)


def test_sums_of_identities_add_up() -> None:
    rows = np.random.default_rng(0).integers(-1, 10**6, (3, 150_000), dtype=np.int32)
    halves = [identity_sum(half) for half in np.split(rows, [1000], axis=1)]
    assert identity_sum(rows) == sum(halves) % 2**64


def test_other_rows_than_were_dealt_are_not_committed(storage: Storage) -> None:
    source = write_snapshot(storage, parts_of(np.random.default_rng(0), [12, 12], 2))
    spec = remix_spec(source, 8)
    dealt = DealtPartsSpec(remix=spec)
    for part in range(2):
        deal_part(storage, dealt, part)
    with pytest.raises(StoreError, match="never finished"):
        gather_part(storage, spec, 0)
    finish_dealing(storage, dealt)
    for part in range(2):
        gather_part(storage, spec, part)
    with pytest.raises(StoreError, match="never finished"):
        finish_remix(storage, spec)
    twice = require_record(storage, spec.ref, 1)
    with local_files(storage, twice) as files, storage.staging() as folder:
        for file in files.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        commit(storage, spec, folder, twice.metrics, seconds=0.0, part=2)
    with pytest.raises(StoreError, match=r"hold 24 rows .* but 24 rows .* were dealt"):
        finish_remix(storage, spec)


def test_damage_in_a_dealt_part_is_found_named_and_mended(storage: Storage) -> None:
    source = write_snapshot(storage, parts_of(np.random.default_rng(0), [12, 12], 2))
    spec = remix_spec(source, 8)
    expected = [part.path for part in remix(storage, spec).parts]
    dealt = DealtPartsSpec(remix=spec)
    record = require_record(storage, dealt.ref, 1)
    path = record.path("part.parquet")
    offset = record.metrics["layout"]["row_groups"][0]["offset"]
    data = bytearray(storage.read_bytes(path))
    data[offset] ^= 1
    storage.replace(path, bytes(data))
    found = []
    for bucket in range(3):
        try:
            gather_part(storage, spec, bucket)
        except DamagedError as err:
            found.append((bucket, err.ref, err.part))
    ((bucket, ref, part),) = found
    assert (ref, part) == (dealt.ref, 1)
    deal_part(storage, dealt, 1)
    assert gather_part(storage, spec, bucket).path("part.parquet") == expected[bucket]


def test_row_groups_can_be_of_any_size(tmp_path: Path) -> None:
    act, column = np.arange(18, dtype=np.float32).reshape(9, 2), np.arange(9, dtype=np.int32)
    path, identity, encoding = tmp_path / "part.parquet", (column, column, column), Encoding(dtype="float32")
    layout = write_part(path, act, *identity, row_group_rows=[3, 1, 5], encoding=encoding)
    assert [group.n_rows for group in layout.row_groups] == [3, 1, 5]
    assert pq.read_table(path)["act"].to_pylist() == act.tolist()
    with pytest.raises(ValueError, match="row groups of 8 rows in all, but there are 9"):
        write_part(tmp_path / "other.parquet", act, *identity, row_group_rows=[3, 5], encoding=encoding)


def test_too_many_buckets_are_refused(storage: Storage) -> None:
    source = write_snapshot(storage, [np.zeros((5000, 1), np.float32)], row_group_rows=5000)
    with pytest.raises(ConfigError, match=r"activations\.remix\.part_bytes"):
        count_parts(storage, remix_spec(source, 1))


def ratio_to_iid(storage: Storage, snapshot: Snapshot, batch_rows: int) -> float:
    """Variance of the means of consecutive rows, as they are stored, over that of as many independent rows."""
    rows = np.concatenate([block.act.astype(np.float64) for block in iter_rows(storage, snapshot)])
    means = rows[: len(rows) // batch_rows * batch_rows].reshape(-1, batch_rows, rows.shape[1]).mean(1)
    return float(means.var(0).sum() / (rows.var(0).sum() / batch_rows))


def test_stored_rows_are_a_random_sample_in_any_stretch(storage: Storage) -> None:
    """Documents that resemble themselves, in the order of the corpus, rows mixed within parts as extraction does."""
    rng = np.random.default_rng(0)
    topic = np.repeat(np.cumsum(rng.standard_normal((64, 8)), axis=0), 256, axis=0)
    rows = (topic + rng.standard_normal(topic.shape)).astype(np.float32)
    acts = [rng.permutation(part) for part in np.split(rows, 16)]
    source = write_snapshot(storage, acts, row_group_rows=128)
    mixed = remix(storage, remix_spec(source, 1024, row_group_rows=128))
    assert ratio_to_iid(storage, source, 256) > 100
    assert 0.7 < ratio_to_iid(storage, mixed, 256) < 1.2


MEMORY_PROGRAM = """
    import sys
    from pathlib import Path
    import numpy as np
    from sae.extract import remix
    from sae.extract.config import DealtPartsSpec, GivenPartsSpec, InlineSource, RemixSpec
    from sae.extract.remix import deal_part, finish_dealing, gather_part
    from sae.extract.write import write_rows
    from sae.store.part.encoding import Encoding
    from sae.store.storage.filesystem import Storage
    from sae.store.artefacts.records import commit
    from sae.store.snapshots.snapshot import SnapshotSpec, commit_snapshot

    storage, d_in, row_group_rows = Storage(sys.argv[1]), 512, 256
    remix.READ_BYTES = 1 << 20

    def source_of(n_parts, n_rows):
        spec = GivenPartsSpec(
            source=InlineSource(values=((0.0, 1.0), (1.0, 0.0))), content=f"{n_parts} x {n_rows}", split="train",
            heldout_fraction=0, dtype="float16", part_bytes=1, row_group_bytes=1, seed=0,
        )
        for part in range(n_parts):
            act = np.random.default_rng(part).standard_normal((n_rows, d_in), np.float32).astype(np.float16)
            identity = np.zeros((3, n_rows), np.int32)
            identity[0] = part * n_rows + np.arange(n_rows)
            with storage.staging() as folder:
                metrics = write_rows(folder / "part.parquet", act, identity, row_group_rows, Encoding(dtype="float16"))
                commit(storage, spec, folder, metrics, seconds=0.0, part=part)
        with storage.staging() as folder:
            commit(storage, spec, folder, {"n_parts": n_parts}, seconds=0.0)
        snapshot = SnapshotSpec(parts=(spec.ref,), n_tokens=None)
        commit_snapshot(storage, snapshot)
        return snapshot.ref

    def status(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    def peak(function, *arguments):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = status("VmRSS")
        function(*arguments)
        return status("VmHWM") - before

    for n_parts, n_rows in ((2, 16), (2, 16384), (5, 16384)):  # the first loads what is loaded once
        row_bytes = 2 * d_in
        spec = RemixSpec(
            source=source_of(n_parts, n_rows), part_bytes=n_rows * row_bytes,
            row_group_bytes=row_group_rows * row_bytes, seed=0,
        )
        dealt = DealtPartsSpec(remix=spec)
        dealing = [peak(deal_part, storage, dealt, part) for part in range(n_parts)]
        finish_dealing(storage, dealt)
        gathering = [peak(gather_part, storage, spec, part) for part in range(n_parts)]
        print(max(dealing), max(gathering))
"""


@pytest.mark.slow
def test_a_task_holds_one_part_however_many_there_are(tmp_path: Path) -> None:
    n_rows, d_in, row_group_rows = 16_384, 512, 256
    program = [sys.executable, "-c", textwrap.dedent(MEMORY_PROGRAM), str(tmp_path)]
    # What is freed goes back to the system, so that what is used again counts again.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # 20 bytes beside each vector, and what is read and written at once.
    part = n_rows * (2 * d_in + 20) + (1 << 20) + 4 * row_group_rows * 2 * d_in
    hashed, summed = 2 * BLOCK_BYTES, 4096 * d_in * (4 + 8 + 8)  # blocks of constant size, one after the other
    for line in done.stdout.splitlines()[1:]:
        dealing, gathering = map(int, line.split())
        assert n_rows * 2 * d_in < dealing < 1.1 * part + hashed, done.stdout
        assert n_rows * 2 * d_in < gathering < 1.1 * part + max(hashed, summed), done.stdout
