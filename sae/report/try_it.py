"""Stored passages -> data of the view "Try it": whole held-out contexts with the strongest latents of every token."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sae.report import chunks
from sae.report.display import Segment, plain, show_tokens
from sae.report.inputs import SAEInputs
from sae.report.numbers import short

PREVIEW_CHARS = 60
"""Of a passage's beginning, to choose it by."""
_BATCH_ROWS = 16


def write_passages(folder: Path, inputs: SAEInputs, chunk_bytes: int) -> int:
    """Write data/<sae>/try.js, which lists the passages, and their text as data/<sae>/try/<file>.js.

    Returns: how many there are; nothing is written when the statistics have none (given activations).
    """
    if inputs.passages is None:
        return 0
    base = f"data/{inputs.key}/try"
    listed: list[list[Any]] = []
    batch: list[dict[str, Any]] = []
    dictionary: dict[tuple[Any, ...], int] = {}
    size, number = 0, 0

    def write() -> None:
        nonlocal size, number
        tokens = [[token, *map(_thawed, shown)] for token, *shown in dictionary]
        payload = {"schema": chunks.SCHEMA_VERSION, "tokens": tokens, "passages": batch}
        chunks.write_chunk(folder, f"{base}/{number}", chunks.encode_json(payload))
        batch.clear()
        dictionary.clear()
        size, number = 0, number + 1

    for row in _iter_rows(inputs.passages):
        shown = show_tokens(row["token_bytes"])
        listed.append([plain(row["doc_name"] or "", 120), row["seq"], number, len(batch), _preview(shown)])
        keys = [(token, *map(_frozen, segments)) for token, segments in zip(row["token_ids"], shown, strict=True)]
        passage = {
            "tokens": [dictionary.setdefault(key, len(dictionary)) for key in keys],
            "latents": row["latents"],
            "values": [short(value) for value in row["values"]],
        }
        batch.append(passage)
        # Numbers deflate to about half, base64 adds a third.
        size += len(chunks.encode_json(passage)) * 2 // 3
        if size >= chunk_bytes:
            write()
    if batch:
        write()
    if listed:
        index = {"schema": chunks.SCHEMA_VERSION, "passages": listed}
        chunks.write_chunk(folder, base, chunks.encode_json(index))
    return len(listed)


def _iter_rows(path: Path) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_BATCH_ROWS):
            yield from batch.to_pylist()


def _preview(tokens: list[list[Segment]]) -> str:
    """How a passage begins, on one line: an entry of a menu."""
    text = ""
    for segments in tokens:
        text += "".join(part if isinstance(part, str) else part[0] for part in segments)
        if len(text) >= PREVIEW_CHARS:
            break
    return " ".join(text.split())[:PREVIEW_CHARS]


def _frozen(part: Segment) -> str | tuple[str, ...]:
    return part if isinstance(part, str) else tuple(part)


def _thawed(part: str | tuple[str, ...]) -> Segment:
    return part if isinstance(part, str) else list(part)
