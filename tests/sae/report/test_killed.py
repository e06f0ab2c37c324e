"""kill -9 in the middle of rendering: nothing is committed, and rendering again gives the same folder."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sae.report.render import render_report
from sae.store.artefacts import records
from sae.store.storage.filesystem import Storage
from tests.flows.processes import strays
from tests.processes import wait_for

RENDER = """
import sys
from sae.report.config import ReportSpec
from sae.report.render import render_report
from sae.store.storage.filesystem import Storage
root, spec = sys.argv[1:]
render_report(Storage(root), ReportSpec.model_validate_json(open(spec).read()), [])
"""


@pytest.mark.parametrize("written", ["data/*/latents/1.js", "tables/examples.parquet"])
def test_a_killed_render_leaves_nothing_and_is_done_again(
    written: str, report: Any, synthetic: Any, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    shutil.copytree(report.storage.root, root, ignore=shutil.ignore_patterns("reports"))
    spec = tmp_path / "spec.json"
    spec.write_text(report.spec.model_dump_json())
    process = subprocess.Popen([sys.executable, "-c", RENDER, str(root), str(spec)])
    wait_for(lambda: any(root.glob(f".staging/**/{written}")) or process.poll() is not None, 120)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

    storage = Storage(str(root))
    assert records.read_record(storage, report.spec.ref) is None
    assert strays(str(root)) == []
    record = render_report(storage, report.spec, synthetic.LINEAGE)
    assert record.content == report.record.content
    assert contents(root / record.folder) == contents(report.folder)
    assert strays(str(root)) == []


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
