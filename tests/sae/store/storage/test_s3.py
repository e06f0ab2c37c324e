"""Storage on S3, against an endpoint in a process of its own, and against networks that misbehave."""

import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sae.errors import ConfigError, StoreError, TransientError
from sae.store.storage import s3
from sae.store.storage.filesystem import Storage
from tests.sae.store.network import Network, Request, on
from tests.sae.store.network import network as run_network

BUSY, CONFLICT, FORBIDDEN = "503 SlowDown", "409 ConditionalRequestConflict", "403 AccessDenied"


@pytest.fixture
def network(s3_root: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    """Everything this test sends to S3 goes through it. It works until it gets a fault."""
    with run_network(s3_server) as network:
        monkeypatch.setenv("AWS_ENDPOINT_URL", network.url)
        s3.FileSystem.clear_instance_cache()
        yield network


def test_what_is_written_is_listed_and_read_back(s3_root: str, tmp_path: Path) -> None:
    storage = Storage(s3_root)
    file = tmp_path / "data.bin"
    file.write_bytes(bytes(range(100)))
    storage.put_file(file, "a/b/data.bin")
    storage.replace("a/note", b"old")
    storage.replace("a/note", b"new")
    assert storage.list("a") == ["b", "note"]
    assert storage.list("") == ["a"]
    assert storage.list("nothing/here") == []
    assert storage.sizes("a") == {"b/data.bin": 100, "note": 3}
    assert storage.sizes("nothing/here") == {}
    assert (storage.exists("a/note"), storage.exists("a"), storage.exists("a/not")) == (True, False, False)
    assert storage.size("a/b/data.bin") == 100
    assert storage.read_bytes("a/b/data.bin", 5, 8) == bytes([5, 6, 7])
    assert storage.read_bytes("a/b/data.bin", 98, 200) == bytes([98, 99])
    assert storage.read_bytes("a/b/data.bin", 100, 200) == b""
    assert storage.read_if_there("a/note") == storage.read_bytes("a/note") == b"new"
    assert storage.read_if_there("a/not") is None
    assert storage.fetch("a/b/data.bin", tmp_path / "..").read_bytes() == bytes(range(100))
    storage.remove("a/note")
    storage.remove("a/note")
    assert storage.list("a") == ["b"]
    assert storage.free_bytes() is None


def test_missing_files_and_buckets_are_store_errors(s3_root: str, tmp_path: Path) -> None:
    storage = Storage(s3_root)
    for call in (storage.size, storage.read_bytes, lambda path: storage.fetch(path, tmp_path)):
        with pytest.raises(StoreError, match="a/missing: no such file"):
            call("a/missing")
    with pytest.raises(StoreError, match="there is no such bucket"):
        Storage("s3://no-such-bucket/x").replace("a", b"")


def test_one_of_many_threads_creates_an_object(s3_root: str) -> None:
    """Although all write the same bytes."""
    with ThreadPoolExecutor(12) as threads:
        for name in ("a", "b", "c"):
            wins = list(threads.map(lambda _, name=name: Storage(s3_root).create_exclusive(name, b"x"), range(12)))
            assert sum(wins) == 1


def test_one_of_several_processes_creates_an_object(s3_root: str) -> None:
    program = textwrap.dedent("""
        import sys
        from sae.store.storage.filesystem import Storage
        storage = Storage(sys.argv[1])
        storage.list("")
        print("ready", flush=True)
        sys.stdin.readline()
        print(*[n for n in range(25) if storage.create_exclusive(f"record-{n}", b"x")])
    """)
    command = [sys.executable, "-c", program, s3_root]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    wins = [int(number) for process in processes for number in process.communicate(timeout=60)[0].split()]
    assert sorted(wins) == list(range(25))


def test_a_lost_answer_to_our_own_create_is_no_defeat(s3_root: str, network: Network) -> None:
    network.fault = on("PUT", "/record", "lose")
    storage = Storage(s3_root)
    assert storage.create_exclusive("record", b"ours")
    assert [request.method for request in network.seen].count("PUT") == 2
    network.seen.clear()
    assert not storage.create_exclusive("record", b"ours")
    assert storage.read_bytes("record") == b"ours"


def test_a_conflict_of_conditional_writes_is_tried_again(s3_root: str, network: Network) -> None:
    network.fault = on("PUT", "/record", CONFLICT, CONFLICT)
    storage = Storage(s3_root)
    assert storage.create_exclusive("record", b"ours")
    assert storage.read_bytes("record") == b"ours"


@pytest.mark.parametrize("fault", ["drop", BUSY])
def test_a_network_that_comes_back_is_not_noticed(s3_root: str, network: Network, fault: str) -> None:
    network.fault = on("PUT", "/a", fault)
    Storage(s3_root).replace("a", b"x")
    network.fault = on("GET", "/a", fault)
    assert Storage(s3_root).read_bytes("a") == b"x"


@pytest.mark.parametrize("fault", [pytest.param("drop", marks=pytest.mark.slow), BUSY])
def test_a_network_that_stays_away_is_worth_a_retry(s3_root: str, network: Network, fault: str) -> None:
    network.fault = lambda request: fault
    with pytest.raises(TransientError, match="/a: "):
        Storage(s3_root).read_if_there("a")


def test_what_is_forbidden_is_not_worth_a_retry(s3_root: str, network: Network) -> None:
    network.fault = lambda request: FORBIDDEN
    storage = Storage(s3_root)
    for call in (storage.size, storage.read_bytes, storage.read_if_there, storage.list, storage.sizes, storage.remove):
        with pytest.raises(StoreError, match=r"S3 answered 403.*credentials"):
            call("a")
    with pytest.raises(StoreError, match="S3 answered 403 AccessDenied"):
        storage.create_exclusive("a", b"")


def write_big_file(folder: Path) -> Path:
    """A file that is uploaded in three pieces."""
    path = folder / "big"
    with open(path, "wb") as file:
        file.truncate(2 * s3.UPLOAD_BYTES + 1)
    return path


def unfinished_uploads(storage: Storage) -> int:
    bucket = storage.root.split("/")[2]
    return len(storage.fs.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads", []))


def test_an_upload_that_fails_leaves_nothing(s3_root: str, network: Network, tmp_path: Path) -> None:
    network.fault = on("PUT", "/big", "", FORBIDDEN)
    storage = Storage(s3_root)
    with pytest.raises(StoreError, match="403"):
        storage.put_file(write_big_file(tmp_path), "folder/big")
    assert storage.sizes("") == {}
    assert unfinished_uploads(storage) == 0
    storage.put_file(write_big_file(tmp_path), "folder/big")
    assert storage.sizes("") == {"folder/big": 2 * s3.UPLOAD_BYTES + 1}


def test_an_upload_that_a_collector_gives_up_is_worth_a_retry(s3_root: str, network: Network, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    network.fault = on("PUT", "/a", "404 NoSuchUpload")
    with pytest.raises(TransientError, match="given up while it was under way"):
        Storage(s3_root).put_file(tmp_path / "a", "a")


def test_an_upload_whose_process_is_killed_leaves_no_object(s3_root: str, network: Network, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from sae.store.storage.filesystem import Storage\n"
        "Storage(sys.argv[1]).put_file(Path(sys.argv[2]), 'big')"
    )
    process = subprocess.Popen([sys.executable, "-c", program, s3_root, str(write_big_file(tmp_path))])

    def kill(request: Request) -> str:
        is_second_put = (request.method, request.before) == ("PUT", 1)
        if is_second_put:
            process.send_signal(signal.SIGKILL)
        return "drop" if process.poll() is not None or is_second_put else ""

    network.fault = kill
    assert process.wait(60) == -signal.SIGKILL
    network.fault = lambda request: ""
    storage = Storage(s3_root)
    assert not storage.exists("big")
    assert storage.list("") == []


SECRET = "planted+secret/that-must-never-be-seen"


def refusal(root: str) -> str:
    """What `check_writable` says; it must be one line that gives nothing away."""
    s3.FileSystem.clear_instance_cache()
    with pytest.raises(ConfigError) as caught:
        Storage(root).check_writable()
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"root {root!r}")
    assert SECRET not in text
    assert "AKIAPLANTEDKEY000001" not in text
    return text


def test_a_writable_root_is_left_as_it_was(s3_root: str) -> None:
    storage = Storage(s3_root)
    storage.check_writable()
    assert storage.fs.find(storage.full("")) == []


def test_a_root_without_bucket_endpoint_or_credentials_is_one_clear_line(
    s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "there is no such bucket. " in refusal("s3://no-such-bucket/x")
    assert "Invalid bucket name" in refusal("s3://no bucket/x")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        assert "Could not connect" in refusal(s3_root)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "profile (nobody) could not be found" in refusal(s3_root)
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert "Set AWS_ACCESS_KEY_ID" in refusal(s3_root)


def test_wrong_credentials_are_one_clear_line(
    s3_environment: dict[str, str], strict_s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", strict_s3_server)
    assert "The credentials in the environment" in refusal("s3://bucket/x")


def test_storage_that_ignores_the_condition_is_refused(s3_root: str, network: Network) -> None:
    network.fault = lambda request: "unconditional"
    assert "exclusive create" in refusal(s3_root)


@pytest.mark.slow  # waits for time-outs
def test_an_endpoint_that_says_nothing_is_given_up(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "Read timeout" in refusal(s3_root)
