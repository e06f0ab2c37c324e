"""Ranges of S3 objects by HTTP: pieces, connections and addresses, whatever the network does."""

import datetime
import ipaddress
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from sae.errors import StoreError, TransientError
from sae.store.artefacts import files as store_files
from sae.store.artefacts.files import FileEntry, stored_difference
from sae.store.storage import http_ranges, s3, signed_get
from sae.store.storage.filesystem import Storage
from sae.store.storage.http_ranges import HttpRanges
from sae.store.storage.ranges import Range, open_ranges
from sae.store.storage.signed_get import AgainError, Piece, SignedGets
from tests.sae.store.network import READING, Network, lottery, network, on
from tests.sae.store.storage.ranged import fill, read


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
