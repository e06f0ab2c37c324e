"""Ranges of files: what is read is what was written, from disk, memory and S3, whatever the network does."""

import contextlib
import datetime
import ipaddress
import os
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from sae.errors import DamagedError, StoreError, TransientError
from sae.store import files as store_files
from sae.store import http_ranges, s3, signed_get
from sae.store.files import FileEntry, stored_difference
from sae.store.filesystem import Storage
from sae.store.http_ranges import HttpRanges
from sae.store.loader import open_loader
from sae.store.ranges import MAX_OPEN_FILES, LocalRanges, Range, open_ranges
from sae.store.reader import READ_AHEAD, RowGroupReader, iter_rows
from sae.store.signed_get import AgainError, Piece, SignedGets
from sae.store.snapshot import Snapshot
from tests.conftest import MakeSnapshot
from tests.sae.store.network import READING, Network, Request, lottery, network, on


def fill(storage: Storage, n_files: int = 3, n_bytes: int = 100_000) -> dict[str, bytes]:
    """Files of random bytes, by path."""
    files = {f"folder/file-{index}": random.Random(index).randbytes(n_bytes) for index in range(n_files)}
    for path, data in files.items():
        storage.replace(path, data)
    return files


def read(storage: Storage, *wanted: tuple[str, int, int]) -> list[bytes | None]:
    """The bytes [start, stop) of files; None where the file ends before."""
    buffers = [bytearray(stop - start) for _, start, stop in wanted]
    with contextlib.closing(open_ranges(storage)) as reader:
        filled = reader.read(
            [Range(path, start, memoryview(b)) for (path, start, _), b in zip(wanted, buffers, strict=True)]
        )
    return [bytes(buffer) if is_full else None for buffer, is_full in zip(buffers, filled, strict=True)]


