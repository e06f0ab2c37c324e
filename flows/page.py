"""`sae-pipeline page`: a few latents of a report as one file."""

import re
from pathlib import Path

from sae.errors import ConfigError
from sae.report.finished import FinishedReport, open_finished
from sae.report.numbers import data_size
from sae.report.single_file import single_file
from sae.serve.find import find_report
from sae.store.storage.filesystem import Storage


def page(uri: str, out: str, latents: str | None, sae: str | None) -> str:
    """Write the file. Returns: a line about it.

    Args:
        uri: a report's folder or index.html, or a run's root: then its newest report. A copy of the folder will do.
        latents: numbers with commas between them; None: random ones.

    Raises: ConfigError when there is no such report or latent, or the file cannot be written; StoreError when the
        report is damaged.
    """
    text = single_file(_open(uri), None if latents is None else _numbers(latents), sae=sae)
    try:
        size = Path(out).write_bytes(text.encode())
    except OSError as err:
        raise ConfigError(f"{out}: cannot be written: {err.strerror}") from err
    return f"{out}: {data_size(size)}, opens anywhere"


def _open(uri: str) -> FinishedReport:
    is_root = not Storage(uri.removesuffix("index.html")).exists("index.html")
    if is_root:
        storage, record = find_report(uri)
        uri = storage.uri(record.ref)
    return open_finished(uri)


def _numbers(text: str) -> list[int]:
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text):
        raise ConfigError(f"--latents {text}: numbers with commas between them, as 17,1043")
    return [int(number) for number in text.split(",")]
