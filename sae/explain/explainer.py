"""Whoever explains: the interface, and what every implementation of it raises."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from sae.errors import PipelineError

Messages = list[dict[str, str]]
"""A conversation: {"role": "user" or "assistant", "content": text}, user first and last."""


class Answer(NamedTuple):
    """What a model said, and what it cost."""

    text: str
    model: str | None = None
    """What the model calls itself, where that is told."""
    prompt_tokens: int | None = None
    """None: not told."""
    completion_tokens: int | None = None


class NoAnswer(PipelineError):
    """One request got no answer, for good. Its latent is recorded with this as the reason; the run goes on."""

    def __init__(self, message: str, *, outage: bool) -> None:
        super().__init__(message)
        self.outage = outage
        """Whether it may be the server's state rather than this request."""


class Explainer(Protocol):
    """A model that answers. Called by several threads at once where it says that it can."""

    n_at_once: int
    """Calls that may run at the same time."""

    def complete(self, messages: Messages, *, max_tokens: int, seed: int) -> Answer:
        """The model's next message.

        Raises:
            NoAnswer: this request failed for good.
            InputError: no request can succeed: a wrong key, an unknown model, a model that cannot be loaded.
            TransientError: nobody is there to ask.
        """

    def close(self) -> None:
        """Let go of connections; calls that still wait end with NoAnswer."""


def add_tokens(counts: Sequence[int | None]) -> int | None:
    """The sum of token counts; None where one was not told."""
    return None if any(count is None for count in counts) else sum(count or 0 for count in counts)
