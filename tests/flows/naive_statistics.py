"""The statistics of a finished run once more, in memory and without the accumulators: what they must equal."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from sae.statistics.accumulate import HISTOGRAM_EDGES
from sae.statistics.config import StatisticsSpec
from sae.statistics.quantiles import BOUND, SHARES
from sae.store.artefacts import records
from sae.store.reading.blocks import iter_rows
from sae.store.snapshots.snapshot import read_snapshot
from sae.store.storage.filesystem import Storage
from sae.store.text.rows import contexts_of_part, text_source
from sae.weights import load_sae


@torch.inference_mode()
def all_firings(storage: Storage, spec: StatisticsSpec) -> dict[str, np.ndarray]:
    """Every firing of every row of both snapshots, in memory: parallel arrays, and `n_rows`, `row_token`."""
    with records.local_files(storage, records.require_record(storage, spec.sae)) as folder:
        sae = load_sae(folder).float()
    columns: dict[str, list[np.ndarray]] = defaultdict(list)
    for split, ref in spec.snapshots.items():
        snapshot = read_snapshot(storage, ref)
        for index, part in enumerate(snapshot.parts):
            source = text_source(storage, part.ref)
            assert source is not None
            contexts = contexts_of_part(storage, part, source)
            segment = spec.tokens.index(source.tokens)
            for block in iter_rows(storage, snapshot, [index]):
                latents = sae.encode(torch.from_numpy(block.act.astype(np.float32))).numpy()
                row, latent = np.nonzero(latents)
                place = block.seq - contexts.seq[0]
                labels = contexts.labels
                columns["row"].append(row + sum(map(len, columns["row_token"])))
                columns["row_token"].append(block.token)
                columns["row_heldout"].append(np.full(len(block.seq), split == "heldout"))
                for name, values in {
                    "token": block.token,
                    "previous": np.where(block.pos > 0, contexts.tokens[place, block.pos - 1], -1),
                    "label": labels[place, block.pos] if labels is not None else np.zeros(len(place), np.uint8),
                    "seq": block.seq,
                    "pos": block.pos,
                    "doc": contexts.docs[place, block.pos].astype(np.int64) + (segment << 32),
                    "heldout": np.full(len(block.seq), split == "heldout"),
                }.items():
                    columns[name].append(values[row])
                columns["latent"].append(latent)
                columns["value"].append(latents[row, latent])
    return {name: np.concatenate(pieces) for name, pieces in columns.items()}


def differences(storage: Storage, spec: StatisticsSpec) -> list[str]:
    """What in latents.parquet and examples.parquet is not what the firings say, one line each."""
    firings = all_firings(storage, spec)
    record = records.require_record(storage, spec.ref)
    with records.local_files(storage, record) as folder:
        latents = pq.read_table(Path(folder) / "latents.parquet").to_pylist()
        examples: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
        for row in pq.read_table(Path(folder) / "examples.parquet").to_pylist():
            examples[row["latent"], row["group"]].append(row)
    order = np.argsort(firings["latent"], kind="stable")
    starts = np.searchsorted(firings["latent"][order], np.arange(len(latents) + 1))
    token_rows = np.bincount(firings["row_token"])
    found = []
    for latent, row in enumerate(latents):
        mine = order[starts[latent] : starts[latent + 1]]
        found += [f"latent {latent}: {what}" for what in _wrong(row, firings, mine, token_rows, examples, spec)]
    return found


def _wrong(
    row: dict[str, Any],
    firings: dict[str, np.ndarray],
    mine: np.ndarray,
    token_rows: np.ndarray,
    examples: dict[tuple[int, str], list[dict[str, Any]]],
    spec: StatisticsSpec,
) -> list[str]:
    value, n = firings["value"][mine], len(mine)
    n_rows = len(firings["row_token"])
    checks = {
        "n_fired": row["n_fired"] == n,
        "n_fired_heldout": row["n_fired_heldout"] == firings["heldout"][mine].sum(),
        "frequency": row["frequency"] == n / n_rows,
        "dead": row["dead"] == (n == 0),
        "dense": row["dense"] == (n / n_rows > spec.config.dense_above),
        "histogram": row["histogram"]
        == np.histogram(np.clip(value, HISTOGRAM_EDGES[0], 65535), HISTOGRAM_EDGES)[0].tolist(),
    }
    if n:
        tokens, counts = np.unique(firings["token"][mine], return_counts=True)
        best = np.lexsort((tokens, -counts))[: spec.config.n_associated]
        precision, recall = counts[best] / n, counts[best] / token_rows[tokens[best]]
        strongest: dict[int, float] = {}
        for doc, act in zip(firings["doc"][mine].tolist(), value.tolist(), strict=True):
            strongest[doc] = max(strongest.get(doc, 0.0), act)
        top = sorted(strongest.values(), reverse=True)[: spec.config.n_top]
        keys = (firings[name][mine].tolist() for name in ("doc", "seq", "pos"))
        places = dict(zip(zip(*keys, strict=True), value.tolist(), strict=True))
        shown = [each for group in ("top", "q3", "q2", "q1", "q0", "random") for each in examples[row["latent"], group]]
        misses = examples[row["latent"], "miss"]
        checks |= {
            "max_act": row["max_act"] == value.max(),
            "mean_act": np.isclose(row["mean_act"], value.mean(dtype=np.float64), rtol=1e-6),
            "tokens": row["tokens"] == tokens[best].tolist() and row["token_counts"] == counts[best].tolist(),
            "token_precision": np.allclose(row["token_precision"], precision, rtol=1e-6),
            "token_recall": np.allclose(row["token_recall"], recall, rtol=1e-6),
            "top": [each["value"] for each in examples[row["latent"], "top"]] == top,
            "places": all(places.get(_place(each)) == each["value"] for each in shown),
            "misses": all(
                _place(each) not in places and each["token_ids"][each["peak"]] == row["tokens"][0] for each in misses
            ),
        }
    if n >= 5:
        exact = np.quantile(value.astype(np.float64), SHARES, method="lower" if n > spec.config.n_samples else "linear")
        bound = BOUND if n > spec.config.n_samples else 1e-6
        quartiles = np.array([row["q25"], row["q50"], row["q75"]])
        checks["quartiles"] = bool((np.abs(quartiles / exact - 1) <= bound + 1e-6).all())
    return [name for name, right in checks.items() if not right]


def _place(example: dict[str, Any]) -> tuple[int, int, int]:
    return example["doc"] + (example["segment"] << 32), example["seq"], example["pos"]
