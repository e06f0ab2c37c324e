"""From documents to contexts: tokenized, split by document, packed, permuted."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sae.errors import InputError
from sae.extract import syntax
from sae.extract.config import SegmentSpec, Source, Split, TokensSpec
from sae.extract.corpus import Document, Tally, is_heldout, iter_segment
from sae.philox import philox
from sae.progress import Progress, silent
from sae.store.artefacts.records import Record, commit, require_record
from sae.store.storage.filesystem import Storage
from sae.store.text.contexts import PADDING, Contexts, write_contexts, write_documents
from sae.subject.load import check_tokenizer, load_tokenizer, special_ids

SPLITS: tuple[Split, ...] = ("train", "heldout")
BATCH_CHARS = 1 << 20
"""Text given to the tokenizer at once: enough for its threads, little enough for memory."""


@dataclass(frozen=True)
class TokenizedDocument:
    """One document as tokens, the separator first."""

    name: str
    split: Split
    tokens: np.ndarray
    """[n] int32"""
    labels: np.ndarray | None
    """[n] uint8"""


@dataclass
class _SplitTokens:
    """What one split has gathered."""

    tokens: list[np.ndarray] = field(default_factory=list)
    docs: list[np.ndarray] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)


def tokenize_segment(storage: Storage, spec: TokensSpec, source: Source, *, progress: Progress = silent) -> Record:
    """Write a segment's contexts: `train.parquet`, `heldout.parquet` and `documents.parquet`.

    Every document starts with one separator (the tokenizer's BOS, else EOS, else CLS token; none where it has none).
    Packed, documents follow each other and the last, incomplete context of a split is dropped; otherwise each context
    is the beginning of one document, padded. Contexts are permuted within their split.

    Raises: InputError when the source changed, or there is not text enough for one training context.
    """
    started = time.perf_counter()
    segment_record = require_record(storage, spec.segment)
    segment = SegmentSpec.model_validate(segment_record.spec)
    n_documents = int(segment_record.metrics["n_documents"])
    tokenizer = load_tokenizer(storage, spec.tokenizer)
    check_tokenizer(tokenizer, spec.tokenizer, syntax=spec.syntax)
    separator = separator_id(tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (separator or 0)

    gathered = {split: _SplitTokens() for split in SPLITS}
    names: list[str] = []
    splits: list[str] = []
    lengths: list[int] = []
    documents = tokenize_documents(
        tokenizer, iter_segment(segment, source, Tally()), separator, segment.heldout_fraction, spec.syntax
    )
    for number, document in enumerate(documents):
        kept = slice(None) if spec.packing else slice(spec.context_tokens)
        into = gathered[document.split]
        into.tokens.append(document.tokens[kept])
        into.docs.append(np.full(len(into.tokens[-1]), number, np.int32))
        if document.labels is not None:
            into.labels.append(document.labels[kept])
        names.append(document.name)
        splits.append(document.split)
        lengths.append(len(into.tokens[-1]))
        progress(number + 1, n_documents, "documents")

    width = spec.context_tokens
    arrange = _packed if spec.packing else _padded
    contexts: dict[Split, Contexts] = {}
    for split in SPLITS:
        tokens, docs, labels = arrange(gathered.pop(split), width, pad)
        order = philox("contexts", spec.seed, spec.segment, split).permutation(len(tokens))
        first = len(contexts["train"]) if split == "heldout" else 0
        contexts[split] = Contexts(
            seq=np.arange(first, first + len(tokens), dtype=np.int32),
            tokens=tokens[order],
            docs=docs[order],
            labels=labels[order] if spec.syntax else None,
        )
    if len(contexts["train"]) == 0:
        n_train = sum(length for length, split in zip(lengths, splits, strict=True) if split == "train")
        raise InputError(
            f"the corpus has {n_train} training tokens in {splits.count('train')} of {len(names)} documents, less than "
            f"one context of {width}. Add text to corpus.segments, or lower corpus.context_tokens or "
            f"corpus.heldout_fraction."
        )
    present = {split: int((contexts[split].docs != PADDING).sum()) for split in SPLITS}
    metrics: dict[str, Any] = {
        "n_documents": len(names),
        "n_bytes": segment_record.metrics["n_bytes"],
        "n_skipped": segment_record.metrics["n_skipped"],
        **{split: {"n_contexts": len(contexts[split]), "n_tokens": present[split]} for split in SPLITS},
        "n_dropped_tokens": sum(lengths) - sum(present.values()),
        "context_tokens": width,
        "special_ids": list(special_ids(tokenizer)),
        "separator_id": separator,
        "pad_id": None if spec.packing else pad,
        "vocab_size": len(tokenizer),
        "label_names": list(syntax.LABELS) if spec.syntax else None,
    }
    with storage.staging() as folder:
        for split in SPLITS:
            write_contexts(folder / f"{split}.parquet", contexts[split])
        write_documents(folder / "documents.parquet", names, splits, lengths)
        return commit(storage, spec, folder, metrics, seconds=time.perf_counter() - started)


def tokenize_documents(
    tokenizer: Any, documents: Iterable[Document], separator: int | None, heldout_fraction: float, with_labels: bool
) -> Iterator[TokenizedDocument]:
    """Tokenize documents in order. Text that spells a special token stays text."""
    prefix = [] if separator is None else [separator]
    for batch in _batches(documents):
        encoded = tokenizer(
            [document.text for document in batch],
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=with_labels,
            verbose=False,
        )
        for index, document in enumerate(batch):
            # int32 by name: an empty list of ids would make a float array.
            tokens = np.array(prefix + encoded["input_ids"][index], np.int32)
            labels = None
            if with_labels:
                offsets = np.array(encoded["offset_mapping"][index], np.int64).reshape(-1, 2)
                marks = np.full(len(prefix), syntax.SPECIAL, np.uint8)
                labels = np.concatenate([marks, syntax.label_tokens(document.text, offsets)])
            split: Split = "heldout" if is_heldout(document.name, heldout_fraction) else "train"
            yield TokenizedDocument(document.name, split, tokens, labels)


def separator_id(tokenizer: Any) -> int | None:
    """The token put at the start of every document; None where the tokenizer has none that fits."""
    for role in ("bos", "eos", "cls"):
        found = getattr(tokenizer, f"{role}_token_id", None)
        if found is not None:
            return int(found)
    return None


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    n_chars = 0
    for document in documents:
        batch.append(document)
        n_chars += len(document.text)
        if n_chars >= BATCH_CHARS:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch


def _packed(split: _SplitTokens, width: int, pad: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, documents and labels of full contexts. Each [n, width]; labels may be empty."""

    def cut(pieces: list[np.ndarray], dtype: type) -> np.ndarray:
        flat = np.concatenate(pieces) if pieces else np.zeros(0, dtype)
        return flat[: len(flat) // width * width].reshape(-1, width)

    return cut(split.tokens, np.int32), cut(split.docs, np.int32), cut(split.labels, np.uint8)


def _padded(split: _SplitTokens, width: int, pad: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, documents and labels of one context per document. Each [n, width]; labels may be empty."""

    def fill(pieces: list[np.ndarray], value: int, dtype: type) -> np.ndarray:
        filled: np.ndarray = np.full((len(pieces), width), value, dtype)
        for row, piece in zip(filled, pieces, strict=True):
            row[: len(piece)] = piece
        return filled

    return (
        fill(split.tokens, pad, np.int32),
        fill(split.docs, PADDING, np.int32),
        fill(split.labels, syntax.SPECIAL, np.uint8),
    )
