"""The text that made-up latents fire on: a piece of Python source as tokens, or names of rows."""

import re
from dataclasses import dataclass

import numpy as np

HOSTILE = (
    b"<script>alert(1)</script>",
    b"</script><script>window.PWN=1</script>",
    b'"><img src=x onerror=window.PWN=1>',
    "\u202eabc".encode(),
    b"a\x00b",
    b"\xff\xfe\xc3",
    b"&lt;b&gt;",
    b"{{ 7*7 }}",
    b"${window.PWN=1}",
    b"x" * 300,
    "\u2028".encode(),
    b"' onmouseover='window.PWN=1",
)
HOSTILE_TEXT = "<img src=x onerror=window.PWN=1>\u202e\x00</script>\"'"
SYNTAX = ("name", "operator", "string", "keyword", "number", "indent", "comment")

_SOURCE = '''
class Parser:
    """Parse one line of the log; see RFC 5424."""

    def __init__(self, path, *, encoding=None):
        self.path = path
        self.encoding = encoding or "utf-8"
        self._lines = []

    def __repr__(self):
        return f"Parser({self.path!r})"

    @property
    def lines(self):
        if self._lines is not None and len(self._lines) == 0:
            raise ValueError("no lines were read from %r" % self.path)
        return self._lines

    def read(self, size=-1):
\ttry:
\t    with open(self.path, encoding=self.encoding) as file:
\t        for number, line in enumerate(file):
\t            if line.startswith("#"):
\t                continue
\t            self._lines.append((number, line.rstrip("\\n")))
\texcept OSError as error:
\t    raise RuntimeError(f"line {number}: café naïve – {error}") from None
import os, sys, re, json, struct, socket, threading
from collections import namedtuple, OrderedDict, defaultdict
__all__ = ["Parser", "dumps", "loads"]
def dumps(obj, *, skipkeys=False, ensure_ascii=True, default=None, **kw):
    if not skipkeys and ensure_ascii and default is None and not kw:
        return _default_encoder.encode(obj)
'''


@dataclass(frozen=True)
class Text:
    """A text as token ids."""

    vocabulary: list[bytes]
    ids: np.ndarray
    """[n]"""

    @property
    def share(self) -> np.ndarray:
        """How often each token of the vocabulary stands in the text. [n_vocab]"""
        return np.bincount(self.ids, minlength=len(self.vocabulary)) / len(self.ids)


def source_text(extra: tuple[bytes, ...] = ()) -> Text:
    """Pieces of the source text; multi-byte characters are split over tokens. `extra`: tokens to put in."""
    pieces = [piece.encode() for piece in re.findall(r" ?\w+|\n|\t| +(?= \w)|[^\w\s]| ", _SOURCE)]
    split: list[bytes] = []
    for piece in pieces:
        cut = next((i + 1 for i, byte in enumerate(piece) if byte >= 0xC2), None)
        split += [piece] if cut is None else [piece[:cut], piece[cut:]]
    for i, piece in enumerate(extra):
        split.insert(7 + 11 * i, piece)
    vocabulary = sorted(set(split))
    index = {piece: i for i, piece in enumerate(vocabulary)}
    return Text(vocabulary, np.array([index[piece] for piece in split]))
