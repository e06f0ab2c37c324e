"""Activations to SAEs."""

from collections.abc import Sequence

from prefect import task

from sae.store.storage.filesystem import Storage
from sae.train import loop
from sae.train.config import SAESpec, TrainingLog
from tasks.caching import TASK_OPTIONS, Job, is_stored, produce
from tasks.gang import GangConfig


@task(task_run_name="train-sae-{specs[0].fingerprint}", **TASK_OPTIONS)
def train_sae(
    specs: Sequence[SAESpec],
    job: Job,
    checkpoint_every_steps: int,
    logs: Sequence[TrainingLog] = (),
    gang: GangConfig | None = None,
) -> list[str]:
    """Train the SAEs of a sweep from one read of their activations; those in the store already are left out."""
    storage = Storage(job.root)
    missing = [spec for spec in specs if job.recompute or not is_stored(storage, [spec])]
    arguments = {"specs": missing, "checkpoint_every_steps": checkpoint_every_steps, "logs": logs}
    return produce(job, specs, loop.train_saes, arguments, bar="sae: training", gang=gang)
