"""Text -> tokens -> activations at the hook point -> latents."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.architectures.base import SparseLatents
from sae.report.display import show_tokens
from sae.report.numbers import short
from sae.serve.bodies import TextLatent, TextLatents
from sae.serve.live import LiveSAE
from sae.serve.refusals import Refused
from sae.subject.hooks import capture
from sae.subject.text import token_bytes

Check = Callable[[], None]
"""Raises when nobody waits for the result any more."""
BLOCK_ELEMENTS = 1 << 24
"""Pre-activations computed at once (64 MiB of float32)."""
REMEMBERED_TEXTS = 32
LISTED_LATENTS = 100
"""Latents of a whole text that are listed, largest sum first."""


def text_latents(live: LiveSAE, asked: TextLatents, check: Check) -> dict[str, Any]:
    """The answer to POST api/latents.

    Raises: Refused (422) when the text is longer than the context.
    """
    ids = tokenize(live, asked.text)
    check()
    row, latent, value = (column.numpy() for column in _encoded(live, ids))
    starts = np.searchsorted(row, np.arange(len(ids) + 1))
    tokens = show_ids(live, ids)
    for token, start, end in zip(tokens, starts[:-1], starts[1:], strict=True):
        order = np.lexsort((latent[start:end], -value[start:end]))[: asked.top] + start
        token |= {
            "n": int(end - start),
            "total": _number(value[start:end].sum()),
            "top": [[int(latent[i]), short(value[i])] for i in order],
        }
    return {"sae": asked.sae, "tokens": tokens, "latents": _totals(latent, value), "max_tokens": live.max_tokens}


def text_latent(live: LiveSAE, asked: TextLatent, check: Check) -> dict[str, Any]:
    """The answer to POST api/latent.

    Raises: Refused (404) when the SAE has no such latent, (422) when the text is longer than the context.
    """
    check_latent(live, asked.latent, "body.latent")
    ids = tokenize(live, asked.text)
    check()
    found = _encoded(live, ids)
    here = found.latent == asked.latent
    values = torch.zeros(len(ids), dtype=found.value.dtype)
    values[found.row[here]] = found.value[here]
    return {
        "sae": asked.sae,
        "latent": asked.latent,
        "tokens": show_ids(live, ids),
        "values": [short(value) for value in values.numpy()],
    }


def tokenize(live: LiveSAE, text: str, where: str = "body.text") -> tuple[int, ...]:
    """Token ids as the corpus has them: the separator first, and text that spells a special token stays text.

    Raises: Refused (422) when there is no token, or there are more than the context takes.
    """
    encoded = live.subject.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    ids = (*([] if live.separator is None else [live.separator]), *encoded["input_ids"])
    if not ids:
        raise Refused(422, "there is no token in it", where, "Send some text")
    if len(ids) > live.max_tokens:
        raise Refused(422, f"{len(ids)} tokens, the context takes {live.max_tokens}", where, "Send a shorter text")
    return ids


def show_ids(live: LiveSAE, ids: tuple[int, ...]) -> list[dict[str, Any]]:
    """Tokens as the page shows them: id, segments, and whether the SAE was trained on activations of this token."""
    segments = show_tokens(token_bytes(live.subject.tokenizer, ids))
    return [
        {"id": token, "shown": shown, "seen": token not in live.left_out.token_ids}
        for token, shown in zip(ids, segments, strict=True)
    ]


def seen(live: LiveSAE, ids: tuple[int, ...] | list[int]) -> Tensor:
    """Which tokens the SAE was trained on, but where the model puts an attention sink. [T] bool"""
    return torch.tensor([token not in live.left_out.token_ids for token in ids])


def check_latent(live: LiveSAE, latent: int, where: str) -> None:
    """Raises: Refused (404) when the SAE has no such latent."""
    if latent >= live.sae.d_sae:
        raise Refused(404, f"no latent {str(latent)[:20]}", where, f"Choose one from 0 to {live.sae.d_sae - 1}")


@functools.lru_cache(maxsize=REMEMBERED_TEXTS)
def _encoded(live: LiveSAE, ids: tuple[int, ...]) -> SparseLatents:
    """The positive latents of every token that the SAE was trained on; rows are positions."""
    with torch.no_grad(), capture(live.subject.model, [live.hook_point]) as read:
        act = read(torch.tensor([ids]))[live.hook_point][0].float()
        kept = torch.nonzero(seen(live, ids) & live.left_out.is_within(act))[:, 0]
        step = max(1, BLOCK_ELEMENTS // live.sae.d_sae)
        pieces = []
        for start in range(0, len(kept), step):
            rows = kept[start : start + step]
            piece = live.sae.encode_sparse(act[rows])
            pieces.append(piece._replace(row=rows[piece.row]))
    if not pieces:
        return SparseLatents(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0))
    return SparseLatents(*(torch.cat(columns) for columns in zip(*pieces, strict=True)))


def _totals(latent: np.ndarray, value: np.ndarray) -> list[dict[str, Any]]:
    """Sum, maximum and number of tokens of the latents with the largest sums."""
    found, place = np.unique(latent, return_inverse=True)
    sums = np.bincount(place, weights=value, minlength=len(found))
    n_tokens = np.bincount(place, minlength=len(found))
    maxima = np.zeros(len(found), value.dtype)
    np.maximum.at(maxima, place, value)
    return [
        {"latent": int(found[i]), "total": _number(sums[i]), "n_tokens": int(n_tokens[i]), "max": short(maxima[i])}
        for i in np.lexsort((found, -sums))[:LISTED_LATENTS]
    ]


def _number(value: Any) -> float:
    return float(f"{value:.7g}")
