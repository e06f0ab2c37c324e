"""`sae-pipeline show`: any artefact for a person."""

import re
from typing import Any

from flows.lineage import TITLES, ancestors, describe
from sae.errors import ConfigError
from sae.store.artefacts.records import Record, require_record, verify
from sae.store.storage.filesystem import Storage

ADDRESS = re.compile(rf"^(?P<root>.*?)/?(?P<ref>(?:{'|'.join(TITLES)})/[0-9a-f]{{16}})(?:/(?:part-(?P<part>\d+))?.*)?$")


def show(uri: str, *, check: bool) -> str:
    """What an artefact is, when and how it was made, its sizes, metrics and lineage.

    Args:
        uri: the artefact's folder, or anything inside it.
        check: read every file and compare it with the recorded hash.

    Raises: ConfigError when the URI is no artefact's; StoreError when it was never finished.
    """
    match = ADDRESS.match(uri)
    if match is None:
        raise ConfigError(
            f"{uri}: not an artefact. An artefact's URI ends in stage/fingerprint, with one of the stages "
            f"{', '.join(TITLES)} and 16 hex digits."
        )
    storage = Storage(match["root"] or ".")
    record = require_record(storage, match["ref"], int(match["part"]) if match["part"] else None)
    lines = [f"{TITLES[record.ref.partition('/')[0]]}: {describe(record)}", ""]
    lines += _table(_facts(storage, record))
    if record.metrics:
        lines += ["", "metrics", *_table(_plain(record.metrics))]
    lines += ["", "from"]
    for depth, role, ref, parent in ancestors(storage, record):
        lines.append(f"{'  ' * depth}{role}: {ref}  {describe(parent) if parent else '(not in this root)'}")
    if check:
        lines += ["", *(verify(storage, record) or ["every file has its recorded hash"])]
    return "\n".join(lines)


def _facts(storage: Storage, record: Record) -> dict[str, str]:
    produced = record.produced
    n_bytes = sum(entry.n_bytes for entry in record.files)
    return {
        "address": storage.uri(record.ref),
        "files": f"{len(record.files)} files, {_bytes(n_bytes)}, in {storage.uri(record.folder)}",
        "made": f"{produced.created} in {produced.seconds:.1f} s on {produced.machine}, {produced.threads} threads",
        "versions": ", ".join(f"{name} {version}" for name, version in produced.versions.items()),
        "code": f"version {record.code_version} of this stage, commit {produced.commit or 'unknown'}",
    }


def _plain(metrics: dict[str, Any], prefix: str = "") -> dict[str, str]:
    rows: dict[str, str] = {}
    for key, value in metrics.items():
        if isinstance(value, dict) and key != "layout":
            rows |= _plain(value, f"{prefix}{key}.")
        elif isinstance(value, float):
            rows[prefix + key] = f"{value:.6g}"
        elif isinstance(value, int | str) and len(str(value)) <= 80:
            rows[prefix + key] = f"{value:,}" if isinstance(value, int) else value
    return rows


def _table(rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows), default=0)
    return [f"  {key:<{width}}  {value}" for key, value in rows.items()]


def _bytes(n_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"
