"""Fixtures shared by all tests: roots, and activation snapshots written through the real store."""

import os

# One server start must not time out on a loaded machine, and nothing is sent out.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
# Idle threads of torch must not spin while other processes want the cores; read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# As processes that compute have it, so that a GPU gives the same bits twice.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import contextlib
import http.server
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
import xxhash

from sae.config import digest
from sae.extract.config import GivenPartsSpec, InlineSource
from sae.store.artefacts.records import commit
from sae.store.part.encoding import Dtype, Encoding, decode, encode
from sae.store.part.writer import write_part
from sae.store.snapshots.snapshot import Snapshot, SnapshotSpec, commit_snapshot, encode_vector, read_snapshot
from sae.store.storage.filesystem import Storage
from tests.browsing import Page, StaticFiles
from tests.ray_head import Head

MakeSnapshot = Callable[..., Snapshot]

# How long an example takes says more about what else the machine does than about the code.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

BROWSER_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked for the other kind of machine."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if item.get_closest_marker("without_gpu") and torch.cuda.is_available():
        pytest.skip("there is a GPU")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """A fresh root on disk."""
    return Storage(str(tmp_path / "root"))


@pytest.fixture
def memory_storage() -> Iterator[Storage]:
    """A fresh root in memory."""
    storage = Storage("memory://root")
    storage.fs.store.clear()
    storage.fs.pseudo_dirs[:] = [""]
    yield storage
    storage.fs.store.clear()


@pytest.fixture(params=["disk", "memory", "s3"])
def any_storage(request: pytest.FixtureRequest) -> Storage:
    """A fresh root of every kind that we support."""
    if request.param == "s3":
        return Storage(request.getfixturevalue("s3_root"))
    return request.getfixturevalue("storage" if request.param == "disk" else "memory_storage")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The URL of an S3 endpoint in a process of its own (moto), which dies with the tests."""
    with s3_endpoint() as url:
        yield url


@pytest.fixture
def strict_s3_server() -> Iterator[str]:
    """An endpoint that checks credentials; it knows none."""
    with s3_endpoint(INITIAL_NO_AUTH_ACTION_COUNT="0") as url:
        yield url


@pytest.fixture
def s3_environment(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of somebody who uses S3, and of the processes he starts: endpoint, region, credentials."""
    variables = {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "AKIAPLANTEDKEY000001",
        "AWS_SECRET_ACCESS_KEY": "planted+secret/that-must-never-be-seen",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "no-aws-config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "no-aws-credentials"),
    }
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    from sae.store.storage import s3

    s3.FileSystem.clear_instance_cache()  # clients keep the environment they were made in
    yield variables
    s3.FileSystem.clear_instance_cache()


@pytest.fixture
def s3_root(s3_environment: dict[str, str]) -> str:
    """A fresh bucket on the endpoint, and a prefix in it: `s3://bucket/prefix`."""
    from sae.store.storage import s3

    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    s3.connect().mkdir(bucket)
    return f"s3://{bucket}/some/prefix"


@pytest.fixture
def make_snapshot() -> MakeSnapshot:
    """Write arrays as the parts of a snapshot: `make_snapshot(storage, [act, ...], row_group_rows=...)`."""
    return write_snapshot


@pytest.fixture(scope="session")
def prefect_backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A temporary Prefect server, started once; imported lazily so that tests/sae stays fast."""
    from prefect.settings import (
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        PREFECT_LOCAL_STORAGE_PATH,
        PREFECT_LOGGING_LEVEL,
        temporary_settings,
    )
    from prefect.testing.utilities import prefect_test_harness

    settings = {
        PREFECT_LOCAL_STORAGE_PATH: str(tmp_path_factory.mktemp("results")),
        PREFECT_LOGGING_LEVEL: "CRITICAL",
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,  # every flow would wait up to a second for its thread
    }
    with prefect_test_harness(server_startup_timeout=120), temporary_settings(settings):
        yield


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A Ray cluster on this machine, which asks for a token."""
    head = Head(tmp_path_factory.mktemp("head"))
    try:
        head.wait_until_up()
        yield head
    finally:
        head.stop()


