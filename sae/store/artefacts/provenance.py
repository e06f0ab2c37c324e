"""How an artefact's bytes came to be: time, machine, versions. Recorded beside them, never part of an identity."""

import datetime
import functools
import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from sae.config import FrozenConfig

if TYPE_CHECKING:
    import torch


class Provenance(FrozenConfig):
    """When, where and with what the bytes were made."""

    created: str
    """UTC, ISO 8601."""
    seconds: float
    machine: str
    """System and processor, and the GPU where one has computed."""
    threads: int
    versions: dict[str, str]
    commit: str | None
    """Git commit of the code, `-dirty` when the tree had changes; None outside a checkout."""

    @property
    def environment(self) -> str:
        """What may make the same work give other bytes, for messages."""
        return f"{self.machine}, {self.threads} threads, torch {self.versions.get('torch', 'not used')}"


def provenance(seconds: float, device: "torch.device | str" = "cpu") -> Provenance:
    """Of work done just now, here, which took `seconds`. device: what has computed, of it all or of most."""
    import torch

    machine = f"{platform.system()} {platform.machine()}"
    if torch.device(device).type == "cuda":
        machine += f", {torch.cuda.get_device_name(device)}"
    return Provenance(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=round(seconds, 3),
        machine=machine,
        threads=torch.get_num_threads(),
        versions=_versions(),
        commit=_git_commit(),
    )


@functools.cache
def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("sae-pipeline", "torch", "numpy", "pyarrow", "transformers")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


@functools.cache
def _git_commit() -> str | None:
    source = Path(__file__).resolve().parents[2]
    if not (source / ".git").exists():
        return None
    try:
        head = _git(source, "rev-parse", "HEAD")
        changed = _git(source, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if changed else head


def _git(source: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments],
        cwd=source,
        env={"PATH": os.environ.get("PATH", "")},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()
