"""Processes by a mark in their environment, which all that they start have too, whoever their parents are by now."""

from pathlib import Path

MARK = "SAE_PIPELINE_TEST_GANG"


def marked(mark: str, module: str = "") -> list[int]:
    """Living processes that were started with this mark, of a command line with `module`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            alive = (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            if alive and f"{MARK}={mark}\0" in (folder / "environ").read_text() and module in _command(folder):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def _command(folder: Path) -> str:
    return (folder / "cmdline").read_text().replace("\0", " ")
