"""A small file system that only the commands run on it see."""

import shutil
import subprocess
from pathlib import Path


def on_small_disk(folder: Path, options: str) -> list[str] | None:
    """What to put before a command, to run it where `folder` is a tmpfs of its own.

    Args:
        options: of the mount, as `size=4m`.

    Returns: None where none can be mounted (that takes unshare, user namespaces and tmpfs).
    """
    script = f'mount -t tmpfs -o {options} tmpfs "$1" && shift && exec "$@"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(folder)]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], capture_output=True).returncode != 0:
        return None
    return command
