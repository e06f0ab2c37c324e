"""Train the SAEs of a sweep side by side: one pass over the store, one optimizer each."""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import cast

import pyarrow.parquet as pq
import torch
from torch import Tensor

from sae.architectures import SAE
from sae.errors import ConfigError, StopRequested, TrainingError
from sae.progress import Progress, silent
from sae.store.artefacts import records
from sae.store.artefacts.checkpoints import new_attempt, remove_checkpoints
from sae.store.artefacts.records import Record
from sae.store.reading.loader import Loader
from sae.store.reading.order import Cursor
from sae.store.snapshots.snapshot import Snapshot, read_snapshot
from sae.store.storage.filesystem import Storage
from sae.train.checkpoint import begin_checkpoint, checkpoints_of, load_checkpoint, save_checkpoint
from sae.train.collectives import ALONE, Collectives
from sae.train.config import SAESpec, TrainingLog
from sae.train.curve import CURVE_FILE
from sae.train.init import SAMPLE_ROWS
from sae.train.live import live_note
from sae.train.logs import CurveLogs, check_logs
from sae.train.pretrained import load_initial
from sae.train.reading import SharedLoader
from sae.train.rows import SnapshotRows
from sae.train.run import DataMoments, TrainingRun
from sae.train.schedule import count_steps
from sae.train.shares import gather_whole
from sae.weights import save_sae

logger = logging.getLogger(__name__)


def train_saes(
    storage: Storage,
    specs: Sequence[SAESpec],
    *,
    checkpoint_every_steps: int,
    logs: Sequence[TrainingLog] = (),
    device: torch.device | str = "cpu",
    progress: Progress = silent,
    shared: Collectives = ALONE,
) -> list[Record]:
    """Train, save and commit the SAEs of `specs`, which share snapshot, batch_rows and order_seed.

    What they share is the read and the batch. Scaling the batch for each is a thousandth of a step, and one product
    with the joined encoders of eight SAEs is a tenth faster than eight at best: not worth a second way to train.

    Each SAE ends with the same bytes as when it is trained alone, stops at its own number of steps, and is committed
    as soon as it does. A run that was interrupted continues from its checkpoints, each SAE from its own.

    Processes of a mesh all call it alike. Each reads its own rows of every batch and trains its own latents; the first
    commits what all have made.

    Args:
        checkpoint_every_steps: 0 writes none. They are written while training goes on, from a copy of the state in the
            host's memory: parameters, two moments and, where there is one, a running mean.
        logs: where the curves are written as well.
        device: where the SAEs are, and their batches; of a mesh, this process's.
        progress: told of every step, with the figures of every SAE (`live_note`). It may raise StopRequested; every
            unfinished SAE then gets a checkpoint of the step it is at. On a mesh one process that is asked to stop is
            enough: all stop at the same step.
        shared: the devices that train each SAE together.

    Returns: the commit records, in the order of `specs`.
    Raises: ConfigError when the specs do not belong together, given weights do not fit, or a log needs a package;
        TrainingError when the data has no variance, or a loss is not finite or has exploded (the other SAEs are
        finished first); StoreError when the snapshot is not there or damaged; StopRequested as told by `progress`;
        what a checkpoint could not be written for, some steps after it was begun.
    """
    started = time.perf_counter()
    check_logs(logs)
    first = _check_one_sweep(specs)
    snapshot = read_snapshot(storage, first.snapshot)
    moments = DataMoments(torch.from_numpy(snapshot.mean.copy()), snapshot.mean_sq_norm, snapshot.n_rows)
    moments.check(snapshot.ref)
    sample = None
    if any(TrainingRun.wants_sample(spec.config) for spec in specs):
        sample = _first_rows(storage, snapshot, first, shared)
    attempt = shared.tell(new_attempt())
    runs = [_new_run(storage, spec, snapshot, moments, sample, device, shared) for spec in specs]
    members = [_Member(storage, spec, run, attempt, logs) for spec, run in zip(specs, runs, strict=True)]
    slowest = min(members, key=lambda member: member.run.state.step)
    step, n_steps = slowest.run.state.step, max(member.run.n_steps for member in members)

    open_loader = partial(
        Loader,
        storage,
        snapshot,
        first.config.batch_rows,
        first.order_seed,
        slowest.cursor,
        rank=shared.data_rank,
        world=shared.n_data,
        device=device,
    )
    loader = SharedLoader(open_loader, shared.same_batch, device, slowest.cursor)
    began, n_rows = time.perf_counter(), 0
    try:
        while any(member.unfinished for member in members):
            x = next(loader)
            n_rows += len(x)
            for member in members:
                if not member.is_at(step):
                    continue
                with member.keeping_its_error():
                    member.run.advance(x, loader.n_rows)
                    member.logs.write()
                    if member.run.finished:
                        member.commit(time.perf_counter() - started)
                    elif checkpoint_every_steps and member.run.state.step % checkpoint_every_steps == 0:
                        begin_checkpoint(member.checkpoints, member.run, loader.cursor)
            step += 1
            stop: StopRequested | None = None
            try:
                rows_per_second = n_rows * shared.n_data / max(time.perf_counter() - began, 1e-9)
                figures = [member.figures for member in members]
                progress(step, n_steps, "steps", live_note(figures, rows_per_second, loader.waited_seconds))
            except StopRequested as err:
                stop = err
            writing = any(member.checkpoints.writing for member in members)
            stopping, writing = shared.agree_each([stop is not None, writing])
            if not writing:
                for member in members:
                    member.checkpoints.commit()
            if stopping and any(member.unfinished for member in members):
                stop = stop or StopRequested("another rank was asked to stop")
                raise _stopped(stop, step, n_steps, members, loader.cursor, bool(checkpoint_every_steps)) from stop
    finally:
        loader.close()
        for member in members:
            member.logs.close()
            member.checkpoints.close()
    for member in members:
        if member.error is not None:
            raise member.error
    return [member.record for member in members if member.record is not None]


