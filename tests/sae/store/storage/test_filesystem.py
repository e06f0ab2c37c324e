"""Storage on disk: addresses that are refused, disks that are full or read-only, and what dead processes leave."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sae.errors import ConfigError, StoreError
from sae.store import layout
from sae.store.storage import local, staging
from sae.store.storage.filesystem import Storage
from tests.small_disk import on_small_disk

PROTOCOLS = ["gs", "gcs", "abfs", "az", "adl", "http", "https", "ftp", "sftp", "hdfs", "hf", "zip", "simplecache::s3"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_protocols_without_exclusive_create_are_refused_with_that_reason(protocol: str) -> None:
    """Also where their fsspec package is not installed."""
    with pytest.raises(ConfigError, match=f"{protocol}:// has no exclusive create") as caught:
        Storage(f"{protocol}://user:hidden-secret@place/folder?token=hidden-secret")
    assert "hidden-secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "root",
    [
        "s3://AKIAKEY:hidden/secret@bucket/prefix",
        "s3://AKIAKEY:hidden-secret@bucket",
        "s3://hidden-secret@bucket/prefix",
        "s3://bucket/prefix?key=AKIAKEY&secret=hidden-secret",
        "S3://AKIAKEY:hidden-secret@bucket/prefix",
        "s3:/AKIAKEY:hidden-secret@bucket/prefix",
        "s3://",
        "s3:///AKIAKEY:hidden-secret@bucket",
    ],
)
def test_addresses_with_credentials_are_refused_and_not_repeated(root: str) -> None:
    with pytest.raises(ConfigError, match=r"^root s3:/") as caught:
        Storage(root)
    assert not any(secret in str(caught.value) for secret in ("AKIAKEY", "hidden"))


def test_listings_show_files_and_folders_but_no_dot_names(storage: Storage, memory_storage: Storage) -> None:
    for each in (storage, memory_storage):
        each.replace("a/one", b"1")
        each.replace("a/folder/two", b"22")
        each.replace("a/.one.12345678", b"left by a killed process")
        assert each.list("a") == ["folder", "one"]
        assert each.list("") == ["a"]
        assert each.list("a/one") == []
        assert each.sizes("a") == {"folder/two": 2, "one": 1}
        assert each.sizes("b") == each.sizes("a/one") == {}
        assert (each.exists("a/one"), each.exists("a"), each.exists("b"), each.exists("a/one/x")) == (
            True,
            *[False] * 3,
        )
        assert each.read_if_there("a/one") == b"1"
        assert each.read_if_there("b") is None
        assert each.read_bytes("a/folder/two", 1, 9) == b"2"
        assert each.read_bytes("a/folder/two", 5, 9) == b""
        each.remove("a/one")
        each.remove("a/one")
        assert each.list("a") == ["folder"]


def test_one_of_many_threads_creates_a_file(storage: Storage) -> None:
    with ThreadPoolExecutor(16) as threads:
        for name in "abcde":
            wins = list(threads.map(lambda _, name=name: storage.create_exclusive(f"x/{name}", b"x"), range(16)))
            assert sum(wins) == 1
    assert sorted(os.listdir(storage.full("x"))) == list("abcde")
    assert os.listdir(storage.full(layout.STAGING)) == []


def test_files_are_moved_across_devices(storage: Storage, tmp_path: Path) -> None:
    """An artefact's folder may be a link to another disk."""
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system at /dev/shm")
    folder = other / f"sae-pipeline-test-{os.getpid()}"
    folder.mkdir()
    try:
        Path(storage.root).mkdir()
        Path(storage.root, "a").symlink_to(folder)
        storage.replace("a/file", b"1")
        assert storage.create_exclusive("a/record", b"2")
        assert not storage.create_exclusive("a/record", b"3")
        assert sorted(os.listdir(folder)) == ["file", "record"]
        assert storage.read_bytes("a/record") == b"2"
    finally:
        shutil.rmtree(folder)


