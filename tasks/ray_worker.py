"""What runs on the machines of a Ray cluster, beside tasks: their set-up, and what they say of themselves."""

import logging
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash


def set_up() -> None:
    """Ray's `worker_process_setup_hook`: what is logged goes to stderr, and Ray brings that to the flow's terminal."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for name in ("tasks", "sae"):
        logging.getLogger(name).setLevel(logging.INFO)


def facts(marker: str | None) -> dict[str, Any]:
    """What must be the same on all machines, for results to be.

    Args:
        marker: a file in a local root, just made elsewhere. None: the root is no folder.
    """
    found = {
        "Python": ".".join(map(str, sys.version_info[:2])),
        "torch": version("torch"),
        "the code of sae-pipeline": _digest_code(),
    }
    return found if marker is None else found | {"the folder of execution.root": Path(marker).is_file()}


def differing(here: Mapping[str, Any], there: Mapping[str, Any]) -> str:
    """Which facts are not the same, as a clause; empty when all are."""
    return ", ".join(
        name if isinstance(here[name], bool) else f"{name} ({there[name]}, here {here[name]})"
        for name in here
        if there[name] != here[name]
    )


@cache
def _digest_code() -> str:
    """Of the packages that make results; whoever edits them while a flow runs has edited them for all its tasks."""
    digest, top = xxhash.xxh3_64(), Path(__file__).resolve().parents[1]
    for package in ("sae", "tasks"):
        for path in sorted((top / package).rglob("*.py")):
            digest.update(f"{path.relative_to(top)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:8]