@contextlib.contextmanager
def s3_endpoint(through: Sequence[str] = (), address: str = "127.0.0.1", **environment: str) -> Iterator[str]:
    """The URL of a moto server in a process of its own, while the block runs.

    Args:
        through: a command that becomes the one that follows it.
    """
    command = [*through, sys.executable, str(Path(__file__).with_name("s3_server.py")), str(os.getpid()), address]
    # With AWS_* of the user the server's own client might talk to the real S3.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=clean | environment) as process:
        try:
            assert process.stdout
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def write_snapshot(
    storage: Storage,
    parts: list[np.ndarray],
    *,
    row_group_rows: int = 64,
    seq: list[np.ndarray] | None = None,
    pos: list[np.ndarray] | None = None,
    token: list[np.ndarray] | None = None,
    dtype: Dtype | None = None,
) -> Snapshot:
    """Write each array [rows, d_in] as one part and commit them as a snapshot.

    They are stored as they are, float16 or float32, or encoded as `dtype`.
    By default `seq` numbers all rows, `pos` is 0 and `token` -1, as for given activations.
    """
    spec = GivenPartsSpec(
        source=InlineSource(values=((0.0, 1.0), (1.0, 0.0))),
        content=digest([xxhash.xxh3_64_hexdigest(np.ascontiguousarray(part).data) for part in parts]),
        split="train",
        heldout_fraction=0,
        dtype=dtype or str(parts[0].dtype),
        part_bytes=1,
        row_group_bytes=1,
        seed=row_group_rows,
    )
    start = 0
    for index, act in enumerate(parts):
        n_rows = len(act)
        encoding = Encoding(dtype=str(act.dtype))
        if dtype:
            act, encoding = encode(torch.from_numpy(act), dtype)
        numbers = np.arange(start, start + n_rows, dtype=np.int32)
        start += n_rows
        with storage.staging() as folder:
            layout = write_part(
                folder / "part.parquet",
                act,
                seq[index] if seq else numbers,
                pos[index] if pos else np.zeros(n_rows, np.int32),
                token[index] if token else np.full(n_rows, -1, np.int32),
                row_group_rows=row_group_rows,
                encoding=encoding,
            )
            wide = decode(torch.from_numpy(act), encoding).double().numpy()
            metrics = {
                "layout": layout.model_dump(mode="json"),
                "n_rows": n_rows,
                "sum": encode_vector(wide.sum(0)),
                "sum_sq": float((wide**2).sum()),
            }
            commit(storage, spec, folder, metrics, seconds=0.0, part=index)
    with storage.staging() as folder:
        plan = {
            "n_parts": len(parts),
            "tokens_per_part": max(len(part) for part in parts),
            "d_in": parts[0].shape[1],
        }
        commit(storage, spec, folder, plan, seconds=0.0)
    snapshot_spec = SnapshotSpec(parts=(spec.ref,), n_tokens=None)
    commit_snapshot(storage, snapshot_spec)
    return read_snapshot(storage, snapshot_spec.ref)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium: the system's, else playwright's own.

    For a module: playwright's event loop bears no second one beside it, and no flow of Prefect.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        system = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        try:
            started = driver.chromium.launch(executable_path=system, args=BROWSER_ARGS)
        except playwright.Error as err:
            pytest.skip(f"no browser: {str(err).splitlines()[0]}; install chromium, or `playwright install chromium`")
        yield started
        started.close()


@pytest.fixture(scope="session")
def serve_folder() -> Iterator[Callable[[Path], str]]:
    """Serve a folder as any static server does, on loopback; returns its address."""
    with contextlib.ExitStack() as servers:

        def served(folder: Path) -> str:
            def handler(*args: Any) -> StaticFiles:
                return StaticFiles(*args, directory=str(folder))

            server = servers.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
            servers.callback(server.shutdown)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            return f"http://127.0.0.1:{server.server_address[1]}"

        yield served


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Page]]:
    """Open pages; the test fails when one of them had a problem nobody read."""
    opened: list[Page] = []

    def page_of(folder: Path, base: str | None = None, **context: Any) -> Page:
        opened.append(Page(browser, folder, base, **context))
        return opened[-1]

    yield page_of
    for page in opened:
        page.context.close()
    assert [page.problems for page in opened] == [[] for _ in opened]
