"""A part on its way from the model to its file: which rows it holds, and the memory that they are put in."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.errors import InputError
from sae.extract.config import PartsSpec
from sae.extract.filters import fill_gaps, norm_limit
from sae.extract.stored_rows import StoredRows, bounds
from sae.philox import philox
from sae.store.part.encoding import FLOAT16_CEILING, Encoding, choose_encoding
from sae.store.text.contexts import PADDING, Contexts

BUFFERS = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.float32,  # its scale is known when all rows are there
}
"""What the rows of a part are held as until the part is full."""


@dataclass(frozen=True, eq=False)
class PartRows:
    """Which tokens make the rows of a part, and where each is stored. The same for all hook points."""

    contexts: Contexts
    keep: np.ndarray
    """Which tokens are rows. [n, T] bool"""
    order: np.ndarray
    """The token that each row is of, in stored order: context * T + position, both within the part. [rows] int64"""
    identity: np.ndarray
    """seq, pos and token of the rows, in stored order. [3, rows] int32"""
    counts: dict[str, int]
    """n_contexts, and what was left out: n_padding, n_special."""

    def __len__(self) -> int:
        return len(self.order)


class FinishedPart(NamedTuple):
    """What is written."""

    act: StoredRows
    """Stored values, in stored order; they are in the buffer's memory. [rows, d_in] of `stored_dtype`"""
    identity: np.ndarray
    """seq, pos and token. [3, rows] int32"""
    encoding: Encoding
    metrics: dict[str, Any]
    """For the record: n_contexts, and what was left out by which rule."""


def rows_of_part(spec: PartsSpec, part: int, contexts: Contexts, dropped_ids: list[int]) -> PartRows:
    """The rows of a part: every token but padding and special ones, permuted within the part.

    Args:
        contexts: those of the part.
        dropped_ids: ids of the special tokens that are left out.

    Raises: InputError when none is left.
    """
    present = contexts.docs != PADDING
    keep = present & ~np.isin(contexts.tokens, np.array(dropped_ids, np.int32))
    tokens = np.flatnonzero(keep)
    n_rows, n_present = len(tokens), int(present.sum())
    if n_rows == 0:
        raise InputError(
            f"{spec.ref}, part {part}: all its {contexts.tokens.size} tokens are special or padding. Raise "
            f"activations.part_bytes, or set activations.keep_special."
        )
    order = np.empty(n_rows, np.int64)
    order[philox("rows", spec.seed, part, spec.tokens, spec.split).permutation(n_rows)] = tokens
    context, pos = np.divmod(order, keep.shape[1])
    identity = np.empty((3, n_rows), np.int32)
    identity[:] = contexts.seq[context], pos, contexts.tokens.reshape(-1)[order]
    counts = {
        "n_contexts": len(contexts),
        "n_special": n_present - n_rows,
        "n_padding": keep.size - n_present,
    }
    return PartRows(contexts, keep, order, identity, counts)


