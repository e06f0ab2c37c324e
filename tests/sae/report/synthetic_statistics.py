"""Statistics as their stage writes them, made up: latents.parquet, examples.parquet, rows.parquet, passages.parquet.

Arrays, no loops over latents: 65,536 latents take seconds. Batches of latents bound the memory.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from synthetic_text import HOSTILE_TEXT, SYNTAX, Text

from sae.subject.text import printable

N_ROWS = 200_000
EDGES = 2.0 ** (np.arange(129) / 4 - 16)
POSITION_EDGES = np.array([0, 1, 2, 4, 8, 16, 32, 64, 128])
N_TOP, N_PER_GROUP, WINDOW, LEFT = 20, 5, 32, 20
DEAD, DENSE, FEW, TWIN = 3, 5, 7, 11
"""Latents that never fire, fire on a fifth of all rows, fire three times, and have a near copy in the next one."""
_BATCH = 4096
_KINDS = ("token", "previous token", "syntax", "position", None)
_REFERENCE = np.sort(np.random.default_rng(7).gamma(2.0, size=4000))
"""Sorted activations of a latent of scale 1; every latent has this distribution, scaled."""


@dataclass(frozen=True)
class Latents:
    """What is drawn first about all latents; the tables follow from it. All [d_sae]."""

    n_fired: np.ndarray
    scale: np.ndarray
    kind: np.ndarray
    """Index into _KINDS."""
    token: np.ndarray
    """The token it likes best."""
    n_on_token: np.ndarray
    """Firings on that token."""


def write_tables(folder: Path, d_sae: int, text: Text, *, has_text: bool, seed: int) -> None:
    """Write all files of a statistics artefact."""
    latents = _draw(np.random.default_rng([seed, 0]), d_sae, text, has_text)
    tables = (
        _latents_table(np.random.default_rng([seed, 1, b[0]]), latents, b, text, has_text) for b in _batches(d_sae)
    )
    _write(folder / "latents.parquet", tables)
    examples = (
        _examples_table(np.random.default_rng([seed, 2, b[0]]), latents, b, text, has_text) for b in _batches(d_sae)
    )
    _write(folder / "examples.parquet", examples)
    live = np.flatnonzero(latents.n_fired)
    n_rows = 500
    rng = np.random.default_rng([seed, 3])
    fires, values = _fires(rng, live, n_rows, 8)
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
                "latents": _ragged(fires, fires >= 0, pa.int32()),
                "values": _ragged(values, fires >= 0, pa.float32()),
            }
        ),
        folder / "rows.parquet",
    )
    if has_text:
        pq.write_table(_passages_table(rng, live, text), folder / "passages.parquet")
    (folder / "statistics.json").write_text(json.dumps(_summary(d_sae, text, has_text, n_rows)))


def _batches(d_sae: int) -> Iterator[np.ndarray]:
    return (np.arange(start, min(start + _BATCH, d_sae)) for start in range(0, d_sae, _BATCH))


def _write(path: Path, tables: Iterator[pa.Table]) -> None:
    first = next(tables)
    with pq.ParquetWriter(path, first.schema, compression="zstd") as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)


def _draw(rng: np.random.Generator, d_sae: int, text: Text, has_text: bool) -> Latents:
    n_fired = np.maximum(5, (N_ROWS * 10 ** np.minimum(-1.1, rng.normal(-2.4, 0.6, d_sae))).astype(np.int64))
    n_fired[rng.random(d_sae) < 0.02] = 0
    for latent, n in ((DEAD, 0), (DENSE, N_ROWS // 5), (FEW, 3), (TWIN, 900), (TWIN + 1, 800)):
        if latent < d_sae:
            n_fired[latent] = n
    kind = rng.choice(len(_KINDS), d_sae, p=[0.55, 0.15, 0.1, 0.05, 0.15]) if has_text else np.full(d_sae, 4)
    token = text.ids[rng.integers(0, len(text.ids), d_sae)]
    precise = np.where(kind == 0, rng.uniform(0.5, 1, d_sae), rng.uniform(0.02, 0.4, d_sae))
    n_on_token = np.minimum(np.ceil(precise * n_fired), np.floor(0.95 * N_ROWS * text.share[token])).astype(np.int64)
    return Latents(n_fired, 10 ** rng.normal(0.3, 0.25, d_sae), kind, token, n_on_token)


def _latents_table(
    rng: np.random.Generator, latents: Latents, batch: np.ndarray, text: Text, has_text: bool
) -> pa.Table:
    n, d_sae = len(batch), len(latents.n_fired)
    n_fired, scale = latents.n_fired[batch], latents.scale[batch]
    fired, frequency = n_fired > 0, n_fired / N_ROWS
    below = np.searchsorted(_REFERENCE, EDGES[None, :] / scale[:, None]) / len(_REFERENCE)
    histogram = np.diff(np.round(n_fired[:, None] * below), axis=1).astype(np.int64)
    quartiles = np.quantile(_REFERENCE, (0.25, 0.5, 0.75))[None] * np.where(n_fired >= 5, scale, np.nan)[:, None]
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
        "mean_act": pa.array(np.where(fired, _REFERENCE.mean() * scale, np.nan), pa.float32()),
        "max_act": pa.array(np.where(fired, _quantile(n_fired, 0) * scale, np.nan), pa.float32()),
        **{f"q{25 * (i + 1)}": pa.array(quartiles[:, i], pa.float32()) for i in range(3)},
        "histogram": _ragged(histogram, np.ones_like(histogram, bool), pa.int64()),
        "dead": pa.array(~fired),
        "dense": pa.array(frequency > 0.1),
        "duplicate_of": pa.array(duplicate, pa.int32(), mask=duplicate < 0),
        "neighbours": _ragged(others, distinct, pa.int32()),
        "neighbour_cosines": _ragged(cosines, distinct, pa.float32()),
    }
    wanted = np.ones((n, 10), bool) & has_text
    for side, sign in (("up", 1), ("down", -1)):
        ids = rng.random((n, len(text.vocabulary))).argsort(axis=1)[:, :10]
        values = sign * np.sort(rng.gamma(2, 0.5, (n, 10)), axis=1)[:, ::-1]
        columns |= _token_lists(f"logits_{side}", f"logits_{side}_bytes", ids, wanted, text)
        columns[f"logits_{side}_values"] = _ragged(values, wanted, pa.float32())
    columns |= _association(rng, latents, batch, text, has_text)
    co = (batch[:, None] + 1 + rng.integers(0, max(1, d_sae - 1), (n, 4))) % d_sae
    share = np.sort(rng.random((n, 4)), axis=1)[:, ::-1]
    together = fired[:, None] & (latents.n_fired[co] > 0) & (co != batch[:, None]) & (share * n_fired[:, None] >= 5)
    columns |= {
        "coactive": _ragged(co, together, pa.int32()),
        "coactive_lift": _ragged(share / np.maximum(latents.n_fired[co] / N_ROWS, 1e-9), together, pa.float32()),
        "coactive_share": _ragged(share, together, pa.float32()),
        "coactive_count": _ragged((share * n_fired[:, None] / 4).astype(np.int64), together, pa.int32()),
        "neurons": _ragged(rng.random((n, 64)).argsort(axis=1)[:, :5], np.ones((n, 5), bool), pa.int32()),
        "neuron_weights": _ragged(
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
            columns |= _token_lists(names[0], names[1], ids, some, text)
        else:
            columns["syntax"] = _ragged(np.array(SYNTAX)[ids], some, pa.string())
        columns[f"{what}_counts"] = _ragged(counts, some, pa.int64())
        for name, values in (("precision", precision), ("recall", recall), ("lift", lift)):
            columns[f"{what}_{name}"] = _ragged(values, some, pa.float32())
        best[code] = (ids[:, 0], precision[:, 0], recall[:, 0])
    widths = np.diff(POSITION_EDGES) / POSITION_EDGES[-1]
    uneven = widths * rng.uniform(0.6, 1.4, (n, len(widths)))
    at = np.floor(n_fired[:, None] * uneven / uneven.sum(axis=1, keepdims=True)).astype(np.int64)
    at[:, -1] += n_fired - at.sum(axis=1)
    columns["positions"] = _ragged(at, np.full(at.shape, has_text), pa.int64())
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
            [_KINDS[code] if is_ruled else None for code, is_ruled in zip(kind, ruled, strict=True)], pa.string()
        ),
        "rule_name": pa.array(names, pa.string()),
        "rule_bytes": pa.array(tokens, pa.binary()),
        **{
            f"rule_{name}": pa.array(figures[:, i], pa.float32(), mask=~ruled)
            for i, name in enumerate(("precision", "recall", "lift"))
        },
    }


def _examples_table(
    rng: np.random.Generator, latents: Latents, batch: np.ndarray, text: Text, has_text: bool
) -> pa.Table:
    """The contexts of a batch of latents: on the favourite token's places, or anywhere."""
    n_fired = latents.n_fired[batch]
    sizes = {"top": np.minimum(n_fired, N_TOP)}
    sizes |= {f"q{i}": np.where(n_fired >= 5, np.minimum(n_fired // 4, N_PER_GROUP), 0) for i in (3, 2, 1, 0)}
    sizes["random"] = np.minimum(n_fired, N_PER_GROUP)
    sizes["miss"] = np.where((n_fired >= 5) & has_text, N_PER_GROUP, 0)
    parts = []
    for code, (group, size) in enumerate(sizes.items()):
        latent = np.repeat(batch, size)
        rank = np.arange(len(latent)) - np.repeat(np.cumsum(size) - size, size)
        drawn = rng.random(len(latent))
        if group == "top":
            value = _quantile(latents.n_fired[latent], rank)
        elif group == "miss":
            value = np.zeros(len(latent))
        else:
            low, width = (0.0, 1.0) if group == "random" else (int(group[1]) / 4, 0.25)
            place = (rank + 1) / (np.repeat(size, size) + 1) if group != "random" else 1 - drawn
            value = _REFERENCE[((low + width * (1 - place)) * (len(_REFERENCE) - 1)).astype(np.int64)]
        parts.append((latent, np.full(len(latent), code), rank, value * latents.scale[latent]))
    latent, group, rank, value = (np.concatenate(column) for column in zip(*parts, strict=True))
    value = np.minimum(value, _quantile(latents.n_fired[latent], 0) * latents.scale[latent])
    order = np.lexsort((rank, group, latent))
    latent, group, rank, value = (column[order] for column in (latent, group, rank, value.astype(np.float32)))
    names = np.array(list(sizes))
    place = rng.integers(0, len(text.ids), len(latent))
    precise = latents.n_on_token[latent] / np.maximum(latents.n_fired[latent], 1)
    liked = (group == 0) | (names[group] == "miss") | (rng.random(len(latent)) < precise)
    place = np.where(liked, _place_of(text, latents.token[latent], rank), place)
    if has_text:
        window = place[:, None] - LEFT + np.arange(WINDOW)
        inside = (window >= 0) & (window < len(text.ids))
        tokens = text.ids[np.clip(window, 0, len(text.ids) - 1)]
        acts = np.where(rng.random(window.shape) < 0.06, value[:, None] * rng.random(window.shape), 0)
        acts[:, LEFT] = value
        peak = inside[:, :LEFT].sum(axis=1)
        token_bytes = _ragged_bytes(tokens, inside, text)
    else:
        tokens, acts, peak = np.full((len(latent), 1), -1), value[:, None], np.zeros(len(latent))
        inside = np.ones((len(latent), 1), bool)
        token_bytes = pa.array([[b"cat"]] * len(latent), pa.list_(pa.binary()))
    doc = rng.integers(0, 40, len(latent))
    documents = pa.array([HOSTILE_TEXT, *(f"lib/module_{i:02d}.py" for i in range(1, 40))])
    return pa.table(
        {
            "latent": pa.array(latent, pa.int32()),
            "group": pa.array(names).take(pa.array(group)),
            "rank": pa.array(rank, pa.int32()),
            "value": pa.array(value, pa.float32()),
            "seq": pa.array(rng.integers(0, 2000, len(latent)), pa.int32()),
            "pos": pa.array(peak, pa.int32()),
            "split": pa.array(["train", "heldout"]).take(pa.array((rng.random(len(latent)) < 0.2).astype(np.int64))),
            "doc": pa.array(doc, pa.int32()),
            "doc_name": documents.take(pa.array(doc)),
            "peak": pa.array(peak, pa.int32()),
            "token_ids": _ragged(tokens, inside, pa.int32()),
            "token_bytes": token_bytes,
            "activations": _ragged(acts, inside, pa.float32()),
        }
    )


def _passages_table(rng: np.random.Generator, live: np.ndarray, text: Text) -> pa.Table:
    """A few contexts of 40 tokens with the 8 strongest latents of every token."""
    rows = []
    for seq in range(6):
        ids = text.ids[60 * seq : 60 * seq + 40]
        fires, values = _fires(rng, live, len(ids), 8)
        rows.append(
            {
                "segment": 0,
                "seq": seq,
                "doc_name": HOSTILE_TEXT if seq == 0 else f"lib/passage_{seq}.py",
                "token_ids": ids.tolist(),
                "token_bytes": [text.vocabulary[i] for i in ids],
                "latents": fires.reshape(-1).tolist(),
                "values": values.reshape(-1).tolist(),
            }
        )
    schema = {"segment": pa.int32(), "seq": pa.int32(), "doc_name": pa.string()}
    schema |= {"token_ids": pa.list_(pa.int32()), "token_bytes": pa.list_(pa.binary())}
    schema |= {"latents": pa.list_(pa.int32()), "values": pa.list_(pa.float32())}
    return pa.Table.from_pylist(rows, schema=pa.schema(schema))


def _fires(rng: np.random.Generator, live: np.ndarray, n_rows: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Latents and values of some rows, strongest first; -1 and 0 where fewer fire. [n_rows, n]"""
    latents = np.sort(live[rng.integers(0, len(live), (n_rows, n))], axis=1)
    latents[:, 1:][latents[:, 1:] == latents[:, :-1]] = -1
    values = np.where(latents >= 0, rng.gamma(2.0, size=(n_rows, n)), 0)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(latents, order, 1), np.take_along_axis(values, order, 1)


def _quantile(n_fired: np.ndarray, rank: np.ndarray | int) -> np.ndarray:
    """The activation of the firing of this rank, 0 being the strongest, for scale 1."""
    place = (np.maximum(n_fired - rank, 0.6) - 0.5) / np.maximum(n_fired, 1)
    return _REFERENCE[np.clip((place * len(_REFERENCE)).astype(np.int64), 0, len(_REFERENCE) - 1)]


def _place_of(text: Text, token: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """Where in the text a token stands, a different place for every rank as far as there are any."""
    by_token = np.argsort(text.ids, kind="stable")
    first = np.searchsorted(text.ids[by_token], np.arange(len(text.vocabulary) + 1))
    return by_token[first[token] + rank % np.diff(first)[token]]


def _ragged(values: np.ndarray, inside: np.ndarray, item: pa.DataType) -> pa.ListArray:
    """Rows of a matrix as lists of what is inside."""
    offsets = np.concatenate([[0], np.cumsum(inside.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(values[inside], item))


def _ragged_bytes(ids: np.ndarray, inside: np.ndarray, text: Text) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(inside.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(text.vocabulary, pa.binary()).take(pa.array(ids[inside])))


def _token_lists(
    ids_name: str, bytes_name: str, ids: np.ndarray, inside: np.ndarray, text: Text
) -> dict[str, pa.Array]:
    return {ids_name: _ragged(ids, inside, pa.int32()), bytes_name: _ragged_bytes(ids, inside, text)}


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
