"""Accumulated sums and chosen examples as the tables that people and the report read."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from sae.statistics.accumulate import LatentSums
from sae.statistics.choose import GROUPS, Examples
from sae.statistics.cooccurrence import Association
from sae.statistics.decoder import Ranked
from sae.statistics.firings import SPLITS, split_context_key
from sae.statistics.row_sample import Coactivation, SampledRows
from sae.statistics.rules import Rules, best_rules
from sae.statistics.windows import Windows
from sae.subject.text import printable

TokenNames = Callable[[np.ndarray], list[bytes]]
"""Token ids [n] -> the bytes of each token."""

ROWS_PER_ROW_GROUP = 16_384


class DecoderFacts(NamedTuple):
    """What the decoder alone says about latents."""

    neighbours: Ranked
    neurons: Ranked
    logits: tuple[Ranked, Ranked] | None
    """Tokens raised and lowered; None gives empty lists."""


class Names(NamedTuple):
    """How what stands at a row is called."""

    tokens: TokenNames | None
    labels: Sequence[str]
    positions: np.ndarray
    """Edges of the bins."""

    def of(self, kind: str, codes: np.ndarray) -> list[bytes]:
        """The names of codes of an association."""
        if kind in ("token", "previous token"):
            return self.tokens(codes) if self.tokens else [str(code).encode() for code in codes.tolist()]
        if kind == "syntax":
            return [self.labels[code].encode() for code in codes.tolist()]
        ends = self.positions[codes + 1] - 1
        return [
            (f"{first}" if first == last else f"{first}-{last}").encode()
            for first, last in zip(self.positions[codes].tolist(), ends.tolist(), strict=True)
        ]


def latents_table(
    sums: LatentSums,
    edges: np.ndarray,
    decoder: DecoderFacts,
    associations: dict[str, Association],
    together: Coactivation,
    names: Names,
    *,
    dense_above: float,
    duplicate_above: float,
) -> pa.Table:
    """One row per latent, in order of id.

    Args:
        edges: 25, 50 and 75 % quantiles of the activations. [d_sae, 3]
        associations: "token", "previous token", "syntax" and "position" -> the pairs to list.
        dense_above: firing frequency above which a latent is flagged dense.
        duplicate_above: decoder cosine above which a latent is flagged as a duplicate of its nearest neighbour.
    """
    return pa.table(
        _firing_columns(sums, edges, dense_above)
        | _decoder_columns(decoder, duplicate_above, names.tokens)
        | _association_columns(associations, sums.d_sae, names)
        | {
            "positions": _lists(
                pa.array(sums.on["position"].counts.reshape(-1)), sums.on["position"].n_codes, sums.d_sae
            )
        }
        | _rule_columns(best_rules(list(associations.values()), sums.d_sae), list(associations), names)
        | _coactivation_columns(together, sums.d_sae)
    )


def _firing_columns(sums: LatentSums, edges: np.ndarray, dense_above: float) -> dict[str, pa.Array]:
    n_fired = sums.n_fired.sum(axis=0)
    n_rows = int(sums.n_rows.sum())
    fired = n_fired > 0
    mean, deviation = np.full(sums.d_sae, np.nan, np.float32), np.full(sums.d_sae, np.nan, np.float32)
    mean[fired] = sums.sum[fired] / n_fired[fired]
    deviation[fired] = np.sqrt(
        np.maximum(sums.sum_sq[fired] / n_fired[fired] - (sums.sum[fired] / n_fired[fired]) ** 2, 0)
    )
    frequency = n_fired / max(n_rows, 1)
    return {
        "latent": pa.array(np.arange(sums.d_sae), pa.int32()),
        "n_fired": pa.array(n_fired, pa.int64()),
        "frequency": pa.array(frequency, pa.float64()),
        **{f"n_fired_{split}": pa.array(sums.n_fired[code], pa.int64()) for code, split in enumerate(SPLITS)},
        "mean_act": pa.array(mean),
        "std_act": pa.array(deviation),
        "max_act": pa.array(np.where(fired, sums.max, np.float32(np.nan))),
        **{name: pa.array(edges[:, column]) for column, name in enumerate(("q25", "q50", "q75"))},
        "histogram": _lists(pa.array(sums.histogram.reshape(-1), pa.int64()), sums.histogram.shape[1]),
        "dead": pa.array(~fired),
        "dense": pa.array(frequency > dense_above),
    }


def _decoder_columns(
    decoder: DecoderFacts, duplicate_above: float, token_names: TokenNames | None
) -> dict[str, pa.Array]:
    neighbours = decoder.neighbours
    nearest, cosine = neighbours.indices[:, :1].numpy().reshape(-1), neighbours.value[:, :1].numpy().reshape(-1)
    d_sae = len(neighbours.indices)
    same = cosine > duplicate_above if len(cosine) else np.zeros(d_sae, bool)
    columns = {
        "neighbours": _ranked(neighbours.indices, pa.int32()),
        "neighbour_cosines": _ranked(neighbours.value, pa.float32()),
        "duplicate_of": pa.array(nearest if len(nearest) else np.zeros(d_sae, np.int64), pa.int32(), mask=~same),
        "neurons": _ranked(decoder.neurons.indices, pa.int32()),
        "neuron_weights": _ranked(decoder.neurons.value, pa.float32()),
    }
    for direction, ranked in zip(("up", "down"), decoder.logits or (None, None), strict=True):
        name = f"logits_{direction}"
        if ranked is None:
            empty = {"": pa.int32(), "_values": pa.float32(), "_bytes": pa.binary()}
            columns |= {name + end: pa.array([[]] * d_sae, pa.list_(item)) for end, item in empty.items()}
            continue
        columns[name] = _ranked(ranked.indices, pa.int32())
        columns[name + "_values"] = _ranked(ranked.value, pa.float32())
        columns[name + "_bytes"] = _lists(bytes_of(ranked.indices.numpy(), token_names), ranked.indices.shape[1])
    return columns


_PREFIXES = {
    "token": ("tokens", "token"),
    "previous token": ("previous_tokens", "previous"),
    "syntax": ("syntax", "syntax"),
}
"""Association -> name of the column of codes and prefix of the others."""


def _association_columns(associations: dict[str, Association], d_sae: int, names: Names) -> dict[str, pa.Array]:
    columns: dict[str, pa.Array] = {}
    for kind, (codes, prefix) in _PREFIXES.items():
        pairs, precision, recall, lift = associations[kind]
        offsets = _offsets(pairs.latent, d_sae)
        called = _named(pairs.code, functools.partial(names.of, kind))
        if kind == "syntax":
            columns[codes] = pa.ListArray.from_arrays(offsets, called.cast(pa.string()))
        else:
            columns[codes] = pa.ListArray.from_arrays(offsets, pa.array(pairs.code, pa.int32()))
            columns[f"{prefix}_bytes"] = pa.ListArray.from_arrays(offsets, called)
        columns[f"{prefix}_counts"] = pa.ListArray.from_arrays(offsets, pa.array(pairs.n_firings))
        for name, values in (("precision", precision), ("recall", recall), ("lift", lift)):
            columns[f"{prefix}_{name}"] = pa.ListArray.from_arrays(offsets, pa.array(values, pa.float32()))
    return columns


def _rule_columns(rules: Rules, kinds: list[str], names: Names) -> dict[str, pa.Array]:
    called = np.full(len(rules.kind), None, object)
    for index, kind in enumerate(kinds):
        mine = np.flatnonzero(rules.kind == index)
        called[mine] = names.of(kind, rules.code[mine])
    none = rules.kind < 0
    return {
        "rule_kind": pa.array(np.array([*kinds, None], object)[rules.kind], pa.string(), mask=none),
        "rule_name": pa.array([None if name is None else printable(name) for name in called], pa.string()),
        "rule_bytes": pa.array(called, pa.binary()),
        "rule_precision": pa.array(rules.precision, pa.float32(), mask=none),
        "rule_recall": pa.array(rules.recall, pa.float32(), mask=none),
        "rule_lift": pa.array(rules.lift, pa.float32(), mask=none),
    }


def _coactivation_columns(together: Coactivation, d_sae: int) -> dict[str, pa.Array]:
    offsets = _offsets(together.latent, d_sae)
    columns = {
        "coactive": pa.array(together.other, pa.int32()),
        "coactive_lift": pa.array(together.lift, pa.float32()),
        "coactive_share": pa.array(together.share, pa.float32()),
        "coactive_count": pa.array(together.n_rows, pa.int32()),
    }
    return {name: pa.ListArray.from_arrays(offsets, values) for name, values in columns.items()}


def examples_table(
    examples: Examples,
    windows: Windows,
    document_names: Sequence[Sequence[str]],
    row_names: Callable[[np.ndarray], list[bytes]] | None,
    token_names: TokenNames | None,
) -> pa.Table:
    """One row per example, sorted by latent, group (in the order of GROUPS) and rank.

    Args:
        document_names: per segment, by document index; empty for given activations.
        row_names: for given activations: row numbers -> what stands in the place of the token.
    """
    segment, split, seq = split_context_key(examples.firings.context)
    doc = examples.firings.doc & 0xFFFFFFFF
    inside = windows.inside
    token_ids = windows.tokens[inside]
    if row_names is not None:
        token_bytes = pa.array(row_names(seq), pa.binary())
        doc_names = token_bytes.cast(pa.string())
    else:
        token_bytes = bytes_of(token_ids, token_names)
        doc_names = document_names_of(document_names, segment, doc)
    offsets = np.concatenate([[0], np.cumsum(inside.sum(axis=1))]).astype(np.int32)
    return pa.table(
        {
            "latent": pa.array(examples.firings.latent),
            "group": pa.array(np.array(GROUPS)).take(pa.array(examples.group)),
            "rank": pa.array(examples.rank),
            "value": pa.array(examples.firings.value),
            "seq": pa.array(seq, pa.int32()),
            "pos": pa.array(examples.firings.pos),
            "split": pa.array(np.array(SPLITS)).take(pa.array(split)),
            "doc": pa.array(doc, pa.int32()),
            "doc_name": doc_names,
            "peak": pa.array(windows.peak),
            "token_ids": pa.ListArray.from_arrays(offsets, pa.array(token_ids, pa.int32())),
            "token_bytes": pa.ListArray.from_arrays(offsets, token_bytes),
            "activations": pa.ListArray.from_arrays(offsets, pa.array(windows.activations[inside])),
            "segment": pa.array(segment, pa.int32()),
        }
    )


def rows_table(sampled: SampledRows) -> pa.Table:
    """One row per sampled row, in order of segment, split, context and position, with the latents that fire on it."""
    segment, split, seq = split_context_key(sampled.rows.context)
    return pa.table(
        {
            "segment": pa.array(segment, pa.int32()),
            "split": pa.array(np.array(SPLITS)).take(pa.array(split)),
            "seq": pa.array(seq, pa.int32()),
            "pos": pa.array(sampled.rows.pos),
            "token": pa.array(sampled.rows.token),
            "doc": pa.array(sampled.rows.doc & 0xFFFFFFFF, pa.int32()),
            "latents": pa.ListArray.from_arrays(sampled.offsets.astype(np.int32), pa.array(sampled.latent)),
            "values": pa.ListArray.from_arrays(sampled.offsets.astype(np.int32), pa.array(sampled.value)),
        }
    )


def write_table(table: pa.Table, path: Path) -> None:
    """Write a table; equal tables give equal bytes."""
    pq.write_table(table, path, compression="zstd", row_group_size=ROWS_PER_ROW_GROUP)


def document_names_of(document_names: Sequence[Sequence[str]], segment: np.ndarray, doc: np.ndarray) -> pa.Array:
    """The name of each document, given by segment and index. [n] string"""
    pairs, inverse = np.unique(np.stack([segment, doc]), axis=1, return_inverse=True)
    names = pa.array([document_names[s][d] for s, d in pairs.T], pa.string())
    return names.take(pa.array(inverse.reshape(-1)))


def bytes_of(ids: np.ndarray, token_names: TokenNames | None) -> pa.Array:
    """The bytes of every token, each distinct token looked up once. [ids.size] binary"""
    return _named(ids, token_names or (lambda distinct: [b""] * len(distinct)))


def _named(codes: np.ndarray, names: TokenNames) -> pa.Array:
    distinct, inverse = np.unique(codes, return_inverse=True)
    return pa.array(names(distinct), pa.binary()).take(pa.array(inverse.reshape(-1)))


def _offsets(latent: np.ndarray, d_sae: int) -> np.ndarray:
    """Where the entries of every latent begin in arrays sorted by latent. [d_sae + 1] int32"""
    return np.concatenate([[0], np.cumsum(np.bincount(latent, minlength=d_sae))]).astype(np.int32)


def _ranked(values: Tensor, item: pa.DataType) -> pa.ListArray:
    return _lists(pa.array(values.numpy().reshape(-1), item), values.shape[1], n_rows=len(values))


def _lists(flat: pa.Array, width: int, n_rows: int | None = None) -> pa.ListArray:
    """Rows of equal length as lists. `n_rows` is needed where `width` may be 0."""
    n_rows = len(flat) // width if n_rows is None else n_rows
    return pa.ListArray.from_arrays(np.arange(n_rows + 1, dtype=np.int32) * width, flat)
