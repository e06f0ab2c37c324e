"""When a task counts as done: its artefacts' commit records are in the store, and the files they name.

Prefect's result cache is a fast path on top, keyed by the same fingerprints. It is never asked alone: a task is
submitted with `refresh_cache` whenever the store lacks an artefact, so the cache cannot claim what is not there, and
deleting it loses nothing.
"""

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import Field

from sae.config import DeviceChoice, FrozenConfig, Spec, digest
from sae.errors import TransientError
from sae.progress import silent
from sae.store import layout
from sae.store.artefacts.records import is_intact, require_record
from sae.store.snapshots.part_sets import finished_parts
from sae.store.storage.filesystem import Storage
from tasks.gang import GangConfig, run_gang
from tasks.process import run_in_worker
from tasks.progress import show_progress
from tasks.retries import is_retryable

logger = logging.getLogger(__name__)


class Job(FrozenConfig):
    """Where and how one task runs; nothing in it changes what the task makes, but for rounding."""

    root: str
    recompute: bool = False
    """Do the work although the store holds its artefacts: the bytes must come out the same."""
    threads: int | None = None
    """Torch threads. None: the worker's default."""
    device: DeviceChoice = "cpu"
    """What it computes on."""
    limit_seconds: float | None = Field(None, gt=0)
    """Wall-clock limit of one attempt."""


def fingerprint_key(context: Any, parameters: dict[str, Any]) -> str:
    """Prefect's `cache_key_fn`: task name, root, specs and parts; never attempts, threads, devices or times."""
    specs = parameters.get("specs") or [parameters["spec"]]
    root = Storage(parameters["job"].root).root  # `runs` and its absolute path are one root
    identity = [root, [spec.ref for spec in specs], parameters.get("part"), parameters.get("parts")]
    return f"{context.task.name}-{digest(identity)}"


TASK_OPTIONS: dict[str, Any] = {
    "cache_key_fn": fingerprint_key,
    "retry_condition_fn": is_retryable,
    "persist_result": True,
    "result_serializer": "json",
}
"""What every task shares. Results are small JSON: the URIs of commit records."""


def is_stored(storage: Storage, specs: Sequence[Spec], part: int | None = None) -> bool:
    """Whether every artefact (or that part of it) is committed, and its files are there with the recorded sizes."""
    return all(
        is_intact(storage, spec.ref, part) and (not spec.parts_at_once or has_all_parts(storage, spec.ref))
        for spec in specs
    )


def has_all_parts(storage: Storage, ref: str) -> bool:
    """Whether all parts are stored of a part set whose record is there."""
    n_parts = int(require_record(storage, ref).metrics["n_parts"])
    return bool(finished_parts(storage, ref, n_parts).all())


def produce(
    job: Job,
    specs: Sequence[Spec],
    function: Callable[..., Any],
    arguments: dict[str, Any],
    *,
    part: int | None = None,
    parts: Sequence[range] | None = None,
    bar: str | None = None,
    gang: GangConfig | None = None,
) -> list[str]:
    """Call `function(storage, **arguments)` in a worker process unless the store holds its artefacts already.

    Args:
        function: makes and commits the artefacts of `specs`.
        part: for work on one part of the artefacts.
        parts: for work on many; of each artefact its own.
        bar: title of the progress bar; None shows none.
        gang: processes that share the call; None: one worker.

    Returns: the URIs of the commit records.
    """
    storage = Storage(job.root)
    of_each: Sequence[Sequence[int | None]] = parts or [[part]] * len(specs)
    made = [(spec, number) for spec, numbers in zip(specs, of_each, strict=True) for number in numbers]
    if job.recompute or not all(is_stored(storage, [spec], number) for spec, number in made):
        with show_progress(bar) if bar else contextlib.nullcontext(silent) as progress:
            limit: dict[str, Any] = {"limit_seconds": job.limit_seconds, "progress": progress}
            if gang is None:
                run_in_worker(function, job.root, arguments, threads=job.threads, device=job.device, **limit)
            else:
                try:
                    run_gang(function, job.root, arguments, gang, **limit)
                except TransientError as err:
                    if job.recompute or not all(is_stored(storage, [spec], number) for spec, number in made):
                        raise
                    logger.warning("all was committed before this: %s", err)
    return [storage.uri(layout.record_path(spec.ref, number)) for spec, number in made]
