"""Files of a report that are missing, cut short or of another version."""

from pathlib import Path
from typing import Any

from sae.report import chunks

SAID = {"missing": "is missing", "truncated": "is damaged", "schema": "has schema 0, this page reads 2"}


def damage(file: Path, key: str, how: str) -> None:
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        chunks.write_chunk(file.parents[len(Path(key).parts) - 1], key, chunks.encode_json({"schema": 0}))


def forgive_the_browser(visited: Any) -> None:
    """The browser itself says that a file is missing, or ends in the middle of a word."""
    said = ("ERR_FILE_NOT_FOUND", "Invalid or unexpected token")
    assert all(any(text in problem for text in said) for problem in visited.problems), visited.problems
    visited.problems.clear()


def assert_named(visited: Any, views: dict[str, tuple[str, str]], how: str, elsewhere: str) -> None:
    """Each file, damaged, is named by its view; the rest goes on; the file, copied again, is read.

    Args:
        visited: a page of a copy of the report; its files are changed.
        views: by file, the view that cannot do without it, and what that view shows when the file is there.
        how: of `SAID`.
        elsewhere: the SAE whose list is looked at between.
    """
    wrong = []
    for key, (address, there) in views.items():
        file = visited.folder / f"{key}.js"
        whole = file.read_bytes()
        damage(file, key, how)
        page = visited.open(address)
        page.wait_for_selector("[role=alert]:visible")
        said = page.text_content("[role=alert]:visible")
        if f"{key}.js {SAID[how]}" not in said:
            wrong.append((key, said))
        file.write_bytes(whole)
        page.evaluate("name => location.hash = `#/s/${name}/latents`", elsewhere)
        page.wait_for_selector(f"[aria-label='Latents of {elsewhere}'] .row .t", state="visible")
        page.evaluate("hash => location.hash = hash", address)
        page.wait_for_selector(there, state="visible")
        page.goto("about:blank")
    forgive_the_browser(visited)
    assert wrong == []
