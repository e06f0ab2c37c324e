"""The training rows of a hook point mixed over all parts: deal every part, gather every bucket, tidy up."""

import random

from prefect import Task

from flows.run import Run
from sae.config import Spec
from sae.errors import StoreError
from sae.extract.config import DealtPartsSpec, RemixSpec
from sae.extract.remix import count_parts, remove_dealt
from sae.store.snapshots.part_sets import finished_parts
from sae.store.snapshots.snapshot import SnapshotSpec
from tasks import extract as tasks


def remix(run: Run, hook_point: str, spec: RemixSpec, snapshot: SnapshotSpec) -> None:
    """Commit a remix and its snapshot, and delete the dealt parts. The snapshot of its source must be there."""
    if not run.has_all_parts("activations", spec):
        try:
            _deal_and_gather(run, hook_point, spec)
        except StoreError:
            # Another run that works on the same has finished it, and deleted what this one was reading?
            if not run.has_all_parts("activations", spec):
                raise
    run.do("activations", tasks.finish_remix, [spec])
    run.do("activations", tasks.commit_snapshot, [snapshot])
    # Also what a run that was killed just after its commit has left.
    remove_dealt(run.storage, spec)


def _deal_and_gather(run: Run, hook_point: str, spec: RemixSpec) -> None:
    dealt = DealtPartsSpec(remix=spec)
    n_source, n_parts = count_parts(run.storage, spec)
    _each_part(run, f"remix of {hook_point}: deal", tasks.deal_part, dealt, n_source)
    run.do("activations", tasks.finish_dealing, [dealt])
    _each_part(run, f"remix of {hook_point}: gather", tasks.gather_part, spec, n_parts)


def _each_part(run: Run, title: str, task: Task[..., list[str]], spec: Spec, n_parts: int) -> None:
    jobs = [([spec], part) for part in range(n_parts)]
    random.shuffle(jobs)  # runs on several machines then rarely begin with the same part
    run.fan_out("activations", title, task, jobs, {spec.ref: finished_parts(run.storage, spec.ref, n_parts)})
