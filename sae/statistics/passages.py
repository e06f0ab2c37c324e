"""Contexts stored whole with the strongest latents of every token, to be read as text."""

import numpy as np
import pyarrow as pa

from sae.architectures.base import SAE
from sae.statistics.firings import StatisticsPart, context_key, iter_blocks
from sae.statistics.kept import rank_in_run
from sae.statistics.tables import TokenNames, bytes_of, document_names_of
from sae.store.storage.filesystem import Storage
from sae.store.text.contexts import PADDING

N_LATENTS = 8
"""Latents kept per token."""


def passages_table(
    storage: Storage,
    sae: SAE,
    parts: list[StatisticsPart],
    n_passages: int,
    document_names: list[list[str]],
    token_names: TokenNames | None,
) -> pa.Table:
    """The first contexts of the first parts: held-out ones where there are any, in the stored order, which is random.

    One row per context: `segment`, `split`, `seq`, `doc_name` (of its first token), `token_ids`, `token_bytes`, and
    `latents` and `values`, N_LATENTS per token, strongest first, -1 and 0 where fewer fire.
    """
    rows: list[dict[str, object]] = []
    for part in parts:
        contexts = part.contexts(storage)
        n = min(n_passages - len(rows), 0 if contexts is None else len(contexts))
        if contexts is None or n <= 0:
            continue
        n_tokens = contexts.tokens.shape[1]
        wanted = np.zeros(contexts.tokens.shape, bool)
        wanted[:n] = True
        latents = np.full((n, n_tokens, N_LATENTS), -1, np.int32)
        values = np.zeros((n, n_tokens, N_LATENTS), np.float32)
        first = context_key(part.segment, part.split, contexts.seq[:1])[0]
        read = np.zeros(n, bool)
        for block in iter_blocks(storage, sae, part, contexts, wanted):
            order = np.lexsort((block.latent, -block.value, block.row))
            rank = rank_in_run(block.row[order])
            order, rank = order[rank < N_LATENTS], rank[rank < N_LATENTS]
            row = block.row[order]
            place = (block.rows.context[row] - first, block.rows.pos[row], rank)
            latents[place], values[place] = block.latent[order], block.value[order]
            read[np.unique(block.rows.context - first)] = True
        for i in np.flatnonzero(read):
            length = int((contexts.docs[i] != PADDING).sum())
            doc = np.array([contexts.docs[i, 0]])
            ids = contexts.tokens[i, :length]
            rows.append(
                {
                    "segment": part.segment,
                    "split": part.split,
                    "seq": int(contexts.seq[i]),
                    "doc_name": document_names_of(document_names, np.array([part.segment]), doc)[0].as_py(),
                    "token_ids": ids,
                    "token_bytes": bytes_of(ids, token_names).to_pylist(),
                    "latents": latents[i, :length].reshape(-1),
                    "values": values[i, :length].reshape(-1),
                }
            )
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


_SCHEMA = pa.schema(
    {
        "segment": pa.int64(),
        "split": pa.string(),
        "seq": pa.int32(),
        "doc_name": pa.string(),
        "token_ids": pa.list_(pa.int32()),
        "token_bytes": pa.list_(pa.binary()),
        "latents": pa.list_(pa.int32()),
        "values": pa.list_(pa.float32()),
    }
)
