"""Token tables: the contexts that activations were read on, joined with them on (seq, pos)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae.store.artefacts.records import local_files, require_record
from sae.store.storage.filesystem import Storage

PADDING = -1
"""Document index of a padding position."""
CONTEXTS_PER_ROW_GROUP = 4096
DOCUMENTS_FILE = "documents.parquet"


@dataclass(frozen=True)
class Contexts:
    """Contexts of equal length T."""

    seq: np.ndarray
    """Number of the context, unique over both splits of a segment. [n] int32"""
    tokens: np.ndarray
    """Token ids. [n, T] int32"""
    docs: np.ndarray
    """Document index of every token, PADDING where there is none. [n, T] int32"""
    labels: np.ndarray | None
    """Syntax label of every token, for Python sources. [n, T] uint8"""

    def __len__(self) -> int:
        return len(self.seq)

    def __getitem__(self, chosen: slice) -> "Contexts":
        labels = None if self.labels is None else self.labels[chosen]
        return Contexts(self.seq[chosen], self.tokens[chosen], self.docs[chosen], labels)


def write_contexts(path: Path, contexts: Contexts) -> None:
    """Write one split as Parquet: seq, tokens, doc and, where there are any, label."""
    columns = {
        "seq": pa.array(contexts.seq, pa.int32()),
        "tokens": _lists(contexts.tokens, pa.int32()),
        "doc": _lists(contexts.docs, pa.int32()),
    }
    if contexts.labels is not None:
        columns["label"] = _lists(contexts.labels, pa.uint8())
    pq.write_table(pa.table(columns), path, row_group_size=CONTEXTS_PER_ROW_GROUP, compression="zstd")


def read_contexts(storage: Storage, tokens_ref: str, split: str, start: int = 0, stop: int | None = None) -> Contexts:
    """Contexts [start, stop) of a split, in stored order.

    Raises: StoreError when they are not there; DamagedError when the table is not what its record says.
    """
    record = require_record(storage, tokens_ref)
    name = f"{split}.parquet"
    with local_files(storage, record, name) as folder, pq.ParquetFile(folder / name) as file:
        n_contexts = file.metadata.num_rows
        stop = n_contexts if stop is None else min(stop, n_contexts)
        start = min(start, stop)
        first = start // CONTEXTS_PER_ROW_GROUP
        groups = range(first, max(first, -(-stop // CONTEXTS_PER_ROW_GROUP)))
        table = file.read_row_groups(list(groups)) if groups else file.schema_arrow.empty_table()
    offset = first * CONTEXTS_PER_ROW_GROUP
    table = table.slice(start - offset, stop - start)
    n_tokens = record.spec["context_tokens"]
    return Contexts(
        seq=table["seq"].to_numpy(),
        tokens=_matrix(table["tokens"], n_tokens),
        docs=_matrix(table["doc"], n_tokens),
        labels=_matrix(table["label"], n_tokens) if "label" in table.column_names else None,
    )


def write_documents(path: Path, names: list[str], splits: list[str], n_tokens: list[int]) -> None:
    """Write the table of documents, in order of their index."""
    table = pa.table(
        {
            "doc": pa.array(range(len(names)), pa.int32()),
            "name": pa.array(names, pa.string()),
            "split": pa.array(splits, pa.string()),
            "n_tokens": pa.array(n_tokens, pa.int32()),
        }
    )
    pq.write_table(table, path, compression="zstd")


def read_document_names(storage: Storage, tokens_ref: str) -> list[str]:
    """Names of the documents, by index. Raises: as read_contexts."""
    record = require_record(storage, tokens_ref)
    with local_files(storage, record, DOCUMENTS_FILE) as folder:
        return list(pq.read_table(folder / DOCUMENTS_FILE, columns=["name"])["name"].to_pylist())


def _lists(values: np.ndarray, item: pa.DataType) -> pa.Array:
    offsets = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1), item))


def _matrix(column: pa.ChunkedArray, width: int) -> np.ndarray:
    flat = column.combine_chunks().flatten().to_numpy()
    return flat.reshape(-1, width)