class _Member:
    """One SAE of a sweep, brought to its newest checkpoint.

    Attributes:
        cursor: the batch that it sees next, after a resume.
        logs: of its curve.
        record: once it is committed.
        error: once it has diverged.
    """

    def __init__(
        self, storage: Storage, spec: SAESpec, run: TrainingRun, attempt: str, logs: Sequence[TrainingLog]
    ) -> None:
        self.spec, self.run, self._storage = spec, run, storage
        self.checkpoints = checkpoints_of(storage, spec.ref, attempt, run)
        self.cursor = load_checkpoint(self.checkpoints, run)
        self.logs = CurveLogs(logs if run.shared.rank == 0 else (), spec, run.curve)
        self.record: Record | None = None
        self.error: TrainingError | None = None

    @property
    def unfinished(self) -> bool:
        return self.record is None and self.error is None

    @property
    def figures(self) -> dict[str, float]:
        """The last point of its curve; nothing once it has diverged."""
        return {} if self.error is not None else self.run.curve.last

    def is_at(self, step: int) -> bool:
        """Whether it takes part in this step; after a resume it may be ahead of the others."""
        return self.unfinished and self.run.state.step == step

    @contextlib.contextmanager
    def keeping_its_error(self) -> Iterator[None]:
        """An SAE that diverges does not stop the others: its error is raised after their end."""
        try:
            yield
        except TrainingError as err:
            self.checkpoints.commit()
            newest = self.checkpoints.newest
            kept = f"The last good checkpoint is {newest}" if newest else "There is no checkpoint before it"
            logger.error("%s: %s", self.spec.ref, err)
            self.error = TrainingError(f"{self.spec.ref} ({self.spec.config.sae!r}): {err} {kept}.")

    def commit(self, seconds: float) -> None:
        self.checkpoints.commit()  # what follows may take long, and be killed
        sae = gather_whole(self.run.result(), self.run.shared)
        self.run.shared.once(lambda: self._commit(cast(SAE, sae), seconds))
        self.record = records.require_record(self._storage, self.spec.ref)

    def _commit(self, sae: SAE, seconds: float) -> None:
        with self._storage.staging() as folder:
            save_sae(sae, folder, {"hook_name": self.spec.config.hook_point})
            pq.write_table(self.run.curve.table(), folder / CURVE_FILE)
            metrics, device = self.run.metrics(), self.run.device
            records.commit(self._storage, self.spec, folder, metrics, seconds=seconds, device=device)
        remove_checkpoints(self._storage, self.spec.ref)


def _stopped(
    err: StopRequested, step: int, n_steps: int, members: Sequence[_Member], cursor: Cursor, save: bool
) -> StopRequested:
    """Save what is unfinished. Returns: the error that says so, and what went wrong before."""
    for member in members:
        if save and member.is_at(step):
            with member.keeping_its_error():
                save_checkpoint(member.checkpoints, member.run, cursor)
    kept = "the same call goes on from there" if save else "without a checkpoint, as none were asked for"
    errors = [str(member.error) for member in members if member.error is not None]
    return StopRequested("; ".join([f"{err}: training stopped at step {step} of {n_steps}, {kept}", *errors]))


def _check_one_sweep(specs: Sequence[SAESpec]) -> SAESpec:
    if not specs:
        raise ConfigError("no SAE to train: the list of specs is empty")
    shared = [(spec.snapshot, spec.config.batch_rows, spec.order_seed) for spec in specs]
    if len(set(shared)) > 1:
        raise ConfigError(
            f"SAEs that train side by side share snapshot, batch_rows and order_seed; these are {sorted(set(shared))}. "
            f"Train them in separate calls."
        )
    if len({spec.ref for spec in specs}) < len(specs):
        raise ConfigError("the same SAE appears twice in a sweep. Remove one, or give it another seed.")
    return specs[0]


def _new_run(
    storage: Storage,
    spec: SAESpec,
    snapshot: Snapshot,
    moments: DataMoments,
    sample: Tensor | None,
    device: torch.device | str,
    shared: Collectives,
) -> TrainingRun:
    n_steps = count_steps(spec.config.n_tokens or moments.n_rows, moments.n_rows, spec.config.batch_rows)
    rows = SnapshotRows(storage, snapshot, spec.calibration, spec.config.batch_rows, spec.order_seed, device, shared)
    initial = load_initial(spec.config, storage, spec.initial)
    return TrainingRun(
        spec.config, moments, n_steps, sample, device, rows=rows, initial=initial, name=spec.ref, shared=shared
    )


def _first_rows(storage: Storage, snapshot: Snapshot, spec: SAESpec, shared: Collectives) -> Tensor:
    """The rows that training sees first: a sample of the data, as it is shuffled. [rows, d_in]"""
    open_loader = partial(Loader, storage, snapshot, spec.config.batch_rows, spec.order_seed)
    loader = SharedLoader(open_loader, shared.same_host)
    wanted = min(SAMPLE_ROWS, snapshot.n_rows)
    batches: list[Tensor] = []
    try:
        while sum(map(len, batches)) < wanted:
            batches.append(next(loader))
    finally:
        loader.close()
    return torch.cat(batches)[:wanted]
