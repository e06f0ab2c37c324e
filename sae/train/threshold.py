"""The one threshold of a BatchTopK SAE, calibrated once after training.

Bussmann et al. 2024 take the expectation over batches of the smallest value that is kept. Libraries track that as a
running mean during training, from a start that is not it, of weights that still move; and even exact it does not give
rows k latents on average, as that smallest value varies with the batch. Here the threshold is the one quantile at
which the finished SAE does: of the pre-activations of all rows of a sample together, k per row exceed it.
"""

import logging
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae.architectures.batch_topk import BatchTopKSAE
from sae.train.collectives import ALONE, Collectives
from sae.train.rows import RowSource

logger = logging.getLogger(__name__)

CALIBRATION_ROWS = 1 << 18
"""At most: with 32 latents on an average row, the mean over as many rows is sure to about .1."""
BLOCK_ELEMENTS = 1 << 24
"""Pre-activations held at once: 64 MiB."""
RULE = "k positive latents per row on average"


class Calibration(NamedTuple):
    """What a threshold was calibrated on, and what it gives there."""

    threshold: float
    l0: float
    """Positive latents per row by the inference rule: k, or fewer where fewer pre-activations are positive."""
    n_rows: int
    split: str
    """heldout, or train where nothing is held out."""

    def metrics(self) -> dict[str, Any]:
        """For the commit record."""
        return {
            "threshold": self.threshold,
            "threshold_rule": RULE,
            "threshold_l0": self.l0,
            "threshold_n_rows": self.n_rows,
            "threshold_split": self.split,
        }


@torch.no_grad()
def calibrate(
    sae: BatchTopKSAE, rows: RowSource, n_rows: int = CALIBRATION_ROWS, shared: Collectives = ALONE
) -> Calibration:
    """Set the threshold of a trained SAE so that rows have k positive latents on average, and say what was done.

    Devices that share an SAE each look at their own latents, on their own share of the rows.

    Args:
        rows: in the units that the SAE takes; at most `n_rows` of those held out are looked at.
    """
    sample = rows.heldout(n_rows, "threshold")
    own = (batch[shared.data_rank :: shared.n_data] for batch in sample.batches)
    largest = largest_values(_pre_acts(sae, own), sae.config.k * sample.n_rows + 1)
    threshold, n_above = _cut(largest, sae.config.k * sample.n_rows, shared)
    sae.threshold.fill_(threshold)
    l0 = n_above / sample.n_rows
    if l0 < sae.config.k:
        logger.warning(
            "a row has %.4g positive pre-activations on average, fewer than k = %d: the threshold is 0. "
            "Train longer, or lower k.",
            l0,
            sae.config.k,
        )
    return Calibration(float(sae.threshold), l0, sample.n_rows, sample.split)


def largest_values(blocks: Iterable[Tensor], n: int) -> Tensor:
    """The n largest positive values of a stream, or all if there are fewer, in descending order. 1-D

    Holds at most 2 n values, and those of one block that exceed what the n largest so far have in common.
    """
    pool: list[Tensor] = []
    n_held, bound = 0, 0.0
    for block in blocks:
        pool.append(block[block > bound])
        n_held += len(pool[-1])
        if n_held > 2 * n:
            kept = torch.cat(pool).topk(n, sorted=False).values
            pool, n_held, bound = [kept], n, float(kept.min())
    values = torch.cat(pool) if pool else torch.empty(0)
    return values.topk(min(n, len(values))).values


def _pre_acts(sae: BatchTopKSAE, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    block_rows = max(1, BLOCK_ELEMENTS // sae.d_sae)
    for batch in batches:
        for x in batch.to(sae.W_enc).split(block_rows):
            yield sae.pre_acts(x)


def _cut(largest: Tensor, n: int, shared: Collectives = ALONE) -> tuple[float, int]:
    """A threshold that the n largest of these values exceed and the others do not, and how many do.

    Half way to the next value where there is a number between the two, so that products rounded otherwise (in batches
    of another size) fall on the same sides. Equal values are all left out when they are more than fit.
    """
    last, following = shared.nth_largest_of_batch(largest, n), shared.nth_largest_of_batch(largest, n + 1)
    if last is None or following is None:
        return 0.0, int(shared.sum_all(torch.tensor(len(largest))))
    between = (last + following) / 2
    threshold = between if bool(between < last) else following
    return float(threshold), int(shared.sum_all((largest > threshold).sum()))
