"""Which activations the model keeps when something else takes the place of the stored ones."""

from typing import Any

import pytest
import torch

from sae.config import Spec
from sae.extract.config import GivenPartsSpec, InlineSource, PartsSpec, RemixSpec
from sae.store.artefacts.records import commit
from sae.store.snapshots.snapshot import SnapshotSpec
from sae.store.storage.filesystem import Storage
from sae.store.text.left_out import NOTHING, LeftOut, read_left_out

NOWHERE = "0" * 16


def put(storage: Storage, spec: Spec, metrics: dict[str, Any], part: int | None = None) -> str:
    with storage.staging() as folder:
        return commit(storage, spec, folder, metrics, seconds=0, part=part).ref


@pytest.mark.parametrize(("multiple", "limit"), [(None, None), (10.0, 33.5)])
def test_rules_are_those_of_the_set_that_the_rows_come_from(
    storage: Storage, multiple: float | None, limit: float | None
) -> None:
    spec = PartsSpec(
        tokens=f"tokens/{NOWHERE}",
        subject=f"subjects/{NOWHERE}",
        split="train",
        hook_point="layers.0",
        dtype="float16",
        part_bytes=1,
        row_group_bytes=1,
        batch_contexts=1,
        keep_special=False,
        max_norm_multiple=multiple,
        seed=0,
    )
    parts = put(storage, spec, {"dropped_ids": [0, 7]})
    put(storage, spec, {"norm_limit": limit}, part=0)
    assert read_left_out(storage, parts) == LeftOut((0, 7), limit)
    snapshot = put(storage, SnapshotSpec(parts=(parts,), n_tokens=None), {})
    remixed = put(storage, RemixSpec(source=snapshot, part_bytes=1, row_group_bytes=1, seed=0), {})
    assert read_left_out(storage, remixed) == LeftOut((0, 7), limit)


def test_nothing_is_left_out_of_given_activations(storage: Storage) -> None:
    spec = GivenPartsSpec(
        source=InlineSource(values=((0.0,), (1.0,))),
        content="",
        split="train",
        heldout_fraction=0,
        dtype="float32",
        part_bytes=1,
        row_group_bytes=1,
        seed=0,
    )
    assert read_left_out(storage, put(storage, spec, {})) == NOTHING


def test_norms_decide_about_activations_only_where_there_is_a_limit() -> None:
    act = torch.tensor([[3.0, 4.0], [6.0, 8.0], [float("nan"), 0.0]])
    assert LeftOut(norm_limit=5.0).is_within(act).tolist() == [True, False, False]
    assert NOTHING.is_within(act).tolist() == [True, True, True]
