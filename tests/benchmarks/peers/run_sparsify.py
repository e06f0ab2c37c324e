"""sparsify's own FVU: the forward pass of sparsify.SparseCoder, averaged over batches as its trainer logs it."""

from statistics import fmean
from typing import Any

import torch
from given import Given, report
from sparsify import SparseCoder

MICRO_BATCHES = 4


@torch.no_grad()
def measure(given: Given) -> dict[str, Any]:
    coder = SparseCoder.load_from_disk(given.folder / "sparsify")
    rows = {}
    for batching, sizes in given.rows_per_batch.items():
        rows[batching] = {"fvu": fmean(coder(x).fvu.item() for x in given.x.split(sizes))}
    # trainer.py, Trainer.fit: every micro-batch gets the variance of the whole batch, and the sum is divided by their
    # number as if each had its own.
    variance = (given.x - given.x.mean(0)).pow(2).sum()
    chunks = given.x.chunk(MICRO_BATCHES)
    logged = sum(coder(x, total_variance=variance).fvu.item() / len(chunks) for x in chunks)
    return {"rows": rows, "micro_batches": len(chunks), "micro_batches_fvu": logged}


if __name__ == "__main__":
    report("eai-sparsify", measure)
