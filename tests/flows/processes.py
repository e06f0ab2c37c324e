"""The command line as real processes that can be killed, and what they leave behind."""

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae.plan import PipelineConfig, make_plan
from sae.store.artefacts.records import read_record, verify
from sae.store.storage.filesystem import Storage
from tests.processes import marked

MARK = "SAE_PIPELINE_TEST_RUN"
"""In the environment of a run and of everything it starts."""


class CommandLine:
    """`sae-pipeline run CONFIG` as a process.

    Args:
        through: a command that becomes the one that follows it.
        environment: what it has beside this process's own environment; None takes a name out.
    """

    def __init__(
        self,
        config: PipelineConfig,
        folder: Path,
        *options: str,
        through: Sequence[str] = (),
        **environment: str | None,
    ) -> None:
        self.mark = uuid.uuid4().hex
        file = folder / f"{self.mark}.json"
        file.write_text(config.model_dump_json())
        # Files: a pipe that nobody reads blocks a run that says much.
        self._out, self._err = folder / f"{self.mark}.out", folder / f"{self.mark}.err"
        names = dict(os.environ) | {MARK: self.mark} | environment
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [*through, sys.executable, "-m", "flows.cli", "run", str(file), "--json", *options],
                cwd=Path(__file__).parents[2],
                env={name: value for name, value in names.items() if value is not None},
                stdout=out,
                stderr=err,
            )

    def finish(self, seconds: float = 240) -> tuple[int, dict[str, Any], str]:
        """Wait for its end. Returns: exit code, the JSON of its last line (empty on failure), stderr."""
        code = self.process.wait(seconds)
        lines = self._out.read_text().splitlines()
        return code, json.loads(lines[-1]) if lines else {}, self.said()

    def said(self) -> str:
        """What it has written to stderr so far."""
        return self._err.read_text()

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to the command itself."""
        self.process.send_signal(number)

    def children(self, name: str) -> list[int]:
        """Processes of this run whose command line holds `name`."""
        return marked(MARK, self.mark, name)

    def alive(self) -> list[int]:
        """Every living process of this run, itself and children of children."""
        return marked(MARK, self.mark)


def count_records(root: str) -> int:
    return sum(1 for pattern in ("[!.]*/*/record.json", "[!.]*/*/part-*.json") for _ in Path(root).glob(pattern))


def contents(config: PipelineConfig) -> dict[str, str]:
    """Content digest of every artefact of the plan and of all parts, each verified against its files."""
    storage = Storage(config.execution.root)
    found = {}
    for spec in make_plan(config).specs():
        parts = [
            int(name[5:10]) for name in storage.list(spec.ref) if name.startswith("part-") and name.endswith(".json")
        ]
        for part in (None, *parts):
            record = read_record(storage, spec.ref, part)
            assert record is not None, f"{spec.ref} was never finished"
            assert verify(storage, record) == []
            found[f"{spec.ref} {part}"] = record.content
    return found


def strays(root: str) -> list[str]:
    """Files under a local root that no commit record names, staging and Prefect's results aside."""
    named = set()
    for pattern in ("[!.]*/*/record.json", "[!.]*/*/part-*.json"):
        for path in Path(root).glob(pattern):
            record = json.loads(path.read_text())
            folder = path.parent if record["part"] is None else path.parent / path.stem
            named |= {path, *(folder / record["content"] / entry["name"] for entry in record["files"])}
    # Unfinished files and Prefect's results lie in folders with a dot.
    files = {path for path in Path(root).glob("[!.]*/**/*") if path.is_file()}
    return sorted(str(path.relative_to(root)) for path in files - named)
