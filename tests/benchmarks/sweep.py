"""A sweep of eight SAEs from one read, against one of them and against eight runs of their own; from a local store."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sae.architectures.config import TopKConfig
from sae.config import Spec
from sae.store.artefacts import records
from sae.store.storage.filesystem import Storage
from sae.train.config import SAESpec, TrainConfig
from sae.train.loop import train_saes
from tests.benchmarks.timing import Row, compare
from tests.conftest import write_snapshot

D_IN, BATCH_ROWS, N_STEPS, N_PAIRS = 512, 2048, 4, 3
WIDTHS, SPARSITIES, SEEDS = (512, 2048), (16, 32), (0, 1)


def sweep(folder: Path) -> Iterator[Row]:
    """SAEs/s of the loop with its commits, two widths x two sparsities x two seeds."""
    storage = Storage(str(folder))
    rng = np.random.default_rng(0)
    n_rows = BATCH_ROWS * N_STEPS
    parts = [np.maximum(rng.standard_normal((n_rows // 2, D_IN)), 0).astype(np.float16) for _ in range(2)]
    snapshot = write_snapshot(storage, parts, row_group_rows=1024)
    specs = [
        SAESpec(
            config=TrainConfig(sae=TopKConfig(d_sae=d_sae, k=k), batch_rows=BATCH_ROWS, seed=seed),
            snapshot=snapshot.ref,
            order_seed=0,
        )
        for d_sae in WIDTHS
        for k in SPARSITIES
        for seed in SEEDS
    ]

    def together(some: Sequence[SAESpec] = specs) -> None:
        _forget(storage, some)
        train_saes(storage, some, checkpoint_every_steps=0)

    def apart() -> None:
        for spec in specs:
            together([spec])

    what = f"of {len(specs)} SAEs (d_in {D_IN}, {N_STEPS} steps of {BATCH_ROWS})"
    yield compare(f"sweep {what} / runs of their own", together, apart, len(specs), "SAEs", n_pairs=N_PAIRS)
    for spec in (specs[0], specs[-1]):
        sae = spec.config.sae
        name = f"{sae.architecture} d_sae {sae.d_sae} alone / sweep {what}"
        yield compare(name, lambda spec=spec: together([spec]), together, 1, "runs", n_pairs=N_PAIRS)


def _forget(storage: Storage, specs: Sequence[Spec]) -> None:
    """Take away the records, so that every call commits for the first time."""
    for spec in specs:
        if records.read_record(storage, spec.ref) is not None:
            storage.remove(f"{spec.ref}/record.json")
