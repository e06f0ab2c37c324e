"""What the search box looks up: words, tokens and documents -> latents, so that a search loads a file or two.

Four kinds: `words` of the strongest contexts and of the rule; `tokens` that a latent prefers (association); `logits`:
tokens it raises most; `docs`: documents of its strongest contexts. Each is a sorted list of entries [term, first
latent, difference to the next, ...], cut into files of even size; the page knows the first key of every file.
"""

import functools
import itertools
import json
import re
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from sae.report import chunks
from sae.report.display import flat, show_tokens
from sae.report.latents import Latent
from sae.report.rules import latent_label

KINDS = ("words", "tokens", "logits", "docs")
FILE_BYTES = 128_000
"""No file is larger, unless one entry alone is."""
COMMON_SHARE, COMMON_AT_LEAST = 0.05, 1000
"""Words of more than this share of the latents, and of more than this many, are listed without latents."""
PREFERS_PRECISION, PREFERS_LIFT = 0.1, 2.0
"""A latent prefers a token when at least this share of its firings is on it, this many times more than by chance."""
BYTES_PER_LATENT = 2.0
"""Of a file, per latent of an entry: 2.2 in the default run of 2,048 latents, fewer in larger ones."""
_RAW_BYTES = 200_000
_LONGEST = 60
_WORD = re.compile(r"\w+")
_COMMON = -1


class LatentIndex:
    """Collects the terms of latents, which come in order of their id.

    Args:
        max_bytes: an index that grows above this is given up, and what it held is let go.
    """

    def __init__(self, n_latents: int, max_bytes: int) -> None:
        self._n_latents, self._max_bytes = n_latents, max_bytes
        self._found: dict[str, dict[str, array[int]]] = {kind: defaultdict(lambda: array("I")) for kind in KINDS}
        self._n_entries = 0
        self._off: str | None = None

    def add(self, latent: Latent) -> None:
        """Note every term of a latent."""
        if self._off is not None:
            return
        for kind, terms in _terms(latent).items():
            for term in terms:
                self._found[kind][term].append(latent.row["latent"])
            self._n_entries += len(terms)
        if self._n_entries * BYTES_PER_LATENT > self._max_bytes:
            self._off = f"an index of all words would take more than {self._max_bytes / 1e6:.0f} MB (index_bytes)"
            self._found = {kind: {} for kind in KINDS}

    def write(self, folder: Path, base: str) -> dict[str, list[str] | str]:
        """Write `base`/<kind>/<number>.js. Returns: the first key of every file, by kind; or {"off": why}."""
        if self._off is not None:
            return {"off": self._off}
        edges: dict[str, list[str] | str] = {}
        for kind in KINDS:
            entries = [(key(term), term, found) for term, found in self._found[kind].items()]
            entries.sort(key=lambda entry: (entry[0].encode("utf-16-be", "surrogatepass"), entry[1]))
            limit = max(COMMON_AT_LEAST, COMMON_SHARE * self._n_latents) if kind == "words" else self._n_latents
            lines = [(name, _encode(term, found, limit)) for name, term, found in entries]
            firsts: list[str] = []
            for number, shard in enumerate(_files(lines)):
                chunks.write_chunk(folder, f"{base}/{kind}/{number}", _payload(shard))
                firsts.append(shard[0][0])
            edges[kind] = firsts
        return edges


def key(term: str) -> str:
    """By what entries are sorted and looked up; search.js makes the same."""
    return term.strip().lower()


def words_of(text: str) -> set[str]:
    """Lower-case words of a text, and the parts of names_with_underscores."""
    found = set(_WORD.findall(text.lower()))
    found |= {part for word in found if "_" in word for part in word.split("_") if part}
    return {word for word in found if len(word) <= _LONGEST}


def _terms(latent: Latent) -> dict[str, set[str]]:
    row = latent.row
    top = [context for context in latent.contexts if context.group == "top"]
    label = latent_label(row)
    words = words_of(flat(label.name)) if label else set()
    for context in top:
        words |= words_of("".join([part for token in context.tokens for part in token.shown if part.__class__ is str]))
    figures = zip(row["token_bytes"], row["token_precision"], row["token_lift"], strict=True)
    preferred = [raw for raw, precision, lift in figures if precision >= PREFERS_PRECISION and lift >= PREFERS_LIFT]
    return {
        "words": words,
        "tokens": _names(preferred),
        "logits": _names(row["logits_up_bytes"]),
        "docs": {context.document for context in top if context.document},
    }


def _names(tokens: Iterable[bytes]) -> set[str]:
    return set(map(_name, tokens))


@functools.lru_cache(maxsize=1 << 16)
def _name(token: bytes) -> str:
    return flat(show_tokens([token])[0])


def _encode(term: str, found: "array[int]", limit: float) -> str:
    if len(found) > limit:
        return json.dumps([term, _COMMON], ensure_ascii=False)
    steps = [found[0], *(b - a for a, b in itertools.pairwise(found))]
    return json.dumps([term, *steps], ensure_ascii=False, separators=(",", ":"))


def _files(lines: list[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Runs of lines that fill a file each."""
    start, size = 0, 0
    for end, (_, line) in enumerate(lines):
        if size and size + len(line) > _RAW_BYTES:
            yield from _fitting(lines[start:end])
            start, size = end, 0
        size += len(line)
    if lines[start:]:
        yield from _fitting(lines[start:])


def _fitting(lines: list[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """The lines, halved as often as it takes."""
    if len(lines) > 1 and len(chunks.deflate(_payload(lines))) * 4 // 3 + 100 > FILE_BYTES:
        middle = len(lines) // 2
        yield from _fitting(lines[:middle])
        yield from _fitting(lines[middle:])
    else:
        yield lines


def _payload(lines: list[tuple[str, str]]) -> bytes:
    return f"[{','.join(line for _, line in lines)}]".encode()
