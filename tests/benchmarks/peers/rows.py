"""Given rows as the scripts of this folder read them, in the peers' own environment, and the timing of a pass."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

MAX_SECONDS = 10.0


class Rows:
    """rows.npy of the folder, mapped into memory: contexts one after the other. [rows, d_in] float16"""

    def __init__(self) -> None:
        self.folder = Path(sys.argv[1])
        settings = json.loads((self.folder / "settings.json").read_text())
        self.context_rows, self.batch_rows = settings["context_rows"], settings["batch_rows"]
        self.buffer_contexts = settings["buffer_contexts"]
        self.act = np.load(self.folder / "rows.npy", mmap_mode="r")
        self.n_rows, self.d_in = self.act.shape


def report(package: str, rows: Rows, batches: Callable[[], Iterator[torch.Tensor]]) -> None:
    """Print how many rows/s come after the buffer was filled once, over one pass or MAX_SECONDS."""
    iterator = batches()
    for _ in range(1 + rows.buffer_contexts * rows.context_rows // (2 * rows.batch_rows)):
        next(iterator)
    n_batches, started = 0, time.perf_counter()
    while n_batches * rows.batch_rows < rows.n_rows and time.perf_counter() - started < MAX_SECONDS:
        batch = next(iterator)
        n_batches += 1
    seconds = time.perf_counter() - started
    assert batch.shape == (rows.batch_rows, rows.d_in)
    assert batch.dtype == torch.float32
    print(json.dumps({"version": version(package), "rows_per_second": n_batches * rows.batch_rows / seconds}))
