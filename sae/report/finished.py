"""A report that was rendered, read back from its folder."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sae.errors import ConfigError, StoreError
from sae.report import chunks
from sae.store.artefacts.records import require_record
from sae.store.storage.filesystem import Storage

_REPORT = re.compile(r"^(?P<root>.*?)/?(?P<ref>reports/[0-9a-f]{16})(?:/.*)?$")
_SUMMARY = re.compile(rb'<script type="application/json" id="summary">(.*?)</script>', re.DOTALL)


@dataclass(frozen=True)
class FinishedReport:
    """The files of a report."""

    storage: Storage
    folder: str
    summary: dict[str, Any]
    """What its page knows before it loads any data."""

    def read(self, name: str) -> bytes:
        """A file of the report. Raises: StoreError when it is not there."""
        return self.storage.read_bytes(f"{self.folder}/{name}")

    def json_chunk(self, key: str) -> Any:
        """What a data file holds. Raises: StoreError when it is missing or damaged."""
        return self._decoded(key, json.loads)

    def column(self, sae: dict[str, Any], name: str) -> np.ndarray:
        """One statistic of all latents of an SAE of the summary: [d_sae] or [d_sae, width].

        Raises: StoreError when its file is missing or damaged.
        """
        values: np.ndarray = self._decoded(f"data/{sae['key']}/col/{name}", chunks.decode_column)
        return values

    def _decoded(self, key: str, decode: Callable[[bytes], Any]) -> Any:
        script = self.read(f"{key}.js")
        try:
            return decode(chunks.decode_chunk(key, script))
        except ValueError as err:
            where = self.storage.uri(f"{self.folder}/{key}.js")
            raise StoreError(f"{where}: damaged, {err}. Copy this file again, or render the report again.") from err

    def sae(self, name: str | None) -> dict[str, Any]:
        """An SAE of the summary by its name or key; None: the first one.

        Raises: ConfigError when there is no such one.
        """
        saes: list[dict[str, Any]] = self.summary["saes"]
        for known in saes:
            if name in (None, known["key"], known["name"]):
                return known
        raise ConfigError(f"SAE {name!r}: the report has {', '.join(known['key'] for known in saes)}")

    def check_latent(self, sae: dict[str, Any], number: int) -> None:
        """Raises: ConfigError when the SAE has no such latent."""
        if not 0 <= number < sae["nLatents"]:
            raise ConfigError(f"latent {number}: {sae['name']} has latents 0 to {sae['nLatents'] - 1}")


def open_finished(uri: str) -> FinishedReport:
    """A report by its address.

    Args:
        uri: the artefact (root/reports/fingerprint), anything inside it, or a copy of its folder.

    Raises: StoreError when there is no finished report.
    """
    match = _REPORT.match(uri.rstrip("/"))
    if match:
        storage = Storage(match["root"] or ".")
        folder = require_record(storage, match["ref"]).folder
    else:
        storage, folder = Storage(uri.rstrip("/").removesuffix("/index.html")), "."
    summary = _SUMMARY.search(storage.read_bytes(f"{folder}/index.html"))
    if summary is None:
        raise StoreError(f"{storage.uri(folder)}: index.html is not the page of a report")
    return FinishedReport(storage, folder, json.loads(summary[1]))
