"""Statistics and examples of one SAE -> the page's columns, labels and latent chunks."""

import dataclasses
import gc
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sae.philox import philox
from sae.progress import Progress
from sae.report import chunks
from sae.report.config import ReportConfig
from sae.report.display import Segment
from sae.report.examples import Context, iter_examples
from sae.report.inputs import SAEInputs
from sae.report.latents import Latent, encode_latents
from sae.report.model_labels import model_words
from sae.report.numbers import shorts
from sae.report.rules import latent_label
from sae.report.words import LatentIndex

SPARK_BINS = 16
SPARK_STEPS = 40
"""Heights of a bar of the list's small histograms: it is 20 pixels high, and half a pixel can be seen."""
_SNIPPET_BEFORE, _SNIPPET_AFTER = 10, 5
_MEASURED = 64
"""Latents whose pages are encoded to find out how many fit into a file."""


@dataclasses.dataclass(frozen=True)
class SAEPages:
    """What the page must know to find one SAE's data, and what the overview shows of it."""

    columns: tuple[str, ...]
    latents_per_chunk: int
    index: dict[str, list[str] | str]
    """By kind, the first key of every file of the search index; or {"off": why there is none}."""
    random_latents: list[tuple[int, Context | None]]
    """The first live latents of the shuffled order with their strongest context."""


def write_pages(folder: Path, inputs: SAEInputs, config: ReportConfig, progress: Progress) -> SAEPages:
    """Write data/<sae>/col/, labels/, latents/ and index/ of one SAE."""
    # Millions of tokens and numbers, and no cycles among them: looking for some took a third of the time.
    collects = gc.isenabled()
    gc.disable()
    try:
        return _write_pages(folder, inputs, config, progress)
    finally:
        if collects:
            gc.enable()


def _write_pages(folder: Path, inputs: SAEInputs, config: ReportConfig, progress: Progress) -> SAEPages:
    base = f"data/{inputs.key}"
    columns = latent_columns(inputs, config.seed)
    for name, values in columns.items():
        chunks.write_chunk(folder, f"{base}/col/{name}", chunks.encode_column(values))
    n_latents, n_rows = inputs.latents.num_rows, int(inputs.statistics["n_rows"])
    chosen = _first_live(columns, config.n_random)
    strongest: dict[int, Context | None] = {}
    labels: list[list[Any]] = []
    index = LatentIndex(n_latents, config.index_bytes)

    latents = _iter_latents(inputs)
    head = list(itertools.islice(latents, _MEASURED))
    measured = len(chunks.deflate(encode_latents(head, n_rows))) * 4 // 3
    per_chunk = chunks.latents_per_chunk(measured, len(head), config.chunk_bytes)
    latents = itertools.chain(head, latents)
    for number in itertools.count():
        batch = list(itertools.islice(latents, per_chunk))
        if not batch:
            break
        chunks.write_chunk(folder, f"{base}/latents/{number}", encode_latents(batch, n_rows))
        for latent in batch:
            top = next((context for context in latent.contexts if context.group == "top"), None)
            labels.append(_label_row(latent, top))
            index.add(latent)
            if latent.row["latent"] in chosen:
                strongest[latent.row["latent"]] = top
        progress(min((number + 1) * per_chunk, n_latents), n_latents, "latents", inputs.key)
    for shard in range(math.ceil(n_latents / chunks.LABEL_SHARD)):
        rows = labels[shard * chunks.LABEL_SHARD : (shard + 1) * chunks.LABEL_SHARD]
        chunks.write_chunk(folder, f"{base}/labels/{shard}", chunks.encode_json(rows))
    edges = index.write(folder, f"{base}/index")
    return SAEPages(tuple(columns), per_chunk, edges, [(latent, strongest[latent]) for latent in chosen])