def in_small_root(tmp_path: Path, program: str, *, options: str = "size=2m") -> str:
    """Run a program with a root on a file system of its own, 2 MiB large. Returns: what it prints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = on_small_disk(folder, options)
    if command is None:
        pytest.skip("needs unshare and tmpfs")
    setting = "import sys; from sae.errors import *; from sae.store.storage.filesystem import Storage\n"
    command = [*command, sys.executable, "-c", setting + textwrap.dedent(program), str(folder / "root")]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.strip()


@pytest.mark.parametrize(
    "write",
    [
        "storage.create_exclusive('a/b', bytes(5_000_000))",
        "storage.replace('a/b', bytes(5_000_000))",
        "(folder / 'x').write_bytes(bytes(5_000_000))",
        "safetensors.numpy.save_file({'x': np.zeros(1_000_000)}, folder / 'x')",
        "pyarrow.parquet.write_table(pyarrow.table({'x': np.random.rand(1_000_000)}), folder / 'x')",
    ],
)
def test_a_full_disk_is_an_error_that_says_so(write: str, tmp_path: Path) -> None:
    printed = in_small_root(
        tmp_path,
        f"""
        import numpy as np, pyarrow.parquet, safetensors.numpy
        storage = Storage(sys.argv[1])
        print(storage.free_bytes())
        try:
            with storage.staging() as folder:
                {write}
        except StoreError as err:
            print(err)
        print(storage.sizes(""))
        """,
    )
    free, error, left = printed.split("\n")
    assert int(free) == 2 << 20
    assert error.startswith(str(tmp_path / "disk" / "root"))
    assert "disk full (" in error
    assert " MiB free). Free some space" in error
    assert left == "{}"


def test_a_used_up_quota_is_a_full_disk(storage: Storage) -> None:
    with pytest.raises(StoreError, match="disk quota used up"), storage.staging():
        raise OSError(errno.EDQUOT, "Disk quota exceeded")


def test_roots_that_cannot_be_written_are_one_clear_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for root in (file, file / "below", file / "far" / "below"):
        with pytest.raises(ConfigError, match=f"^root '{root}' cannot be written: {file}: is a file, not a folder. "):
            Storage(str(root)).check_writable()
    program = """
        try:
            Storage(sys.argv[1]).check_writable()
        except ConfigError as err:
            print(err)
    """
    printed = in_small_root(tmp_path, program, options="ro")
    assert printed.startswith(f"root '{tmp_path}/disk/root' cannot be written: {tmp_path}/disk/root: Read-only file ")
    if os.getuid() != 0:
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        with pytest.raises(ConfigError, match="Permission denied"):
            Storage(str(closed)).check_writable()


def test_free_bytes_of_a_root_that_does_not_exist_yet(tmp_path: Path) -> None:
    free = Storage(str(tmp_path / "not" / "yet")).free_bytes()
    assert free is not None
    assert free > 0


HOLD = """
import sys, time
from sae.store.storage.filesystem import Storage
with Storage(sys.argv[1]).staging() as folder:
    (folder / "half").write_text("x")
    print(folder.parent, flush=True)
    time.sleep(600)
"""


def hold_staging(root: str) -> tuple[subprocess.Popen[str], Path]:
    """A process with an open staging folder, and that folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, root], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    return process, Path(process.stdout.readline().strip())


def test_staging_of_dead_processes_is_removed_and_of_living_ones_kept(storage: Storage) -> None:
    alive, kept = hold_staging(storage.root)
    dead, left = hold_staging(storage.root)
    try:
        assert (kept / staging.FILES / "half").exists()
        assert (left / staging.FILES / "half").exists()
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        # Its process id may be in use again: what counts is the lock.
        renamed = left.rename(left.with_name(f"{os.getpid()}-{left.name}"))
        staging.remove_abandoned(kept.parent)
        assert not renamed.exists()
        assert (kept / staging.FILES / "half").exists()
        assert alive.poll() is None
    finally:
        for process in (alive, dead):
            process.kill()
            process.communicate()
    # A new process does it when it opens its own.
    program = (
        "import sys; from sae.store.storage.filesystem import Storage\n"
        "Storage(sys.argv[1]).create_exclusive('a/b', b'')"
    )
    subprocess.run([sys.executable, "-c", program, storage.root], check=True)
    assert os.listdir(kept.parent) == []


def test_staging_of_another_machine_is_left_alone_for_a_week(storage: Storage) -> None:
    """Its locks may be invisible here."""
    parent = Path(storage.full(layout.STAGING))
    for name, kernel in (("1-theirs", "another kernel"), ("2-unborn", None)):
        (parent / name / staging.FILES).mkdir(parents=True)
        (parent / name / staging.FILES / "half").write_text("x")
        if kernel is not None:
            (parent / name / staging.LOCK).write_text(kernel)
    (parent / "kept.txt").write_text("not ours")
    staging.remove_abandoned(parent)
    assert sorted(os.listdir(parent)) == ["1-theirs", "2-unborn", "kept.txt"]
    old = time.time() - staging.UNTOUCHED_SECONDS - 1
    for folder in ("1-theirs", "2-unborn"):
        for path in (*(parent / folder).rglob("*"), parent / folder):
            os.utime(path, (old, old))
    staging.remove_abandoned(parent)
    assert os.listdir(parent) == ["kept.txt"]


def test_staging_for_s3_is_cleaned_in_the_temporary_folder(
    s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    dead, left = hold_staging(s3_root)
    assert left.parent == tmp_path
    dead.kill()
    dead.communicate()
    (tmp_path / "1-somebody-elses").mkdir()
    staging.remove_abandoned(tmp_path, "sae-pipeline-")
    assert os.listdir(tmp_path) == ["1-somebody-elses"]


def test_a_link_whose_answer_was_lost_is_ours(tmp_path: Path) -> None:
    """NFS answers "exists" to the second attempt of a link that had succeeded."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("")
    os.link(source, target)
    assert local._link(source, target)
    source.unlink()
    source.write_text("")
    assert not local._link(source, target)
