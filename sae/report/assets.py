"""The page's scripts and stylesheet, joined from the files of sae/report/site.

Two classic scripts, because modules do not load from file://. The second one holds the views that are not looked at
first; the page adds it when one of them is opened. Classic scripts share one global scope, so the second sees what the
first declares.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SCRIPTS = (
    *("types", "dom", "numbers", "chunks", "data", "addresses", "query", "search"),
    *("random", "list", "export", "contexts", "histogram", "evidence", "labels", "latent", "judge"),
    *("pairs", "toy", "live", "plots", "shell", "start"),
)
"""Files of site/app, in the order in which they become the first script: the ground, the views, what joins them."""
LATER_SCRIPTS = ("compare", "map", "reader", "steer", "try")
"""Those of the second."""
STYLES = ("base", "shell", "tables", "overview", "contexts", "list", "latent", "compare", "map", "toy", "try", "media")
"""Files of site/style, in the order in which they become one stylesheet."""
_SCRIPT_HEAD = """\
// Joined from sae/report/site/app, without its comments: a classic script without dependencies, for file://.
// Text reaches the page only as text nodes and attributes, never as markup: every token is untrusted.
"use strict";
"""
_BLOCK_COMMENT = re.compile(r"^[ \t]*/\*.*?\*/[ \t]*\n", re.DOTALL | re.MULTILINE)


def read_script(site: Any, names: Sequence[str] = SCRIPTS) -> bytes:
    """Files of site/app in their order as one classic script."""
    return (_SCRIPT_HEAD + "".join(stripped(_read(site, f"app/{name}.js")) for name in names)).encode()


def read_style(site: Any) -> bytes:
    """The files of site/style in their order as one stylesheet."""
    return "\n".join(_read(site, f"style/{name}.css") for name in STYLES).encode()


def stripped(script: str) -> str:
    """A script without indentation, empty lines, and comments that have lines to themselves: a sixth fewer bytes.

    No statement changes as long as no template literal goes on over the end of a line; the scripts have none.
    """
    lines = (line.strip() for line in _BLOCK_COMMENT.sub("", script).splitlines())
    return "".join(f"{line}\n" for line in lines if line and not line.startswith("//"))


def write_asset(folder: Path, stem: str, data: bytes, suffix: str) -> str:
    """Write a file of assets/ under a name with its hash, so that a bucket can cache it for ever. Returns: the name."""
    name = f"{stem}.{hashlib.sha256(data).hexdigest()[:10]}.{suffix}"
    (folder / "assets").mkdir(exist_ok=True)
    (folder / "assets" / name).write_bytes(data)
    return name


def _read(site: Any, name: str) -> str:
    return str((site / name).read_text(encoding="utf-8"))
