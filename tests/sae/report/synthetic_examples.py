"""Contexts of made-up latents: examples.parquet and passages.parquet."""

import numpy as np
import pyarrow as pa
from synthetic_latents import (
    LEFT,
    N_PER_GROUP,
    N_TOP,
    REFERENCE,
    WINDOW,
    Latents,
    draw_fires,
    quantile,
    ragged,
    ragged_bytes,
)
from synthetic_text import HOSTILE_TEXT, Text


def examples_table(
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
            value = quantile(latents.n_fired[latent], rank)
        elif group == "miss":
            value = np.zeros(len(latent))
        else:
            low, width = (0.0, 1.0) if group == "random" else (int(group[1]) / 4, 0.25)
            place = (rank + 1) / (np.repeat(size, size) + 1) if group != "random" else 1 - drawn
            value = REFERENCE[((low + width * (1 - place)) * (len(REFERENCE) - 1)).astype(np.int64)]
        parts.append((latent, np.full(len(latent), code), rank, value * latents.scale[latent]))
    latent, group, rank, value = (np.concatenate(column) for column in zip(*parts, strict=True))
    value = np.minimum(value, quantile(latents.n_fired[latent], 0) * latents.scale[latent])
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
        token_bytes = ragged_bytes(tokens, inside, text)
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
            "token_ids": ragged(tokens, inside, pa.int32()),
            "token_bytes": token_bytes,
            "activations": ragged(acts, inside, pa.float32()),
        }
    )


def passages_table(rng: np.random.Generator, live: np.ndarray, text: Text) -> pa.Table:
    """A few contexts of 40 tokens with the 8 strongest latents of every token."""
    rows = []
    for seq in range(6):
        ids = text.ids[60 * seq : 60 * seq + 40]
        fires, values = draw_fires(rng, live, len(ids), 8)
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


def _place_of(text: Text, token: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """Where in the text a token stands, a different place for every rank as far as there are any."""
    by_token = np.argsort(text.ids, kind="stable")
    first = np.searchsorted(text.ids[by_token], np.arange(len(text.vocabulary) + 1))
    return by_token[first[token] + rank % np.diff(first)[token]]
