"""dictionary_learning's ActivationBuffer, whose refresh and draw are its own; only the model's forward is replaced.

What stands for the model hands out the given rows as the hidden states of the next contexts, from a memory map.
"""

import contextlib
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from dictionary_learning.buffer import ActivationBuffer
from rows import Rows, report

REFRESH_CONTEXTS = 512


class GivenModel:
    """A model, and its submodule, whose output is given."""

    dtype = torch.float32

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.starts = itertools.cycle(range(0, rows.n_rows, REFRESH_CONTEXTS * rows.context_rows))
        self.inputs, self.output = SimpleNamespace(save=self.mask), SimpleNamespace(save=self.hidden, stop=lambda: None)

    def trace(self, *_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
        start = next(self.starts)
        rows = self.rows.act[start : start + REFRESH_CONTEXTS * self.rows.context_rows]
        self.states = torch.from_numpy(rows.copy()).view(-1, self.rows.context_rows, self.rows.d_in)
        return contextlib.nullcontext()

    def hidden(self) -> SimpleNamespace:
        return SimpleNamespace(value=self.states)

    def mask(self) -> SimpleNamespace:
        return SimpleNamespace(value=((), {"attention_mask": torch.ones(self.states.shape[:2], dtype=torch.long)}))


def buffer(rows: Rows) -> Iterator[torch.Tensor]:
    model = GivenModel(rows)
    return ActivationBuffer(
        itertools.repeat(""),
        model,
        model,
        d_submodule=rows.d_in,
        n_ctxs=rows.buffer_contexts,
        ctx_len=rows.context_rows,
        refresh_batch_size=REFRESH_CONTEXTS,
        out_batch_size=rows.batch_rows,
    )


if __name__ == "__main__":
    given = Rows()
    report("dictionary-learning", given, lambda: buffer(given))
