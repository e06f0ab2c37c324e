"""Rows with their text: token, token before, syntax label, position and context of every measured row."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from sae.store.reading.blocks import RowBlock
from sae.store.reading.reader import RowGroupReader
from sae.store.snapshots.snapshot import Snapshot
from sae.store.storage.filesystem import Storage
from sae.store.text.contexts import Contexts
from sae.store.text.rows import context_index, contexts_of_part, text_source

NO_TOKEN = -1


@dataclass(frozen=True)
class RowTexts:
    """Parallel to some rows of a snapshot, in file order."""

    token: np.ndarray
    """[n] int32"""
    previous: np.ndarray
    """The token before it in the context, NO_TOKEN at position 0. [n] int32"""
    label: np.ndarray | None
    """Syntax label; None where the corpus has none. [n] uint8"""
    position: np.ndarray
    """In the context. [n] int32"""
    context: np.ndarray
    """A number that the rows of one context share, and no others. [n] int64"""

    def __len__(self) -> int:
        return len(self.token)


def part_contexts(storage: Storage, snapshot: Snapshot, part: int) -> Contexts:
    """The contexts that the rows of one part lie in. The snapshot was extracted from text."""
    source = text_source(storage, snapshot.parts[part].ref)
    assert source is not None, "given activations have no text"
    return contexts_of_part(storage, snapshot.parts[part], source)


def row_texts(contexts: Contexts, part: int, block: RowBlock) -> RowTexts:
    """The texts of one block of rows. contexts: of its part, `part` being its index in the snapshot."""
    row = context_index(contexts, block.seq)
    before = contexts.tokens[row, np.maximum(block.pos - 1, 0)]
    return RowTexts(
        token=block.token,
        previous=np.where(block.pos > 0, before, NO_TOKEN).astype(np.int32),
        label=contexts.labels[row, block.pos] if contexts.labels is not None else None,
        position=block.pos,
        context=(np.int64(part) << 32) | block.seq.astype(np.int64),
    )


def concatenate_texts(pieces: Sequence[RowTexts], max_rows: int) -> RowTexts:
    """Consecutive rows as one table of at most `max_rows`. Where some rows have no label, none is used."""

    def joined(name: str) -> np.ndarray | None:
        columns = [getattr(piece, name) for piece in pieces]
        if any(column is None for column in columns) or not columns:
            return None if name == "label" else np.empty(0, np.int64)
        return np.concatenate(columns)[:max_rows]

    return RowTexts(**{field.name: joined(field.name) for field in fields(RowTexts)})  # type: ignore[arg-type]


def count_tokens(storage: Storage, snapshot: Snapshot) -> np.ndarray:
    """How many rows of a snapshot each token id has; reads no activations. [largest id + 1] int64"""
    reader = RowGroupReader(storage, snapshot)
    counts = np.zeros(1, np.int64)
    try:
        for part, sizes in enumerate(snapshot.row_groups):
            for identity in reader.read_identities([(part, group) for group in range(len(sizes))]):
                found = np.bincount(identity[2])
                if len(found) > len(counts):
                    counts = np.pad(counts, (0, len(found) - len(counts)))
                counts[: len(found)] += found
    finally:
        reader.close()
    return counts
