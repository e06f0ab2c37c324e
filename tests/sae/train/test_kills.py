"""Training in processes of its own that are killed at random moments, in a step or while a checkpoint is written."""

import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
import pytest

from sae.architectures import BatchTopKConfig, StandardConfig, TopKConfig
from sae.config import Spec
from sae.extract.config import TokensSpec
from sae.store import layout
from sae.store.artefacts.records import commit, read_record, verify
from sae.store.snapshots.snapshot import Snapshot
from sae.store.storage.filesystem import Storage
from sae.store.text.contexts import Contexts, write_contexts
from sae.subject.config import EmbeddedLM, EmbeddedLMSpec, TokenizerSpec
from sae.train.config import SAESpec, TrainConfig

ROOT = Path(__file__).parents[3]
MakeSnapshot = Callable[..., Snapshot]
KINDS = ("topk", "batch_topk", "standard", "sweep", "subject")
"""The sweep is of topk and batch_topk, both with running means of the weights, and standard."""
N_STEPS = 30


class Child:
    """A training process, known by what it reports."""

    def __init__(self, reports: TextIO) -> None:
        self._reports = reports
        self.pid = int(reports.readline())
        self.step: int | None = None
        """The last one reported."""
        self.last_line = ""
        self._gone = False

    def wait_for(self, steps: int | None = None) -> None:
        """Return after so many more steps, or when the process is gone."""
        for line in itertools.islice(self._reports, steps):
            self.last_line = line.strip()
            if self.last_line.isdigit():
                self.step = int(line)
        self._gone |= steps is None

    def kill(self) -> None:
        if not self._gone:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.wait_for()

    def finish(self) -> None:
        self.wait_for()
        assert self.last_line == "done"


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen]:
    # One thread: children of a process with threads cannot compute. No git: it costs more than the training.
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment = os.environ | threads | {"PATH": ""}
    script = Path(__file__).with_name("killable.py")
    command = [sys.executable, "-W", "ignore", str(script)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as process:
        yield process


@pytest.fixture
def start(server: subprocess.Popen, tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """`start(storage, specs, every=1)` -> a process that trains them, with a checkpoint after so many steps."""
    with contextlib.ExitStack() as at_end:

        def begin(storage: Storage, specs: Sequence[Spec], every: int = 1) -> Child:
            reports = tmp_path / f"reports-{time.monotonic_ns()}"
            os.mkfifo(reports)
            job = {
                "reports": str(reports),
                "root": storage.root,
                "stage": specs[0].stage,
                "specs": [spec.model_dump(mode="json") for spec in specs],
                "checkpoint_every_steps": every,
            }
            server.stdin.write(json.dumps(job) + "\n")
            server.stdin.flush()
            child = Child(at_end.enter_context(open(reports)))
            at_end.callback(child.kill)
            return child

        yield begin


@pytest.fixture
def new_root(tmp_path: Path, make_snapshot: MakeSnapshot) -> Callable[[str, str], tuple[Storage, list[Spec]]]:
    """`new_root(name, kind)` -> a root with the inputs in it, and what is to be trained."""

    def make(name: str, kind: str) -> tuple[Storage, list[Spec]]:
        storage = Storage(str(tmp_path / name))
        return storage, [_subject(storage)] if kind == "subject" else _saes(storage, kind, make_snapshot)

    return make


def _saes(storage: Storage, kind: str, make_snapshot: MakeSnapshot) -> list[Spec]:
    rng = np.random.default_rng(0)
    present = rng.random((210, 12)) < 0.2
    act = (present * rng.random((210, 12))) @ rng.standard_normal((12, 6)) * 5 + 3
    snapshot = make_snapshot(storage, np.split(act.astype(np.float32), [100]), row_group_rows=20)
    topk = {"sae": TopKConfig(d_sae=16, k=2, k_aux=4), "ema_decay": 0.9, "max_grad_norm": 0.5}
    batch_topk = {"sae": BatchTopKConfig(d_sae=16, k=2, k_aux=4), "ema_decay": 0.9}
    standard = {"sae": StandardConfig(d_sae=9, l1_coefficient=0.1, decoder="free"), "init": "farthest_point"}
    configs = {
        "topk": [topk],
        "batch_topk": [batch_topk],
        "standard": [standard],
        "sweep": [topk, standard, batch_topk, topk | {"seed": 1, "n_tokens": 30 * 20}],
    }[kind]
    common = {"batch_rows": 30, "n_tokens": 30 * N_STEPS, "lr": 0.01, "auxk_after_tokens": 90}
    return [
        SAESpec(config=TrainConfig.model_validate(common | config), snapshot=snapshot.ref, order_seed=7)
        for config in configs
    ]


def _subject(storage: Storage) -> EmbeddedLMSpec:
    """A tiny model to be trained on random contexts, with inputs that are just good enough."""
    segment = "segments/0123456789abcdef"
    tokenizer = TokenizerSpec(vocab_size=300, segments=(segment,))
    tokens = TokensSpec(segment=segment, tokenizer=tokenizer.ref, context_tokens=16, packing=True, syntax=False, seed=0)
    with storage.staging() as folder:
        (folder / "tokenizer.json").write_text("{}\n")
        commit(storage, tokenizer, folder, {}, seconds=0.0)
    with storage.staging() as folder:
        for split, first, n in (("train", 0, 50), ("heldout", 50, 4)):
            seq = np.arange(first, first + n, dtype=np.int32)
            ids = np.random.default_rng(first).integers(0, 300, (n, 16), dtype=np.int32)
            write_contexts(folder / f"{split}.parquet", Contexts(seq, ids, np.zeros_like(ids), None))
        commit(storage, tokens, folder, {"vocab_size": 300}, seconds=0.0)
    config = EmbeddedLM(
        vocab_size=300, d_model=16, n_heads=2, d_mlp=32, batch_contexts=4, n_steps=N_STEPS, warmup_steps=5, lr=1e-2
    )
    return EmbeddedLMSpec(config=config, tokenizer=tokenizer.ref, tokens=tokens.ref, seed=0)


def _newest_step(storage: Storage, spec: Spec) -> int:
    """Of the checkpoints; as many as all steps once the artefact is committed."""
    if read_record(storage, spec.ref) is not None:
        return N_STEPS
    folder = layout.checkpoint_folder(spec.ref)
    names = [name for attempt in storage.list(folder) for name in storage.list(f"{folder}/{attempt}")]
    return max((int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d+)\.json", name))), default=0)


def _assert_equal_artefacts(storage: Storage, reference: Storage, specs: Sequence[Spec]) -> None:
    for spec in specs:
        record, expected = read_record(storage, spec.ref), read_record(reference, spec.ref)
        assert record is not None
        assert expected is not None
        assert (record.content, record.metrics) == (expected.content, expected.metrics)
        assert verify(storage, record) == []
        assert storage.list(layout.checkpoint_folder(spec.ref)) == []


def _kill_again_and_again(kind: str, n_kills: int, seed: int, start: Callable, new_root: Callable) -> None:
    reference, specs = new_root("reference", kind)
    start(reference, specs, every=0).finish()
    rng = random.Random(seed)
    storage, _ = new_root("killed", kind)
    known = [0] * len(specs)
    landed = 0
    for _ in range(n_kills):
        child = start(storage, [spec for spec in specs if read_record(storage, spec.ref) is None] or specs[:1])
        child.wait_for(rng.randint(1, max(1, 2 * N_STEPS // n_kills)))
        time.sleep(rng.random() * 0.02)
        child.kill()
        landed += child.last_line != "done"
        reached = [_newest_step(storage, spec) for spec in specs]
        assert all(now >= before for now, before in zip(reached, known, strict=True))
        if child.step is not None:
            # A step is reported once the subject's checkpoint counts, and when that of an SAE is begun.
            assert min(reached) >= (child.step if kind == "subject" else child.step - 1)
        known = reached
    assert landed >= n_kills // 2
    start(storage, specs).finish()
    _assert_equal_artefacts(storage, reference, specs)


@pytest.mark.parametrize("kind", ["sweep", "subject"])
def test_training_killed_at_random_moments_ends_with_the_bytes_of_an_uninterrupted_one(
    kind: str, start: Callable, new_root: Callable
) -> None:
    _kill_again_and_again(kind, 3, 0, start, new_root)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_training_killed_many_times_ends_with_the_same_bytes(kind: str, start: Callable, new_root: Callable) -> None:
    _kill_again_and_again(kind, 25, 1, start, new_root)


@pytest.mark.parametrize("kind", ["sweep", "subject"])
def test_two_processes_at_once_make_one_artefact_even_when_one_is_killed(
    kind: str, start: Callable, new_root: Callable
) -> None:
    reference, specs = new_root("reference", kind)
    start(reference, specs, every=0).finish()
    storage, _ = new_root("shared", kind)
    first, second = start(storage, specs), start(storage, specs)
    first.wait_for(10)
    first.kill()
    successor = start(storage, specs)  # while the second still trains
    second.finish()
    successor.finish()
    _assert_equal_artefacts(storage, reference, specs)
