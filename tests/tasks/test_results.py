"""Prefect's results lie on the root: found again whatever the entry point, and safe to lose."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sae.store import layout
from sae.store.storage.filesystem import Storage

SCRIPT = Path(__file__).with_name("cached_flow.py")


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A root on disk and one on S3."""
    return str(tmp_path / "root") if request.param == "local" else request.getfixturevalue("s3_root")


@pytest.fixture
def here(prefect_backend: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Run the flow in this process."""
    specification = importlib.util.spec_from_file_location("cached_flow", SCRIPT)
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path / "marks")])
    return lambda root: str(module.cached_flow(root))


@pytest.fixture
def elsewhere(prefect_backend: None, tmp_path: Path) -> Callable[[str], str]:
    """Run the flow as a program in another folder, with other settings of Prefect's storage."""
    from prefect.settings import get_current_settings

    folder = tmp_path / "elsewhere"
    folder.mkdir()
    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    settings["PREFECT_LOCAL_STORAGE_PATH"] = settings["PREFECT_RESULTS_LOCAL_STORAGE_PATH"] = str(folder / "results")
    environment = dict(os.environ) | settings | {"PYTHONPATH": str(SCRIPT.parents[2])}

    def run(root: str) -> str:
        command = [sys.executable, str(SCRIPT), root, str(tmp_path / "marks")]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def test_a_second_run_is_cached_whatever_the_entry_point(
    root: str, here: Callable[[str], str], elsewhere: Callable[[str], str], tmp_path: Path
) -> None:
    storage, marks = Storage(root), tmp_path / "marks"
    assert [here(root), here(root), elsewhere(root)] == ["Completed", "Cached", "Cached"]
    assert marks.read_text() == "x"
    (path,) = (f"{layout.RESULTS}/{name}" for name in storage.list(layout.RESULTS))
    assert json.loads(json.loads(storage.read_bytes(path))["result"]) == {"double": 14}
    storage.remove(path)
    assert [here(root), here(root)] == ["Completed", "Cached"]
    storage.replace(path, b'{"torn')
    assert [here(root), here(root)] == ["Completed", "Cached"]
    assert marks.read_text() == "xxx"


def test_runs_that_save_the_block_at_once_share_it(s3_root: str, prefect_backend: None) -> None:
    import contextvars

    from prefect.client.orchestration import get_client

    from tasks.results import result_storage

    storage = Storage(s3_root)
    # Settings of the session's server are context-local.
    contexts = [contextvars.copy_context() for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        blocks = list(threads.map(lambda context: context.run(result_storage, storage), contexts))
    assert len({block._block_document_id for block in blocks}) == 1
    with get_client(sync_client=True) as client:
        known = client.request("POST", "/block_documents/filter", json={}).json()
    mine = [block for block in known if block["data"].get("basepath") == storage.uri(layout.RESULTS)]
    assert len(mine) == 1
    text = json.dumps(known)
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in text
    assert os.environ["AWS_ACCESS_KEY_ID"] not in text
