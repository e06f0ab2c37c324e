"""One latent's page as data: everything latents.parquet and examples.parquet know about it."""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

from sae.report import chunks
from sae.report.display import Segment, show_text, show_tokens
from sae.report.examples import Context, Token, frozen
from sae.report.model_labels import model_label
from sae.report.numbers import wilson
from sae.report.rules import latent_label, rules_of

GROUPS = ("top", "q3", "q2", "q1", "q0", "random", "miss")


@dataclass(frozen=True)
class Latent:
    """One row of latents.parquet and its contexts."""

    row: dict[str, Any]
    """Its float32 values as their shortest decimals."""
    contexts: list[Context]


def encode_latents(latents: list[Latent], n_rows: int) -> bytes:
    """The payload of a latent chunk: a token dictionary of its own, and one object per latent.

    `bytes` holds the bytes, in hex, of tokens that are not shown as they are.
    """
    dictionary = _Dictionary()
    body = [_latent_object(latent, n_rows, dictionary) for latent in latents]
    return chunks.encode_json(
        {
            "schema": chunks.SCHEMA_VERSION,
            "start": latents[0].row["latent"],
            "tokens": [[token.id, *token.shown] for token in dictionary.tokens],
            "bytes": {index: token.raw.hex() for token, index in dictionary.tokens.items() if not _is_literal(token)},
            "latents": body,
        }
    )


class _Dictionary:
    """Tokens in order of their first use, by number."""

    def __init__(self) -> None:
        self.tokens: dict[Token, int] = {}
        self._numbers: dict[int, int] = {}

    def number(self, token: Token) -> int:
        """The number of a token."""
        return self.tokens.setdefault(token, len(self.tokens))

    def numbers(self, tokens: list[Token]) -> list[int]:
        """The numbers of tokens that live as long as the dictionary: looked up by identity, as hashing takes long."""
        try:
            return list(map(self._numbers.__getitem__, map(id, tokens)))
        except KeyError:
            for token in tokens:
                self._numbers[id(token)] = self.number(token)
            return self.numbers(tokens)


def _latent_object(latent: Latent, n_rows: int, dictionary: _Dictionary) -> dict[str, Any]:
    row = latent.row
    label = latent_label(row)
    return {
        "id": row["latent"],
        "n": [row["n_fired"], row["n_fired_train"], row["n_fired_heldout"]],
        "frequency": row["frequency"],
        "interval": wilson(row["n_fired"], n_rows),
        "mean": _number(row["mean_act"]),
        "max": _number(row["max_act"]),
        "quartiles": [_number(row[name]) for name in ("q25", "q50", "q75")],
        "histogram": row["histogram"],
        "dense": bool(row["dense"]),
        "duplicate": row["duplicate_of"],
        "label": label.dump() if label else None,
        "model": model_label(row),
        "rules": [rule.dump() for rule in rules_of(row)],
        "tokens": _counted(row, "token", _token_indices(row, "tokens", "token_bytes", dictionary)),
        "previous": _counted(row, "previous", _token_indices(row, "previous_tokens", "previous_bytes", dictionary)),
        "syntax": _counted(row, "syntax", [show_text(name) for name in row["syntax"]]),
        "positions": row["positions"],
        "coactive": _rows(row, "coactive", "coactive_lift", "coactive_share", "coactive_count"),
        "neighbours": _rows(row, "neighbours", "neighbour_cosines"),
        "neurons": _rows(row, "neurons", "neuron_weights"),
        "up": _logits(row, "logits_up"),
        "down": _logits(row, "logits_down"),
        "groups": {
            name: found
            for name in GROUPS
            if (found := [_context_object(c, dictionary) for c in latent.contexts if c.group == name])
        },
    }


def _context_object(context: Context, dictionary: _Dictionary) -> dict[str, Any]:
    return {
        "value": context.value,
        "peak": context.peak,
        "at": [context.split, context.document, context.seq, context.pos],
        "tokens": dictionary.numbers(context.tokens),
        "firing": list(itertools.chain.from_iterable(context.firing)),
    }


def _token_indices(row: dict[str, Any], ids: str, raw: str, dictionary: _Dictionary) -> list[int]:
    tokens = (frozen(token, _shown(data), data) for token, data in zip(row[ids], row[raw], strict=True))
    return [dictionary.number(token) for token in tokens]


def _counted(row: dict[str, Any], what: str, names: list[Any]) -> list[list[Any]]:
    """[name, firings, precision, recall, lift] of everything counted."""
    figures = (row[f"{what}_{name}"] for name in ("precision", "recall", "lift"))
    return [list(entry) for entry in zip(names, row[f"{what}_counts"], *figures, strict=True)]


def _rows(row: dict[str, Any], *names: str) -> list[list[Any]]:
    """Parallel lists as rows."""
    return [list(entry) for entry in zip(*(row[name] for name in names), strict=True)]


def _logits(row: dict[str, Any], name: str) -> list[list[Any]]:
    return [
        [token, value, _shown(raw)]
        for token, value, raw in zip(row[name], row[f"{name}_values"], row[f"{name}_bytes"], strict=True)
    ]


@functools.lru_cache(maxsize=1 << 16)
def _shown(token: bytes) -> list[Segment]:
    return show_tokens([token])[0]


def _is_literal(token: Token) -> bool:
    """Whether the shown text is the token's bytes."""
    return all(isinstance(part, str) for part in token.shown)


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
