"""Rows joined with their text: which contexts a part was read on, and where a row's context lies among them."""

from typing import NamedTuple

import numpy as np

from sae.errors import StoreError
from sae.store.artefacts.records import require_record
from sae.store.snapshots.snapshot import SnapshotPart
from sae.store.storage.filesystem import Storage
from sae.store.text.contexts import Contexts, read_contexts


class TextSource(NamedTuple):
    """A table of contexts."""

    tokens: str
    """Address of the tokens artefact."""
    split: str


def text_source(storage: Storage, parts: str) -> TextSource | None:
    """The table that the rows of a part set (its address) come from; None for given activations: they have no text."""
    spec = require_record(storage, parts).spec
    return TextSource(spec["tokens"], spec["split"]) if "tokens" in spec else None


def contexts_of_part(storage: Storage, part: SnapshotPart, source: TextSource) -> Contexts:
    """The contexts of one part, in order of their number. Raises: StoreError when the table is not in that order."""
    n_contexts = int(require_record(storage, part.ref).metrics["contexts_per_part"])
    start = part.part * n_contexts
    contexts = read_contexts(storage, source.tokens, source.split, start, start + n_contexts)
    if len(contexts) and not np.array_equal(contexts.seq, contexts.seq[0] + np.arange(len(contexts))):
        raise StoreError(
            f"{source.tokens}: contexts {start} to {start + n_contexts} of its {source.split} table are not in order "
            f"of their numbers. Delete the artefact and run extract again."
        )
    return contexts


def context_index(contexts: Contexts, seq: np.ndarray) -> np.ndarray:
    """Index in `contexts` of each row's context. [rows] int64

    Args:
        contexts: numbered without gaps, as from `contexts_of_part`.
        seq: context number of every row. [rows]

    Raises: StoreError for a row of another context.
    """
    first, n_contexts = (int(contexts.seq[0]), len(contexts)) if len(contexts) else (0, 0)
    index = seq.astype(np.int64) - first
    if len(index) and (index.min() < 0 or index.max() >= n_contexts):
        raise StoreError(
            f"rows of contexts {int(seq.min())} to {int(seq.max())}, but their part holds {n_contexts} contexts "
            f"from {first}: tokens and activations do not belong together. Delete the parts and run extract again."
        )
    return index
