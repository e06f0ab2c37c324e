"""Part sets made of records alone: their files hold no vectors, and nobody reads them."""

from typing import Any

import numpy as np

from sae.store.artefacts.record import Record
from sae.store.artefacts.records import commit
from sae.store.part.encoding import Encoding
from sae.store.part.writer import PartLayout, RowGroup
from sae.store.snapshots.moments import encode_vector
from sae.store.storage.filesystem import Storage
from tests.sae.store.things import ThingSpec

D_IN = 3


class PartsSpec(ThingSpec):
    """Another `size` is another part set."""


def layout_of(rng: np.random.Generator, n_groups: int, **changes: Any) -> PartLayout:
    """A layout with random places and hashes."""
    groups = [
        RowGroup(
            offset=int(rng.integers(1 << 31)),
            n_rows=int(rng.integers(1, 100)),
            xxh3=f"{int(rng.integers(1 << 63)) * 2 + 1:016x}",
            identity=tuple(rng.integers(1 << 31, size=3).tolist()),
            identity_xxh3=f"{int(rng.integers(1 << 63)):016x}",
        )
        for _ in range(n_groups)
    ]
    fields = {"n_rows": sum(group.n_rows for group in groups), "d_in": D_IN, "encoding": Encoding(dtype="float16")} | {
        "row_groups": groups
    }
    return PartLayout.model_validate(fields | changes)


def make_part(storage: Storage, spec: ThingSpec, part: int, *, version: int = 0, **changes: Any) -> Record:
    """Commit a part whose file, layout and sums are functions of set, number and version."""
    rng = np.random.default_rng([spec.size, part, version])
    layout = layout_of(rng, int(rng.integers(0, 4)), **changes)
    metrics = {
        "layout": layout.model_dump(mode="json"),
        "sum": encode_vector(rng.standard_normal(D_IN) * 10.0 ** rng.integers(-9, 9, D_IN)),
        "sum_sq": float(rng.random() * 1e9),
        "n_special": int(rng.integers(9)),
    }
    with storage.staging() as folder:
        (folder / "part.parquet").write_bytes(rng.bytes(int(rng.integers(1, 50))))
        return commit(storage, spec, folder, metrics, seconds=0.0, part=part)


def make_plan(storage: Storage, spec: ThingSpec, n_parts: int) -> None:
    """Commit the part set itself."""
    with storage.staging() as folder:
        commit(storage, spec, folder, {"n_parts": n_parts, "tokens_per_part": 10, "d_in": D_IN}, seconds=0.0)


def make_parts(storage: Storage, n_parts: int, size: int = 1) -> tuple[ThingSpec, list[Record]]:
    """A whole part set."""
    spec = PartsSpec(size=size)
    make_plan(storage, spec, n_parts)
    return spec, [make_part(storage, spec, part) for part in range(n_parts)]
