"""examples.parquet -> contexts as the page shows them, streamed: memory holds one batch of rows."""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae.report.display import Segment, is_whole, plain, show_tokens
from sae.report.numbers import shorts

BATCH_ROWS = 4096


class Token(NamedTuple):
    """A token: its id (-1: none), its segments and its bytes, frozen so that equal tokens can be counted as one."""

    id: int
    shown: tuple[str | tuple[str, str], ...]
    raw: bytes


@dataclass(frozen=True, slots=True)
class Context:
    """One window of tokens around a firing."""

    group: str
    value: float
    """The activation at the peak."""
    peak: int
    """Index of the peak in the window."""
    seq: int
    pos: int
    """Position of the peak in its context."""
    split: str
    document: str
    tokens: list[Token]
    firing: list[tuple[int, float]]
    """(index in the window, activation) of every token on which the latent fires."""

    def segments(self, index: int) -> list[Segment]:
        """What token `index` of the window shows."""
        return [part if isinstance(part, str) else list(part) for part in self.tokens[index].shown]


def iter_examples(path: Path, n_latents: int) -> Iterator[list[Context]]:
    """The contexts of each latent in order of id, in the file's order; empty lists for latents without any.

    Raises: ValueError when the file is not sorted by latent.
    """
    groups = itertools.groupby(_iter_rows(path), key=lambda row: row[0])
    expected = 0
    for latent, rows in groups:
        if latent < expected:
            raise ValueError(f"{path}: latent {latent} comes after {expected - 1}; the file must be sorted by latent")
        yield from ([] for _ in range(latent - expected))
        yield [context for _, context in rows]
        expected = latent + 1
    yield from ([] for _ in range(n_latents - expected))


def _iter_rows(path: Path) -> Iterator[tuple[int, Context]]:
    tokens = _Tokens()
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH_ROWS):
            yield from _contexts(batch, tokens)


def _contexts(batch: pa.RecordBatch, tokens: "_Tokens") -> Iterator[tuple[int, Context]]:
    """Lists are read as flat arrays with offsets: Python objects are made per token only where they are shown."""
    plain_columns = ("latent", "group", "seq", "pos", "split", "doc_name", "peak")
    values = shorts(batch["value"]).to_pylist()
    rows = zip(values, *(batch[name].to_pylist() for name in plain_columns), strict=True)
    ends = np.cumsum([0, *batch["token_ids"].value_lengths().to_pylist()]).tolist()
    shown = _shown(batch, tokens, ends)
    firing = _firing(batch["activations"].flatten().to_numpy(zero_copy_only=False), ends)
    for (value, latent, group, seq, pos, split, document, peak), window, fires in zip(rows, shown, firing, strict=True):
        context = Context(group, value, peak, seq, pos, split, _document(document or ""), window, fires)
        yield latent, context


def _shown(batch: pa.RecordBatch, tokens: "_Tokens", ends: list[int]) -> Iterator[list[Token]]:
    """The tokens of every window. Windows of whole tokens alone, nearly all, are looked up without looking closer."""
    ids = batch["token_ids"].flatten().to_numpy(zero_copy_only=False)
    encoded = batch["token_bytes"].flatten().dictionary_encode()
    pieces = [bytes(value) for value in encoded.dictionary.to_pylist()]
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    pairs, kind = np.unique(ids.astype(np.int64) << 32 | codes, return_inverse=True)
    kinds = [(int(pair >> 32), pieces[pair & 0xFFFFFFFF]) for pair in pairs]
    whole = [is_whole(piece) for _, piece in kinds]
    alone = [
        tokens.show([number], [piece], [True])[0] if ok else None
        for (number, piece), ok in zip(kinds, whole, strict=True)
    ]
    broken = np.cumsum([0, *~np.array(whole, bool)[kind]]).tolist()
    kind = kind.tolist()
    for start, end in itertools.pairwise(ends):
        window = kind[start:end]
        if broken[start] == broken[end]:
            yield [alone[i] for i in window]
        else:
            yield tokens.show([kinds[i][0] for i in window], [kinds[i][1] for i in window], [whole[i] for i in window])


def _firing(activations: np.ndarray, ends: list[int]) -> Iterator[list[tuple[int, float]]]:
    """(index in the window, activation) of what is not silent, by window."""
    places = np.flatnonzero(activations)
    bounds = np.searchsorted(places, ends).tolist()
    values = shorts(pa.array(activations[places])).to_pylist()
    index = places.tolist()
    for start, (first, last) in zip(ends[:-1], itertools.pairwise(bounds), strict=True):
        yield [(index[i] - start, values[i]) for i in range(first, last)]


class _Tokens:
    """Shown tokens, made once for each run of tokens that can change each other's look.

    A run is a token that is valid UTF-8 by itself, or neighbours that are not: they may share a character.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[tuple[int, ...], tuple[bytes, ...]], list[Token]] = {}

    def show(self, ids: list[int], raw: list[bytes], whole: list[bool]) -> list[Token]:
        found: list[Token] = []
        start = 0
        while start < len(raw):
            end = start + 1
            while not whole[start] and end < len(raw) and not whole[end]:
                end += 1
            found += self._run(tuple(ids[start:end]), tuple(raw[start:end]))
            start = end
        return found

    def _run(self, ids: tuple[int, ...], raw: tuple[bytes, ...]) -> list[Token]:
        run = self._known.get((ids, raw))
        if run is None:
            run = [frozen(*token) for token in zip(ids, show_tokens(raw), raw, strict=True)]
            self._known[ids, raw] = run
        return run


@functools.lru_cache(maxsize=1 << 14)
def _document(name: str) -> str:
    return plain(name, 120)


def frozen(token_id: int, segments: list[Segment], raw: bytes) -> Token:
    """A token that can be a key."""
    return Token(token_id, tuple(part if isinstance(part, str) else (part[0], part[1]) for part in segments), raw)
