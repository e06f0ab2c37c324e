"""Small stores whose rows can be recognised, read as large ones are."""

import contextlib
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from sae.store.reading import reader, shuffle
from sae.store.reading.loader import Loader


@contextlib.contextmanager
def small_stores_are_like_large_ones() -> Iterator[None]:
    """Row groups of several pieces, and runs of several rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "RUNS_PER_SHARE", 1)
        patch.setattr(reader, "PIECE_BYTES", 64)
        yield


def numbered_parts(sizes: list[int], d_in: int = 3) -> list[np.ndarray]:
    """Parts whose row r holds r in its first dimension, so a row can be recognised."""
    parts, start = [], 0
    for size in sizes:
        numbers = np.arange(start, start + size, dtype=np.float32)
        parts.append(np.stack([numbers, *[np.zeros(size, np.float32)] * (d_in - 1)], axis=1))
        start += size
    return parts


def numbers(batch: torch.Tensor) -> list[int]:
    return batch[:, 0].to(torch.int64).tolist()


def read(loader: Loader, n_batches: int) -> list[list[int]]:
    batches = [numbers(next(loader)) for _ in range(n_batches)]
    loader.close()
    return batches


def no_threads() -> bool:
    return not any(thread.name.startswith("loader") for thread in threading.enumerate())
