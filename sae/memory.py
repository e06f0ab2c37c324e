"""How much memory this machine has, and a refusal of what cannot fit into it."""

import os
from pathlib import Path

from sae.errors import ConfigError

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where a container's limit stands (version 2 and 1); no number where there is none."""


def machine_bytes() -> int:
    """Bytes of memory that this process can have at most: the machine's, or its container's."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in CGROUP_LIMITS:
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            limits.append(int(text))
    return min(limits)


def check_fits(n_bytes: int, what: str, advice: str) -> None:
    """Raises: ConfigError when something needs more memory than there is. `n_bytes` is the least it takes."""
    available = machine_bytes()
    if n_bytes > available:
        raise ConfigError(
            f"{what} needs at least {readable(n_bytes)} of memory, this machine has {readable(available)}. {advice}"
        )


def readable(n_bytes: int) -> str:
    """A size for people: `24.6 GB`."""
    size = float(n_bytes)
    for unit in ("bytes", "kB", "MB", "GB", "TB", "PB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "bytes" else f"{n_bytes} bytes"
        size /= 1000
    return f"{size:.3g} EB"
