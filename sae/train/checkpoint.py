"""What a resumed training run needs to end with the same bytes, and how it is put back.

Weights and buffers of the SAE (a threshold, where an architecture has one), their running mean, Adam's moments, the
dead-latent clock, the curve, the step (which decides the learning rate), the library of the products and the loader's
cursor. No generator's state: nothing is drawn after the initialisation, and the order of the rows is a function of
seed and cursor.

On a mesh every device writes an equal share of what has a row for every latent, and any other mesh goes on from it.
"""

import io
import logging

import pyarrow.parquet as pq
import torch
from torch import Tensor

from sae.store.artefacts.checkpoints import Checkpoints, Position
from sae.store.artefacts.group import Rows
from sae.store.artefacts.modules import module_tensors, named_tensor, restore_module
from sae.store.reading.order import Cursor
from sae.store.storage.filesystem import Storage
from sae.train.curve import COLUMNS, CURVE_FILE
from sae.train.products import ProductLibrary
from sae.train.run import TrainingRun
from sae.train.shares import LATENT_PARAMETERS

logger = logging.getLogger(__name__)


class RunPosition(Position):
    """Where one SAE's training stands."""

    n_tokens: int
    """Rows consumed."""
    cursor: Cursor
    """The next batch to read."""
    products: ProductLibrary = "blas"
    """What made the products of the steps so far, and makes those that follow."""


def checkpoints_of(storage: Storage, ref: str, attempt: str, run: TrainingRun) -> Checkpoints[RunPosition]:
    """Those of a run: of its devices each has the rows of its own latents. ref, attempt: as for `Checkpoints`."""
    n_latents = run.config.sae.d_sae
    rows = Rows(n_latents, run.shared.latents(n_latents), _is_by_latent)
    return Checkpoints(storage, ref, RunPosition, attempt, run.shared, rows)


def begin_checkpoint(checkpoints: Checkpoints[RunPosition], run: TrainingRun, cursor: Cursor) -> None:
    """Begin to write a checkpoint of a run and, beside it, the curve so far as `metrics.parquet`.

    Args:
        cursor: the batch that the run sees next.

    Raises: TrainingError when a loss or a weight is not finite: such a state is not worth keeping; and as
        `Checkpoints.begin`.
    """
    checkpoints.begin(*_state_of(run, cursor))


def save_checkpoint(checkpoints: Checkpoints[RunPosition], run: TrainingRun, cursor: Cursor) -> None:
    """`begin_checkpoint`, and wait until it counts."""
    checkpoints.save(*_state_of(run, cursor))


def _state_of(run: TrainingRun, cursor: Cursor) -> tuple[dict[str, Tensor], RunPosition, dict[str, bytes]]:
    """Tensors, position, and what is written beside."""
    state, curve = run.state, run.curve
    run.check_finite()
    tensors = module_tensors(state.sae, state.optimizer)
    if run.average is not None:
        tensors |= {f"average.{name}": tensor for name, tensor in run.average.tensors.items()}
    tensors["tokens_since_fired"] = state.clock.tokens_since_fired
    tensors["curve.rows"] = torch.tensor(curve.rows, dtype=torch.float64).reshape(-1, len(COLUMNS))
    tensors["curve.pending"] = torch.stack(curve.pending) if curve.pending else torch.zeros(0, 4)
    position = RunPosition(step=state.step, n_tokens=state.n_tokens, cursor=cursor, products=state.products)
    table = io.BytesIO()
    pq.write_table(curve.table(), table)
    return tensors, position, {CURVE_FILE: table.getvalue()}


def load_checkpoint(checkpoints: Checkpoints[RunPosition], run: TrainingRun) -> Cursor | None:
    """Bring a new run to its newest usable checkpoint. Returns: the next batch, None when there is no checkpoint."""

    def restore(tensors: dict[str, Tensor], position: RunPosition) -> None:
        state, curve = run.state, run.curve
        clock = named_tensor(tensors, "tokens_since_fired", state.clock.tokens_since_fired)
        rows, pending = named_tensor(tensors, "curve.rows"), named_tensor(tensors, "curve.pending")
        average = run.average.tensors if run.average is not None else {}
        averaged = {name: named_tensor(tensors, f"average.{name}", tensor) for name, tensor in average.items()}
        restore_module(state.sae, state.optimizer, tensors, position.step)
        for name, tensor in average.items():
            tensor.copy_(averaged[name])
        state.clock.tokens_since_fired.copy_(clock)
        state.step, state.n_tokens = position.step, position.n_tokens
        if run.device.type == "cpu":  # a GPU asks neither
            state.products = _products_of(position, state.products)
        curve.rows = [tuple(row) for row in rows.tolist()]
        curve.pending = list(pending.to(run.device).unbind())

    position = checkpoints.load(restore)
    return position.cursor if position is not None else None


def _is_by_latent(name: str) -> bool:
    """Whether a tensor of a checkpoint has a row for every latent."""
    return name == "tokens_since_fired" or name.rpartition(".")[2] in LATENT_PARAMETERS


def _products_of(position: RunPosition, probed: ProductLibrary) -> ProductLibrary:
    """That of the checkpoint, unless it is inaccurate on the machine where the run goes on."""
    if position.products == "onednn" and probed == "blas":
        logger.warning(
            "The checkpoint of step %d was made with products by oneDNN, which are not accurate to float32 here. "
            "The run goes on with BLAS: it ends with other rounding than on the machine where it began.",
            position.step,
        )
        return probed
    return position.products
