"""Statistics as their stage writes them, made up: latents.parquet, examples.parquet, rows.parquet, passages.parquet.

Arrays, no loops over latents: 65,536 latents take seconds. Batches of latents bound the memory.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from synthetic_examples import examples_table, passages_table
from synthetic_latents import (
    EDGES,
    KINDS,
    N_ROWS,
    POSITION_EDGES,
    REFERENCE,
    TWIN,
    Latents,
    draw_fires,
    draw_latents,
    quantile,
    ragged,
    token_lists,
)
from synthetic_text import SYNTAX, Text

from sae.subject.text import printable

_BATCH = 4096


def write_tables(folder: Path, d_sae: int, text: Text, *, has_text: bool, seed: int) -> None:
    """Write all files of a statistics artefact."""
    latents = draw_latents(np.random.default_rng([seed, 0]), d_sae, text, has_text)
    tables = (
        latents_table(np.random.default_rng([seed, 1, b[0]]), latents, b, text, has_text) for b in _batches(d_sae)
    )
    _write(folder / "latents.parquet", tables)
    examples = (
        examples_table(np.random.default_rng([seed, 2, b[0]]), latents, b, text, has_text) for b in _batches(d_sae)
    )
    _write(folder / "examples.parquet", examples)
    live = np.flatnonzero(latents.n_fired)
    n_rows = 500
    rng = np.random.default_rng([seed, 3])
    fires, values = draw_fires(rng, live, n_rows, 8)
    places = np.random.default_rng(0)  # the same rows for every SAE
    pq.write_table(
        pa.table(
            {
                "segment": pa.array(np.zeros(n_rows), pa.int32()),
                "split": pa.array(np.where(places.random(n_rows) < 0.15, "heldout", "train")),
                "seq": pa.array(np.arange(n_rows), pa.int32()),
                "pos": pa.array(places.integers(0, 128, n_rows), pa.int32()),
                "token": pa.array(text.ids[places.integers(0, len(text.ids), n_rows)], pa.int32()),
                "doc": pa.array(places.integers(0, 40, n_rows), pa.int32()),
                "latents": ragged(fires, fires >= 0, pa.int32()),
                "values": ragged(values, fires >= 0, pa.float32()),
            }
        ),
        folder / "rows.parquet",
    )
    if has_text:
        pq.write_table(passages_table(rng, live, text), folder / "passages.parquet")
    (folder / "statistics.json").write_text(json.dumps(_summary(d_sae, text, has_text, n_rows)))


def _batches(d_sae: int) -> Iterator[np.ndarray]:
    return (np.arange(start, min(start + _BATCH, d_sae)) for start in range(0, d_sae, _BATCH))


def _write(path: Path, tables: Iterator[pa.Table]) -> None:
    first = next(tables)
    with pq.ParquetWriter(path, first.schema, compression="zstd") as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)


def latents_table(
    rng: np.random.Generator, latents: Latents, batch: np.ndarray, text: Text, has_text: bool
) -> pa.Table:
    n, d_sae = len(batch), len(latents.n_fired)
    n_fired, scale = latents.n_fired[batch], latents.scale[batch]
    fired, frequency = n_fired > 0, n_fired / N_ROWS
    below = np.searchsorted(REFERENCE, EDGES[None, :] / scale[:, None]) / len(REFERENCE)
    histogram = np.diff(np.round(n_fired[:, None] * below), axis=1).astype(np.int64)
    quartiles = np.quantile(REFERENCE, (0.25, 0.5, 0.75))[None] * np.where(n_fired >= 5, scale, np.nan)[:, None]
    others = (batch[:, None] + 1 + rng.integers(0, max(1, d_sae - 1), (n, 10))) % d_sae
    cosines = np.sort(rng.random((n, 10)) * 0.85, axis=1)[:, ::-1].copy()
    duplicate = np.full(n, -1)
    for a, b in ((TWIN, TWIN + 1), (TWIN + 1, TWIN)):
        if a in batch and b < d_sae:
            row = a - batch[0]
            others[row, 0], cosines[row, 0], duplicate[row] = b, 0.97, b
    # A latent drawn twice stays once.
    distinct = np.array([np.isin(np.arange(10), np.unique(row, return_index=True)[1]) for row in others])
    distinct &= others != batch[:, None]
    columns = {
        "latent": pa.array(batch, pa.int32()),
        "n_fired": pa.array(n_fired),
        "frequency": pa.array(frequency),
        "n_fired_train": pa.array(n_fired - n_fired // 6),
        "n_fired_heldout": pa.array(n_fired // 6),
        "mean_act": pa.array(np.where(fired, REFERENCE.mean() * scale, np.nan), pa.float32()),
        "max_act": pa.array(np.where(fired, quantile(n_fired, 0) * scale, np.nan), pa.float32()),
        **{f"q{25 * (i + 1)}": pa.array(quartiles[:, i], pa.float32()) for i in range(3)},
        "histogram": ragged(histogram, np.ones_like(histogram, bool), pa.int64()),
        "dead": pa.array(~fired),
        "dense": pa.array(frequency > 0.1),
        "duplicate_of": pa.array(duplicate, pa.int32(), mask=duplicate < 0),
        "neighbours": ragged(others, distinct, pa.int32()),
        "neighbour_cosines": ragged(cosines, distinct, pa.float32()),
    }
    wanted = np.ones((n, 10), bool) & has_text
    for side, sign in (("up", 1), ("down", -1)):
        ids = rng.random((n, len(text.vocabulary))).argsort(axis=1)[:, :10]
        values = sign * np.sort(rng.gamma(2, 0.5, (n, 10)), axis=1)[:, ::-1]
        columns |= token_lists(f"logits_{side}", f"logits_{side}_bytes", ids, wanted, text)
        columns[f"logits_{side}_values"] = ragged(values, wanted, pa.float32())
    columns |= _association(rng, latents, batch, text, has_text)
    co = (batch[:, None] + 1 + rng.integers(0, max(1, d_sae - 1), (n, 4))) % d_sae
    share = np.sort(rng.random((n, 4)), axis=1)[:, ::-1]
    together = fired[:, None] & (latents.n_fired[co] > 0) & (co != batch[:, None]) & (share * n_fired[:, None] >= 5)
    columns |= {
        "coactive": ragged(co, together, pa.int32()),
        "coactive_lift": ragged(share / np.maximum(latents.n_fired[co] / N_ROWS, 1e-9), together, pa.float32()),
        "coactive_share": ragged(share, together, pa.float32()),
        "coactive_count": ragged((share * n_fired[:, None] / 4).astype(np.int64), together, pa.int32()),
        "neurons": ragged(rng.random((n, 64)).argsort(axis=1)[:, :5], np.ones((n, 5), bool), pa.int32()),
        "neuron_weights": ragged(
            np.sort(rng.random((n, 5)))[:, ::-1] * rng.choice([-1, 1], (n, 5)), np.ones((n, 5), bool), pa.float32()
        ),
    }
    return pa.table(columns)


def _association(
    rng: np.random.Generator, latents: Latents, batch: np.ndarray, text: Text, has_text: bool
) -> dict[str, pa.Array]:
    """Tokens, previous tokens, syntax and positions that go with the firings, and the rule."""
    n, n_fired = len(batch), latents.n_fired[batch]
    kind, target, on_target = latents.kind[batch], latents.token[batch], latents.n_on_token[batch]
    columns: dict[str, pa.Array] = {}
    best: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    for code, what, names, share in (
        (0, "token", ("tokens", "token_bytes"), text.share),
        (1, "previous", ("previous_tokens", "previous_bytes"), text.share),
        (2, "syntax", ("syntax", ""), np.array([0.3, 0.25, 0.15, 0.15, 0.05, 0.07, 0.03])),
    ):
        order = rng.random((n, len(share))).argsort(axis=1)
        first = target if code < 2 else rng.integers(0, len(share), n)
        order = np.concatenate([first[:, None], order], axis=1)
        counted = on_target if code == 0 else np.floor(n_fired * np.where(kind == code, 0.9, 0.1)).astype(np.int64)
        counted = np.minimum(counted, np.floor(0.95 * N_ROWS * share[first])).astype(np.int64)
        ids = order[:, :5].copy()
        counts = np.zeros((n, 5), np.int64)
        counts[:, 0] = counted
        rest = n_fired - counted
        for i, part in enumerate((0.4, 0.2, 0.1, 0.05)):
            room = np.floor(0.5 * N_ROWS * share[ids[:, i + 1]]).astype(np.int64)
            counts[:, i + 1] = np.minimum(np.floor(rest * part).astype(np.int64), room)
        counts[:, 1:][ids[:, 1:] == ids[:, :1]] = 0
        by_count = np.argsort(-counts, axis=1, kind="stable")
        ids, counts = np.take_along_axis(ids, by_count, 1), np.take_along_axis(counts, by_count, 1)
        some = (counts > 0) & has_text
        precision = counts / np.maximum(n_fired, 1)[:, None]
        recall = counts / np.maximum(N_ROWS * share[ids], 1)
        lift = precision / np.maximum(share[ids], 1e-9)
        if code < 2:
            columns |= token_lists(names[0], names[1], ids, some, text)
        else:
            columns["syntax"] = ragged(np.array(SYNTAX)[ids], some, pa.string())
        columns[f"{what}_counts"] = ragged(counts, some, pa.int64())
        for name, values in (("precision", precision), ("recall", recall), ("lift", lift)):
            columns[f"{what}_{name}"] = ragged(values, some, pa.float32())
        best[code] = (ids[:, 0], precision[:, 0], recall[:, 0])
    widths = np.diff(POSITION_EDGES) / POSITION_EDGES[-1]
    uneven = widths * rng.uniform(0.6, 1.4, (n, len(widths)))
    at = np.floor(n_fired[:, None] * uneven / uneven.sum(axis=1, keepdims=True)).astype(np.int64)
    at[:, -1] += n_fired - at.sum(axis=1)
    columns["positions"] = ragged(at, np.full(at.shape, has_text), pa.int64())
    return columns | _rules(kind, n_fired, best, text)


def _rules(
    kind: np.ndarray, n_fired: np.ndarray, best: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]], text: Text
) -> dict[str, pa.Array]:
    """The rule of each latent: what its kind names, where that is precise enough."""
    names: list[str | None] = []
    tokens: list[bytes | None] = []
    figures = np.full((len(kind), 3), np.nan)
    for row, code in enumerate(kind.tolist()):
        name, token = None, None
        if n_fired[row] >= 5 and code == 3:
            name, figures[row] = "0", (0.8, 0.9, 60.0)
        elif n_fired[row] >= 5 and code in best and best[code][1][row] >= 0.5:
            value, precision, recall = (column[row] for column in best[code])
            token = text.vocabulary[value] if code < 2 else None
            name = SYNTAX[value] if token is None else printable(token)
            figures[row] = precision, recall, precision * N_ROWS * recall / max(precision * n_fired[row], 1)
        names.append(name)
        tokens.append(token)
    ruled = np.array([name is not None for name in names])
    return {
        "rule_kind": pa.array(
            [KINDS[code] if is_ruled else None for code, is_ruled in zip(kind, ruled, strict=True)], pa.string()
        ),
        "rule_name": pa.array(names, pa.string()),
        "rule_bytes": pa.array(tokens, pa.binary()),
        **{
            f"rule_{name}": pa.array(figures[:, i], pa.float32(), mask=~ruled)
            for i, name in enumerate(("precision", "recall", "lift"))
        },
    }


def _summary(d_sae: int, text: Text, has_text: bool, n_sampled: int) -> dict[str, object]:
    widths = np.diff(POSITION_EDGES)
    return {
        "n_rows": N_ROWS,
        "n_rows_train": 170_000,
        "n_rows_heldout": 30_000,
        "d_sae": d_sae,
        "histogram_edges": EDGES.tolist(),
        "group_population": "random draws from each quarter of a sample",
        "near_miss_population": "rows of the sample with the latent's top token on which it is silent",
        "association": "exact counts over all rows",
        "position_edges": POSITION_EDGES.tolist(),
        "position_rows": (N_ROWS * widths // widths.sum()).tolist(),
        "n_sampled_rows": n_sampled,
        "n_vocab_seen": len(text.vocabulary) if has_text else 0,
        "has_syntax": has_text,
        "seed": 0,
        "vocab_size": len(text.vocabulary) if has_text else None,
        "has_text": has_text,
        "logits": "direct path: decoder row times unembedding" if has_text else None,
        "no_logits_because": None if has_text else "given activations come without a model",
    }
