"""A part on its way from the model to its file: which rows it holds, and the memory that they are put in."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.errors import InputError
from sae.extract.config import PartsSpec
from sae.extract.filters import fill_gaps, norm_limit
from sae.philox import philox
from sae.store.part.encoding import FLOAT16_CEILING, Encoding, choose_encoding, encode_as
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
    starts: np.ndarray
    """Rows before each context, and the end. [n + 1] int64"""
    destination: np.ndarray
    """Where each row is stored, in the order of the tokens. [rows] int64"""
    identity: np.ndarray
    """seq, pos and token of the rows, in stored order. [3, rows] int32"""
    counts: dict[str, int]
    """n_contexts, and what was left out: n_padding, n_special."""

    def __len__(self) -> int:
        return len(self.destination)


class FinishedPart(NamedTuple):
    """What is written."""

    act: np.ndarray
    """Stored values, in stored order: the buffer's memory, or a copy. [rows, d_in] of `stored_dtype`"""
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
    starts = np.zeros(len(contexts) + 1, np.int64)
    np.cumsum(keep.sum(axis=1), out=starts[1:])
    n_rows, n_present = int(starts[-1]), int(present.sum())
    if n_rows == 0:
        raise InputError(
            f"{spec.ref}, part {part}: all its {contexts.tokens.size} tokens are special or padding. Raise "
            f"activations.part_bytes, or set activations.keep_special."
        )
    destination = philox("rows", spec.seed, part, spec.tokens, spec.split).permutation(n_rows)
    identity = np.empty((3, n_rows), np.int32)
    positions = np.arange(keep.shape[1], dtype=np.int32)
    for row, values in zip(identity, (contexts.seq[:, None], positions, contexts.tokens), strict=True):
        row[destination] = np.broadcast_to(values, keep.shape)[keep]
    counts = {
        "n_contexts": len(contexts),
        "n_special": n_present - n_rows,
        "n_padding": keep.size - n_present,
    }
    return PartRows(contexts, keep, starts, destination, identity, counts)


class Filling:
    """One part of one hook point, while the model runs over its contexts.

    Args:
        buffer: memory for the rows, at least as many as there are. [rows or more, d_in] of BUFFERS[dtype]
    """

    def __init__(self, spec: PartsSpec, part: int, rows: PartRows, buffer: Tensor) -> None:
        self.spec, self.part, self.rows = spec, part, rows
        self._buffer = buffer[: len(rows)]
        self._encoding = Encoding(dtype="float32" if spec.dtype == "int8" else spec.dtype)
        self._norms = np.empty(len(rows), np.float32)

    def put(self, act: Tensor, first: int) -> None:
        """Put the activations of some contexts where their rows are stored.

        Args:
            act: on any device. [contexts, T, d_in]
            first: number of the first context, within the part.

        Raises: InputError naming hook point, context and position for activations that are not finite, or too large
            for the dtype.
        """
        contexts = slice(first, first + len(act))
        keep = self.rows.keep[contexts]
        place = self.rows.destination[self.rows.starts[contexts.start] : self.rows.starts[contexts.stop]]
        stored = self._cast(act)
        norms = torch.linalg.vector_norm(act.flatten(0, 1), dim=1, dtype=torch.float32).cpu()
        if not self._fits(norms, stored):
            self._make_fit(act, keep, self.rows.contexts.seq[contexts])
            stored = self._cast(act)
        chosen = slice(None) if keep.all() else np.flatnonzero(keep)
        _as_items(self._buffer)[place] = _as_items(stored)[chosen]
        self._norms[place] = norms.numpy()[chosen]

    def finish(self) -> FinishedPart:
        """Leave out the attention sinks, and encode. The part is full."""
        identity, n_rows = self.rows.identity, len(self.rows)
        limit = norm_limit(self._norms, self.spec.max_norm_multiple)
        sinks = np.flatnonzero(self._norms > limit) if limit is not None else np.empty(0, np.int64)
        if len(sinks):
            gaps, fillers = fill_gaps(n_rows, sinks)
            n_rows -= len(sinks)
            items = _as_items(self._buffer)
            items[gaps] = items[fillers]
            identity = identity.copy()  # that of the other hook points too
            identity[:, gaps] = identity[:, fillers]
            identity = identity[:, :n_rows]
        values, encoding = self._buffer[:n_rows], self._encoding
        if self.spec.dtype == "int8":
            encoding = choose_encoding("int8", *torch.aminmax(values, dim=0))
            act = encode_as(values, encoding)
        else:
            act = (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()
        metrics = self.rows.counts | {"n_sink": len(self.rows) - n_rows, "norm_limit": limit}
        return FinishedPart(act, identity, encoding, metrics)

    def _cast(self, act: Tensor) -> Tensor:
        """Activations as the buffer holds them. [contexts * T, d_in], contiguous, on the CPU"""
        flat = act.flatten(0, 1)
        if self._encoding.exponent:
            flat = flat.float() * 2.0**-self._encoding.exponent
        return flat.to(self._buffer.dtype).contiguous().cpu()

    def _fits(self, norms: Tensor, stored: Tensor) -> bool:
        """Whether all values, of rows that are left out too, are finite and below the ceiling."""
        largest = FLOAT16_CEILING if stored.dtype == torch.float16 else torch.finfo(stored.dtype).max
        # No value is larger than its row's norm, which is at hand; NaN in either, and no comparison holds.
        if norms.max().item() <= largest:
            return True
        low, high = torch.aminmax(stored)
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


def _as_items(rows: Tensor) -> np.ndarray:
    """Rows as one item each, so that they are copied whole: three times as fast as index_copy_. [rows] of void"""
    items = rows.view(torch.uint8).numpy()
    return items.view(f"V{items.shape[1]}")[:, 0]
