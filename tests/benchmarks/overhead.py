"""What orchestration costs: a run's wall time minus the time inside its stages."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from sae.store.artefacts.records import Record, require_record
from sae.store.storage.filesystem import Storage
from tests.benchmarks.timing import Row


def overhead(folder: Path) -> Iterator[Row]:
    """Seconds of `sae-pipeline run toy`, in a fresh process with an ephemeral server, outside and inside stages."""
    root = folder / "root"
    environment = os.environ | {"PREFECT_HOME": str(folder / "prefect")}
    for what in ("first run", "second run"):
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli", "run", "toy", "--root", str(root), "--json"],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        result = json.loads(done.stdout.splitlines()[-1])
        storage = Storage(str(root))
        inside = sum(
            _record(storage, task).produced.seconds for task in result["tasks"] if task["outcome"] == "computed"
        )
        seconds = result["seconds"]
        ratio = (inside / seconds,)
        yield Row(
            f"toy, {what}: inside stages / whole run", f"{seconds - inside:.1f} s outside", f"{seconds:.1f} s", ratio
        )


def _record(storage: Storage, task: dict[str, str]) -> Record:
    part = task["part"]
    return require_record(storage, task["ref"], None if part is None else int(part))