@pytest.fixture
def hop(s3_root: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    """The network between this test and S3. It works until it gets a fault; nobody waits long for it."""
    monkeypatch.setattr(signed_get, "STALL_SECONDS", 2)  # a busy machine's endpoint takes a while
    monkeypatch.setattr(http_ranges, "PAUSE_SECONDS", 0.01)
    with network(s3_server) as hop:
        monkeypatch.setenv("AWS_ENDPOINT_URL", hop.url)
        s3.FileSystem.clear_instance_cache()
        yield hop


def test_ranges_of_several_files_fill_their_buffers(any_storage: Storage) -> None:
    files = fill(any_storage)
    wanted = [(path, start, start + size) for size in (1, 4096, 70_000) for path in files for start in (0, 17, 30_000)]
    random.Random(0).shuffle(wanted)
    assert read(any_storage, *wanted) == [files[path][start:stop] for path, start, stop in wanted]


def test_a_range_that_the_file_ends_before_is_said_to_be(any_storage: Storage) -> None:
    (path, data), *_ = fill(any_storage, 1).items()
    size = len(data)
    wanted = [
        (path, size - 5, size + 1),
        (path, size - 5, size),
        (path, size, size + 1),
        (path, 2 * size, 2 * size + 9),
    ]
    assert read(any_storage, *wanted) == [None, data[-5:], None, None]
    assert read(any_storage) == []
    assert read(any_storage, (path, 7, 7)) == [b""]


def test_a_missing_file_is_a_store_error_that_names_it(any_storage: Storage) -> None:
    (path, _), *_ = fill(any_storage, 1).items()
    with pytest.raises(StoreError, match="folder/none: no such file"):
        read(any_storage, (path, 0, 10), ("folder/none", 0, 10))


def test_many_threads_read_with_one_reader(any_storage: Storage) -> None:
    files = fill(any_storage, 5, 20_000)
    reader = open_ranges(any_storage)

    def one(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(5):
            wanted = [(path, draw.randrange(10_000), bytearray(5_000)) for path in files]
            assert all(reader.read([Range(path, start, memoryview(buffer)) for path, start, buffer in wanted]))
            assert all(buffer == files[path][start : start + 5_000] for path, start, buffer in wanted)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(one, range(8)))
    reader.close()


def test_no_more_files_stay_open_than_may(storage: Storage) -> None:
    files = fill(storage, MAX_OPEN_FILES + 20, 10)
    reader = LocalRanges(storage)
    before = len(os.listdir("/proc/self/fd"))
    for path, data in files.items():
        buffer = bytearray(10)
        assert reader.read([Range(path, 0, memoryview(buffer))]) == [True]
        assert buffer == data
    assert len(os.listdir("/proc/self/fd")) - before <= MAX_OPEN_FILES
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_large_range_comes_in_pieces_and_a_small_one_in_one(
    s3_root: str, hop: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_ranges, "PIECE_BYTES", 30_000)
    storage = Storage(s3_root)
    (path, data), *_ = fill(storage, 1).items()
    hop.seen.clear()
    assert read(storage, (path, 1, 100_000)) == [data[1:]]
    assert sorted(request.range for request in hop.seen) == ["1-24999", "25000-49999", "50000-74999", "75000-99999"]
    hop.seen.clear()
    assert read(storage, (path, 0, 30_000)) == [data[:30_000]]
    assert [request.range for request in hop.seen] == ["0-29999"]


def test_connections_are_used_again_and_are_no_more_than_streams(s3_root: str, hop: Network) -> None:
    storage = Storage(s3_root)
    files = fill(storage)
    hop.connections.clear()
    reader = HttpRanges(storage, n_streams=2)
    for start in range(0, 50_000, 5_000):
        buffers = [bytearray(5_000) for _ in files]
        reader.read([Range(path, start, memoryview(b)) for path, b in zip(files, buffers, strict=True)])
        assert buffers == [data[start : start + 5_000] for data in files.values()]
    reader.close()
    assert len(hop.connections) <= 2


def test_a_connection_that_the_endpoint_closed_is_not_used_again(s3_root: str, hop: Network) -> None:
    storage = Storage(s3_root)
    (path, data), *_ = fill(storage, 1).items()
    reader = HttpRanges(storage, n_streams=1)
    buffer = bytearray(10)
    hop.connections.clear()
    reader.read([Range(path, 0, memoryview(buffer))])
    hop.hang_up()
    hop.seen.clear()
    reader.read([Range(path, 50, memoryview(buffer))])
    reader.close()
    assert buffer == data[50:60]
    assert len(hop.connections) == 2
    assert len(hop.seen) == 1


@pytest.mark.parametrize(
    "kind", [kind for kind in READING if kind != "flip"] + ["silent", "503 SlowDown 1", "500 Oops"]
)
def test_a_fault_on_a_tenth_of_the_requests_changes_nothing(
    s3_root: str, hop: Network, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    storage = Storage(s3_root)
    files = fill(storage)
    hop.fault = lottery(7, 0.1, [kind])
    wanted = [(path, start, start + 25_000) for path in files for start in range(0, 75_001, 2_500)]
    assert read(storage, *wanted) == [files[path][start:stop] for path, start, stop in wanted]
    assert hop.faults[kind] >= 9


def test_an_answer_that_broke_off_is_read_on_from_there(s3_root: str, hop: Network) -> None:
    storage = Storage(s3_root)
    (path, data), *_ = fill(storage, 1, 4 << 20).items()
    hop.fault = on("GET", path, "truncate")
    hop.seen.clear()
    assert read(storage, (path, 0, len(data))) == [data]
    first, second = [request.range for request in hop.seen]
    assert first == f"0-{len(data) - 1}"
    assert 0 < int(second.split("-")[0]) < len(data)


@pytest.mark.parametrize("kind", ["503 SlowDown", "drop", "reset", "truncate", "stall", "silent", "429 TooMany"])
def test_a_network_that_stays_broken_is_given_up_and_worth_a_retry(
    s3_root: str, hop: Network, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(http_ranges, "ATTEMPTS", 3)
    monkeypatch.setattr(signed_get, "STALL_SECONDS", 0.3)
    storage = Storage(s3_root)
    (path, _), *_ = fill(storage, 1).items()
    hop.fault = lambda request: kind
    hop.seen.clear()
    with pytest.raises(
        TransientError, match=r"folder/file-0: bytes 5 to 99 could not be read: .*attempt 3 of 3"
    ) as caught:
        read(storage, (path, 5, 100))
    assert len(hop.seen) == 3
    assert "Signature" not in str(caught.value)


def test_an_endpoint_that_is_not_there_is_worth_a_retry(
    s3_root: str, hop: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_ranges, "ATTEMPTS", 2)
    storage = Storage(s3_root)
    (path, _), *_ = fill(storage, 1).items()
    hop.server_close()
    hop.hang_up()
    with pytest.raises(TransientError, match="Connection refused"):
        read(storage, (path, 0, 100))


def test_the_endpoint_says_how_long_to_wait(s3_root: str, hop: Network) -> None:
    storage = Storage(s3_root)
    (path, _), *_ = fill(storage, 1).items()
    hop.fault = lambda request: "503 SlowDown 7"
    gets = SignedGets(storage)
    with pytest.raises(AgainError, match="S3 answered 503 SlowDown") as caught:
        gets.get(Piece(path, 0, memoryview(bytearray(10))), threading.Event())
    assert caught.value.after == 7
    gets.close()


def test_nobody_writes_to_a_buffer_after_a_failure(s3_root: str, hop: Network) -> None:
    storage = Storage(s3_root)
    (path, _), *_ = fill(storage, 1).items()
    hop.fault = lambda request: "stall" if request.range.startswith("1-") else ""
    buffers = [bytearray(50_000) for _ in range(4)]
    wanted = [Range(path, 1 if index else 0, memoryview(buffer)) for index, buffer in enumerate(buffers)]
    reader = open_ranges(storage)
    with pytest.raises(StoreError, match="no such file"):
        reader.read([*wanted, Range("folder/none", 0, memoryview(bytearray(1)))])
    hop.fault = lambda request: ""
    then = [bytes(buffer) for buffer in buffers]
    time.sleep(0.5)
    assert [bytes(buffer) for buffer in buffers] == then
    reader.close()


def test_an_address_that_expired_is_signed_again(
    s3_root: str, hop: Network, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Storage(s3_root)
    (path, data), *_ = fill(storage, 1).items()
    signed = count_calls(monkeypatch, "signed_url")
    hop.fault = on("GET", path, "403 AccessDenied")
    hop.seen.clear()
    assert read(storage, (path, 0, 1000)) == [data[:1000]]
    assert (len(signed), len(hop.seen)) == (2, 2)
    assert not caplog.records


def test_addresses_are_signed_once_and_again_before_they_expire(
    s3_root: str, hop: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(s3_root)
    (path, data), *_ = fill(storage, 1).items()
    signed = count_calls(monkeypatch, "signed_url")
    wanted = [(path, start, start + 10) for start in range(20)]
    assert read(storage, *wanted) == [data[start:stop] for _, start, stop in wanted]
    assert len(signed) == 1
    monkeypatch.setattr(signed_get, "RENEW_SECONDS", -1)
    assert read(storage, *wanted) == [data[start:stop] for _, start, stop in wanted]
    assert len(signed) == 21


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """The paths that a method of Storage is called with from now on."""
    calls: list[str] = []
    method: Callable[..., object] = getattr(Storage, name)

    def counted(self: Storage, path: str, *arguments: object) -> object:
        calls.append(path)
        return method(self, path, *arguments)

    monkeypatch.setattr(Storage, name, counted)
    return calls


def test_what_is_forbidden_is_said_as_everywhere(s3_root: str, hop: Network) -> None:
    storage = Storage(s3_root)
    (path, _), *_ = fill(storage, 1).items()
    hop.fault = lambda request: "403 AccessDenied"
    with pytest.raises(StoreError, match=r"S3 answered 403.*credentials") as caught:
        read(storage, (path, 0, 10))
    assert "Signature" not in str(caught.value)


def test_what_a_signed_address_is_refused_s3fs_may_read(
    s3_root: str, hop: Network, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Storage(s3_root)
    (path, data), *_ = fill(storage, 1).items()
    hop.fault = on("GET", path, "301 PermanentRedirect")
    hop.seen.clear()
    reader = HttpRanges(storage)
    for start in (3, 5):
        assert reader.read([Range(path, start, memoryview(buffer := bytearray(10)))]) == [True]
        assert buffer == data[start : start + 10]
    reader.close()
    assert [request.range for request in hop.seen] == ["3-12", "3-12", "5-14"]
    assert (
        caplog.text.count("(the bucket is in eu-north-1: set AWS_DEFAULT_REGION) to a signed address; read through")
        == 1
    )


def test_an_endpoint_that_serves_no_ranges_is_refused(s3_root: str, hop: Network) -> None:
    storage = Storage(s3_root)
    (path, _), *_ = fill(storage, 1).items()
    hop.fault = lambda request: "whole"
    with pytest.raises(StoreError, match="all of the file"):
        read(storage, (path, 3, 10))


def test_behind_a_proxy_s3fs_reads(s3_root: str, s3_server: str, hop: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(s3_root)
    (path, data), *_ = fill(storage, 1).items()
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("http_proxy", hop.url)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    s3.FileSystem.clear_instance_cache()
    hop.seen.clear()
    assert read(Storage(s3_root), (path, 3, 10)) == [data[3:10]]
    assert [request.range for request in hop.seen] == ["3-9"]
    s3.FileSystem.clear_instance_cache()


def test_an_endpoint_with_tls_must_be_trusted(
    s3_root: str, s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (path, data), *_ = fill(Storage(s3_root), 1).items()
    certificate = write_certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    with network(s3_server, tls=tls) as hop:
        monkeypatch.setenv("AWS_ENDPOINT_URL", hop.url)
        s3.FileSystem.clear_instance_cache()
        with pytest.raises(StoreError, match="AWS_CA_BUNDLE"):
            read(Storage(s3_root), (path, 3, 10))
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        s3.FileSystem.clear_instance_cache()
        storage = Storage(s3_root)
        wanted = [(path, start, start + 40_000) for start in range(0, 60_000, 10_000)]
        assert read(storage, *wanted) == [data[start:stop] for _, start, stop in wanted]
        assert read(storage, (path, 99_999, 100_001)) == [None]


def write_certificate(folder: Path) -> Path:
    """A certificate of 127.0.0.1, signed by itself, with its key."""
    pytest.importorskip("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    alternatives = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))])
    builder = x509.CertificateBuilder(
        name, name, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(days=1)
    )
    certificate = builder.add_extension(alternatives, critical=False).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    path = folder / "certificate.pem"
    path.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(pem)
    )
    return path


def test_a_large_file_is_compared_with_its_record_through_every_fault_but_a_flip(
    s3_root: str, hop: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_files, "BLOCK_BYTES", 3_000)
    storage = Storage(s3_root)
    (path, data), *_ = fill(storage, 1).items()
    entry = FileEntry(name="file-0", n_bytes=len(data), xxh3=xxhash.xxh3_64_hexdigest(data))
    hop.fault = lottery(1, 0.1, [kind for kind in READING if kind != "flip"])
    assert stored_difference(storage, path, entry) is None
    assert hop.faults.total() > hop.faults[""]
    hop.fault = lambda request: ""
    storage.replace(path, data[:-1] + bytes([data[-1] ^ 1]))
    assert "content differs" in str(stored_difference(storage, path, entry))
    storage.replace(path, data[:-1])
    assert stored_difference(storage, path, entry) == "99999 bytes, recorded 100000"


# Row groups: the hash decides.


@pytest.fixture
def parts() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((n_rows, 8)).astype(np.float16) for n_rows in (500, 120, 1)]


@pytest.fixture
def snapshot(s3_root: str, hop: Network, make_snapshot: MakeSnapshot, parts: list[np.ndarray]) -> Snapshot:
    """On S3, written before anything went wrong."""
    return make_snapshot(Storage(s3_root), parts, row_group_rows=20)


def is_vectors(snapshot: Snapshot, part: int, group: int) -> Callable[[Request], bool]:
    """Whether a request is for the vectors of a row group."""
    entry = snapshot.parts[part]
    offset = entry.layout.row_groups[group].offset
    return lambda request: request.path.endswith(entry.path) and request.range.startswith(f"{offset}-")


def test_rows_come_back_through_every_fault(
    s3_root: str, hop: Network, snapshot: Snapshot, parts: list[np.ndarray]
) -> None:
    hop.fault = lottery(3, 0.1, READING)
    blocks = [(block.act.copy(), block.seq) for block in iter_rows(Storage(s3_root), snapshot)]
    assert np.array_equal(np.concatenate([act for act, _ in blocks]), np.concatenate(parts))
    assert np.array_equal(np.concatenate([seq for _, seq in blocks]), np.arange(621))
    assert sum(hop.faults[kind] > 0 for kind in READING) >= 4


def test_shuffled_batches_are_the_same_through_every_fault(
    s3_root: str,
    hop: Network,
    snapshot: Snapshot,
    storage: Storage,
    make_snapshot: MakeSnapshot,
    parts: list[np.ndarray],
) -> None:
    on_disk = make_snapshot(storage, parts, row_group_rows=20)
    hop.fault = lottery(5, 0.1, READING)
    loaders = [open_loader(Storage(s3_root), snapshot, 48, seed=1), open_loader(storage, on_disk, 48, seed=1)]
    for _ in range(2 * loaders[0].batches_per_epoch):
        assert torch.equal(next(loaders[0]), next(loaders[1]))
    for loader in loaders:
        loader.close()
    assert sum(hop.faults[kind] > 0 for kind in READING) >= 4


def test_many_row_groups_are_read_at_once_and_by_many_threads(
    s3_root: str, hop: Network, snapshot: Snapshot, parts: list[np.ndarray]
) -> None:
    hop.fault = lottery(3, 0.1, READING)
    reader = RowGroupReader(Storage(s3_root), snapshot)

    def one(seed: int) -> None:
        groups = np.random.default_rng(seed).permutation(25)
        out = np.empty((25, 20, 8), np.float16)
        reader.read_many([(0, int(group), out[group]) for group in groups])
        assert np.array_equal(out.reshape(parts[0].shape), parts[0])
        found = reader.read_identities([(0, int(group)) for group in groups])
        assert all(ids[0].tolist() == list(range(20 * g, 20 * g + 20)) for ids, g in zip(found, groups, strict=True))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(one, range(4)))
    reader.close()


def test_a_byte_that_the_network_flipped_is_read_again(
    s3_root: str, hop: Network, snapshot: Snapshot, parts: list[np.ndarray]
) -> None:
    is_here = is_vectors(snapshot, 0, 3)
    hop.fault = lambda request: "flip" if is_here(request) and request.again == 0 else ""
    reader = RowGroupReader(Storage(s3_root), snapshot)
    hop.seen.clear()
    reader.read_into(0, 3, out := np.empty((20, 8), np.float16))
    reader.close()
    assert np.array_equal(out, parts[0][60:80])
    assert len(hop.seen) == 2


def test_a_byte_that_is_wrong_in_the_bucket_is_damage(s3_root: str, hop: Network, snapshot: Snapshot) -> None:
    storage = Storage(s3_root)
    entry = snapshot.parts[1]
    offset = entry.layout.row_groups[2].offset
    data = bytearray(storage.read_bytes(entry.path))
    data[offset + 5] ^= 1
    storage.replace(entry.path, bytes(data))
    reader = RowGroupReader(storage, snapshot)
    outs = [np.empty((20, 8), np.float16) for _ in range(3)]
    with pytest.raises(DamagedError, match=rf"part\.parquet: row group 2: .*at offset {offset}\).*part 1 of") as caught:
        reader.read_many([(1, group, out) for group, out in enumerate(outs)])
    reader.close()
    assert (caught.value.ref, caught.value.part) == (entry.ref, 1)


def test_an_object_that_was_deleted_is_named(s3_root: str, hop: Network, snapshot: Snapshot) -> None:
    storage = Storage(s3_root)
    storage.remove(snapshot.parts[1].path)
    with pytest.raises(DamagedError, match="missing, though the snapshot") as caught:
        list(iter_rows(storage, snapshot))
    assert (caught.value.ref, caught.value.part) == (snapshot.parts[1].ref, 1)


def test_an_object_that_is_too_short_is_damage(s3_root: str, hop: Network, snapshot: Snapshot) -> None:
    storage = Storage(s3_root)
    storage.replace(snapshot.parts[0].path, storage.read_bytes(snapshot.parts[0].path)[:1000])
    with pytest.raises(DamagedError, match="is damaged"):
        list(iter_rows(storage, snapshot))


def test_the_next_row_groups_are_read_while_one_is_used_and_no_more(
    s3_root: str, hop: Network, snapshot: Snapshot
) -> None:
    storage = Storage(s3_root)
    hop.seen.clear()
    before = threading.active_count()
    blocks = iter_rows(storage, snapshot)
    for n_used in (1, 2, 3):
        next(blocks)
        n_read = 2 * (n_used + READ_AHEAD)  # vectors and identity
        deadline = time.monotonic() + 10
        while len(hop.seen) < n_read and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(hop.seen) == n_read
    blocks.close()
    hop.hang_up()
    while threading.active_count() > before and time.monotonic() < deadline + 10:
        time.sleep(0.01)
    assert threading.active_count() <= before