def latent_columns(inputs: SAEInputs, seed: int) -> dict[str, np.ndarray]:
    """The statistics of all latents that the list shows, sorts and filters by.

    `order` is the default order: live latents shuffled, then dead ones; [d_sae] latent ids. `spark` is the histogram
    in SPARK_BINS bars.
    """
    table = inputs.latents
    n_fired = _array(table, "n_fired")
    columns = {
        "order": shuffled_order(n_fired, seed),
        "frequency": _array(table, "frequency"),
        "n_fired": n_fired,
        "max": _array(table, "max_act"),
        "mean": _array(table, "mean_act"),
        "dense": _array(table, "dense").astype(np.uint8),
        "spark": sparklines(table["histogram"]),
        "duplicate": table["duplicate_of"].is_valid().to_numpy(),
    }
    if table["rule_kind"].null_count < table.num_rows:
        columns |= {name: _array(table, f"rule_{name}") for name in ("precision", "recall", "lift")}
    share = _array(table, "top_tenth_share").astype(np.float64)
    if np.isfinite(share).any():
        columns["share"] = share
        columns["rule"] = _array(table, "top_tenth_passes").astype(np.float64) == 1
    return columns


def shuffled_order(n_fired: np.ndarray, seed: int) -> np.ndarray:
    """Live latents in a seeded random order, then dead ones by id. [d_sae]"""
    live = np.flatnonzero(n_fired > 0)
    shuffled = philox("report order", seed).permutation(live)
    return np.concatenate([shuffled, np.flatnonzero(n_fired == 0)]).astype(np.uint32)


def sparklines(histograms: pa.ChunkedArray) -> np.ndarray:
    """Histograms as SPARK_BINS heights (roots of counts) over their occupied range, up to SPARK_STEPS for the highest.

    Returns: [d_sae, SPARK_BINS]
    """
    lines = np.zeros((len(histograms), SPARK_BINS), np.uint8)
    for row, counts in enumerate(histograms.to_pylist()):
        filled = np.flatnonzero(counts)
        if len(filled):
            used = np.array(counts[filled[0] : filled[-1] + 1], np.float64)
            bins = np.arange(len(used)) * SPARK_BINS // len(used) if len(used) > SPARK_BINS else np.arange(len(used))
            heights = np.sqrt(np.bincount(bins, used, SPARK_BINS))
            # n * h / h can exceed n by a rounding error.
            lines[row] = np.minimum(SPARK_STEPS, np.ceil(SPARK_STEPS * heights / heights.max()))
    return lines


def _iter_latents(inputs: SAEInputs) -> Iterator[Latent]:
    rows = (row for batch in inputs.latents.to_batches(1024) for row in _shortened(batch).to_pylist())
    contexts = iter_examples(inputs.examples, inputs.latents.num_rows)
    return (Latent(row, found) for row, found in zip(rows, contexts, strict=True))


def _shortened(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Float32 columns, and lists of float32, as their shortest decimals."""
    kinds = (field.type.value_type if pa.types.is_list(field.type) else field.type for field in batch.schema)
    columns = [
        shorts(column) if pa.types.is_float32(kind) else column
        for column, kind in zip(batch.columns, kinds, strict=True)
    ]
    return pa.RecordBatch.from_arrays(columns, batch.schema.names)


def _label_row(latent: Latent, top: Context | None) -> list[Any]:
    """What the list shows and searches: [rule or 0, segments before, at and after the strongest firing], and a model's
    explanation where there is one."""
    label = latent_label(latent.row)
    return [label.dump() if label else 0, *(snippet(top) if top else ([], [], [])), *model_words(latent.row)]


def snippet(context: Context) -> tuple[list[Segment], list[Segment], list[Segment]]:
    """A few tokens around the peak: before, at, after. Indentation is shortened to two spaces: a list row is short."""
    first = max(0, context.peak - _SNIPPET_BEFORE)
    last = min(len(context.tokens), context.peak + _SNIPPET_AFTER + 1)
    return (
        _joined(context, range(first, context.peak)),
        context.segments(context.peak),
        _joined(context, range(context.peak + 1, last)),
    )


def _joined(context: Context, indices: range) -> list[Segment]:
    joined: list[Segment] = []
    for part in itertools.chain.from_iterable(context.segments(i) for i in indices):
        if isinstance(part, str):
            part = re.sub(" {3,}", "  ", part)
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def _first_live(columns: dict[str, np.ndarray], count: int) -> list[int]:
    live = columns["order"][columns["n_fired"][columns["order"]] > 0]
    return [int(latent) for latent in live[:count]]


def _array(table: pa.Table, name: str) -> np.ndarray:
    return table[name].combine_chunks().to_numpy(zero_copy_only=False)