class Filling:
    """One part of one hook point, while the model runs over its contexts.

    Activations are held as they come, those of left-out tokens too: one copy, and all of it in order. The rows are
    picked, in stored order, when they are written.

    Args:
        buffer: memory for the activations, at least as many as there are tokens. [tokens or more, d_in] of
            BUFFERS[dtype]
    """

    def __init__(self, spec: PartsSpec, part: int, rows: PartRows, buffer: Tensor) -> None:
        self.spec, self.part, self.rows = spec, part, rows
        self._buffer = buffer[: rows.keep.size]
        self._encoding = Encoding(dtype="float32" if spec.dtype == "int8" else spec.dtype)
        self._norms = np.empty(rows.keep.size, np.float32)

    def put(self, act: Tensor, first: int) -> None:
        """Hold the activations of some contexts.

        Args:
            act: on any device. [contexts, T, d_in]
            first: number of the first context, within the part.

        Raises: InputError naming hook point, context and position for activations that are not finite, or too large
            for the dtype.
        """
        contexts, n_tokens = slice(first, first + len(act)), self.rows.keep.shape[1]
        tokens = slice(contexts.start * n_tokens, contexts.stop * n_tokens)
        norms = self._hold(act, tokens)
        if not self._fits(norms, self._buffer[tokens]):
            self._make_fit(act, self.rows.keep[contexts], self.rows.contexts.seq[contexts])
            norms = self._hold(act, tokens)
        self._norms[tokens] = np.ldexp(norms.numpy(), self._encoding.exponent)

    def finish(self) -> FinishedPart:
        """Leave out the attention sinks, and choose the encoding. The part is full."""
        order, identity = self.rows.order, self.rows.identity
        norms = self._norms[order]
        limit = norm_limit(norms, self.spec.max_norm_multiple)
        sinks = np.flatnonzero(norms > limit) if limit is not None else np.empty(0, np.int64)
        if len(sinks):
            gaps, fillers = fill_gaps(len(order), sinks)
            n_rows = len(order) - len(sinks)
            order, identity = order.copy(), identity.copy()  # those of the other hook points too
            order[gaps], identity[:, gaps] = order[fillers], identity[:, fillers]
            order, identity = order[:n_rows], identity[:, :n_rows]
        encoding = self._encoding
        if self.spec.dtype == "int8":
            encoding = choose_encoding("int8", *bounds(self._buffer, order))
        metrics = self.rows.counts | {"n_sink": len(sinks), "norm_limit": limit}
        return FinishedPart(StoredRows(self._buffer, order, encoding), identity, encoding, metrics)

    def _hold(self, act: Tensor, tokens: slice) -> Tensor:
        """Put activations in the buffer, as it holds them.

        Args:
            act: [contexts, T, d_in]

        Returns: the norms of the rows that it holds now, which a cache still has. [contexts * T] float32
        """
        flat, held = act.flatten(0, 1), self._buffer[tokens]
        if self._encoding.exponent:
            flat = flat.float() * 2.0**-self._encoding.exponent
        if flat.device.type != "cpu":
            flat = flat.to(held.dtype)  # before it is moved: half as many bytes
        held.copy_(flat)
        stored = held if flat.device.type == "cpu" else flat
        return torch.linalg.vector_norm(stored, dim=1, dtype=torch.float32).cpu()

    def _fits(self, norms: Tensor, held: Tensor) -> bool:
        """Whether all values, of tokens that are left out too, are finite and below the ceiling."""
        largest = FLOAT16_CEILING if held.dtype == torch.float16 else torch.finfo(held.dtype).max
        # No value is larger than its row's norm, which is at hand; NaN in either, and no comparison holds.
        if norms.max().item() <= largest:
            return True
        low, high = torch.aminmax(held)
        return low.item() >= -largest and high.item() <= largest

    def _make_fit(self, act: Tensor, keep: np.ndarray, seq: np.ndarray) -> None:
        """Scale what is in the buffer so that float16 holds these activations too. Raises: InputError as put."""
        kept = act[torch.from_numpy(keep).to(act.device)].float().cpu()
        if len(kept) == 0:
            return
        where = f"hook point {self.spec.hook_point!r}, part {self.part}"
        context, pos = np.nonzero(keep)
        bad = (~torch.isfinite(kept)).sum(1)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise InputError(
                f"{where}, context {int(seq[context[row]])}, position {int(pos[row])}: {int(bad[row])} of "
                f"{kept.shape[1]} activations are NaN or infinite. With subject.dtype float16 the model itself "
                f"overflows: choose bfloat16 or float32."
            )
        try:
            encoding = choose_encoding(self._encoding.dtype, *torch.aminmax(kept))
        except InputError as err:
            row = int(kept.abs().amax(1).argmax())
            raise InputError(
                f"{where}, context {int(seq[context[row]])}, position {int(pos[row])}: {err}. Set activations.dtype "
                f"to float32, or choose a hook point before the value grows, such as a layer's '.mlp' output."
            ) from err
        if encoding.exponent > self._encoding.exponent:
            self._buffer.mul_(2.0 ** (self._encoding.exponent - encoding.exponent))
            self._encoding = encoding
