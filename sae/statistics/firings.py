"""Firings: which latent was active where, as parallel arrays; the one form in which statistics see activations."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from sae.architectures.base import SAE
from sae.extract.config import Split
from sae.statistics.config import StatisticsSpec
from sae.store.reading.blocks import RowBlock, iter_rows
from sae.store.snapshots.snapshot import Snapshot, read_snapshot
from sae.store.storage.filesystem import Storage
from sae.store.text.contexts import Contexts
from sae.store.text.rows import TextSource, context_index, contexts_of_part, text_source

SPLITS: tuple[Split, ...] = ("heldout", "train")
"""Their order is the order of the parts, and a split's place in it is its code in a context's key."""
BLOCK_ROWS = 8192
"""Rows encoded at once."""
NO_TOKEN = -1
NO_LABEL = 255


class Firings(NamedTuple):
    """Latents that were active. Parallel arrays [n]."""

    latent: np.ndarray
    """int32"""
    value: np.ndarray
    """Activation, above zero. float32"""
    context: np.ndarray
    """Key of the context: segment, split and number (`context_key`). int64"""
    pos: np.ndarray
    """Position in the context. int32"""
    doc: np.ndarray
    """Key of the document: segment and index; a given row is its own document. int64"""

    def __len__(self) -> int:
        return len(self.latent)

    def take(self, index: np.ndarray) -> "Firings":
        """The firings at `index` (indices or a mask)."""
        return Firings(*(column[index] for column in self))

    @classmethod
    def concatenate(cls, pieces: list["Firings"]) -> "Firings":
        """All firings of `pieces`, in order."""
        return cls(*(np.concatenate(columns) for columns in zip(*pieces, strict=True)))

    @classmethod
    def empty(cls) -> "Firings":
        """No firings."""
        return cls(*(np.empty(0, dtype) for dtype in (np.int32, np.float32, np.int64, np.int32, np.int64)))


class Rows(NamedTuple):
    """Where rows come from and what stands there. Parallel arrays [n_rows]."""

    context: np.ndarray
    """Key of the context: segment, split and number (`context_key`). int64"""
    pos: np.ndarray
    """Position in the context. int32"""
    doc: np.ndarray
    """Key of the document: segment and index; a given row is its own document. int64"""
    token: np.ndarray
    """Token id, NO_TOKEN for given activations. int32"""
    previous: np.ndarray
    """The token before it in the context, NO_TOKEN where there is none. int32"""
    label: np.ndarray
    """Syntax label, NO_LABEL where there is none. uint8"""

    def __len__(self) -> int:
        return len(self.context)


class Block(NamedTuple):
    """Some rows and every latent that was active on them. The last three are parallel, sorted by row."""

    rows: Rows
    row: np.ndarray
    """Index into `rows`. [n] int64"""
    latent: np.ndarray
    """int32"""
    value: np.ndarray
    """Activation, above zero. float32"""

    def firings(self, index: np.ndarray | slice = slice(None)) -> "Firings":
        """The firings at `index` (indices, a mask or a slice) with their places."""
        row = self.row[index]
        rows = self.rows
        return Firings(self.latent[index], self.value[index], rows.context[row], rows.pos[row], rows.doc[row])


def context_key(segment: int, split: Split, seq: np.ndarray) -> np.ndarray:
    """One number for a context among all segments and splits. [n] int64"""
    return np.int64((segment * len(SPLITS) + SPLITS.index(split)) << 32) | seq.astype(np.int64)


def split_context_key(context: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Segment, code of the split and number of the contexts with these keys. Each [n] int64"""
    high = context >> 32
    return high // len(SPLITS), high % len(SPLITS), context & 0xFFFFFFFF


def document_key(segment: int, doc: np.ndarray) -> np.ndarray:
    """One number for a document among all segments. [n] int64"""
    return np.int64(segment << 32) | doc.astype(np.int64)


@dataclass(frozen=True)
class StatisticsPart:
    """One part of a snapshot, as a unit of work."""

    split: Split
    snapshot: Snapshot
    index: int
    """In the snapshot."""
    segment: int
    """Number of the part's segment: its place among the spec's `tokens`."""
    text: TextSource | None

    @property
    def n_rows(self) -> int:
        """Rows of the part."""
        return self.snapshot.parts[self.index].n_rows

    def contexts(self, storage: Storage) -> Contexts | None:
        """The part's contexts; None for given activations."""
        if self.text is None:
            return None
        return contexts_of_part(storage, self.snapshot.parts[self.index], self.text)


def list_parts(storage: Storage, spec: StatisticsSpec) -> list[StatisticsPart]:
    """The units of work of a statistics artefact, in order of their number: held-out parts first."""
    parts = []
    for split in SPLITS:
        if split not in spec.snapshots:
            continue
        snapshot = read_snapshot(storage, spec.snapshots[split])
        texts = {ref: text_source(storage, ref) for ref in sorted(snapshot.refs)}
        for index, entry in enumerate(snapshot.parts):
            text = texts[entry.ref]
            segment = spec.tokens.index(text.tokens) if text else 0
            parts.append(StatisticsPart(split, snapshot, index, segment, text))
    return parts


@torch.inference_mode()
def iter_blocks(
    storage: Storage,
    sae: SAE,
    part: StatisticsPart,
    contexts: Contexts | None,
    wanted: np.ndarray | None = None,
) -> Iterator[Block]:
    """Encode a part's rows; yield them with their firings, block by block in file order.

    Args:
        contexts: of the part; None for given activations.
        wanted: which positions of the contexts to encode: [n_contexts, T] bool; None: all rows. A given row has the
            only position of a context of its own, and no mask.
    """
    if part.n_rows == 0:
        return
    for block in iter_rows(storage, part.snapshot, [part.index]):
        if wanted is None or contexts is None:
            chosen = np.arange(len(block.seq))
        else:
            chosen = np.flatnonzero(wanted[context_index(contexts, block.seq), block.pos])
        for start in range(0, len(chosen), BLOCK_ROWS):
            index = chosen[start : start + BLOCK_ROWS]
            x = torch.from_numpy(block.act[index].astype(np.float32))
            sparse = sae.encode_sparse(x.to(sae.W_enc.device)).to("cpu")
            value = sparse.value.numpy()
            fired = np.flatnonzero(value > 0)
            row, latent = sparse.row.numpy()[fired], sparse.latent.numpy()[fired].astype(np.int32)
            yield Block(_rows(part, contexts, block, index), row, latent, value[fired])


def _rows(part: StatisticsPart, contexts: Contexts | None, block: RowBlock, index: np.ndarray) -> Rows:
    """The rows at `index` of a block that was read."""
    seq, pos, token = block.seq[index], block.pos[index].astype(np.int32), block.token[index]
    context = context_key(part.segment, part.split, seq)
    if contexts is None:
        nothing = np.full(len(seq), NO_TOKEN, np.int32)
        unlabelled = np.full(len(seq), NO_LABEL, np.uint8)
        return Rows(context, pos, document_key(part.segment, seq), nothing, nothing, unlabelled)
    place = context_index(contexts, seq)
    before = contexts.tokens[place, np.maximum(pos - 1, 0)]
    labels = contexts.labels
    return Rows(
        context=context,
        pos=pos,
        doc=document_key(part.segment, contexts.docs[place, pos]),
        token=token.astype(np.int32),
        previous=np.where(pos > 0, before, NO_TOKEN).astype(np.int32),
        label=np.full(len(seq), NO_LABEL, np.uint8) if labels is None else labels[place, pos],
    )
