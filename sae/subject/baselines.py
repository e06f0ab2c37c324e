"""What counting tokens achieves: the yardsticks beside a language model's loss."""

from typing import NamedTuple

import numpy as np

from sae.store.text.contexts import PADDING, Contexts

PRIOR_MASSES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0)


class NgramLosses(NamedTuple):
    """Held-out cross-entropy in nats per token; None without held-out or training text."""

    unigram: float | None
    bigram: float | None
    rule: str
    """How the bigram was smoothed."""


def ngram_losses(train: Contexts, heldout: Contexts, vocab_size: int) -> NgramLosses:
    """Unigram and bigram models counted on `train`, measured on the positions of `heldout` that a model predicts.

    Unigram: add-one, p(b) = (n(b) + 1) / (N + V). Bigram: interpolated with it (a Dirichlet prior of mass m),
    p(b | a) = (n(a, b) + m p(b)) / (n(a) + m), where m is the best of PRIOR_MASSES *on the held-out text*: the
    baseline at its strongest.
    """
    previous, following = _pairs(train)
    previous_heldout, following_heldout = _pairs(heldout)
    if len(following) == 0 or len(following_heldout) == 0:
        return NgramLosses(None, None, "no text to count on")
    counts = np.bincount(following, minlength=vocab_size)
    unigram = (counts + 1) / (len(following) + vocab_size)
    codes, n_pairs = np.unique(previous * vocab_size + following, return_counts=True)
    wanted = previous_heldout * vocab_size + following_heldout
    found = np.minimum(np.searchsorted(codes, wanted), len(codes) - 1)
    n_pair = np.where(codes[found] == wanted, n_pairs[found], 0)
    n_previous = np.bincount(previous, minlength=vocab_size)[previous_heldout]
    prior = unigram[following_heldout]
    bigrams = {m: -float(np.log((n_pair + m * prior) / (n_previous + m)).mean()) for m in PRIOR_MASSES}
    best = min(bigrams, key=lambda m: bigrams[m])
    rule = f"interpolated with the add-one unigram, prior mass {best:g} (best on held-out text)"
    return NgramLosses(-float(np.log(prior).mean()), bigrams[best], rule)


def _pairs(contexts: Contexts) -> tuple[np.ndarray, np.ndarray]:
    """Every token that has a next one inside its context, and that next one. Two [n] int64"""
    present = contexts.docs[:, 1:] != PADDING
    return contexts.tokens[:, :-1][present].astype(np.int64), contexts.tokens[:, 1:][present].astype(np.int64)
