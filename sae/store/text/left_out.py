"""What extraction left out of a part set: who runs the model again must leave the same activations alone."""

from typing import NamedTuple

import torch
from torch import Tensor

from sae.store.artefacts.records import require_record
from sae.store.storage.filesystem import Storage


class LeftOut(NamedTuple):
    """Rules for rows that are not stored, beside padding."""

    token_ids: tuple[int, ...] = ()
    """Special tokens."""
    norm_limit: float | None = None
    """Rows of a larger norm (attention sinks): the limit of the first part, and about that of the others."""

    def is_within(self, act: Tensor) -> Tensor:
        """Which activations [..., d_in] have a norm that rows have. [...] bool"""
        if self.norm_limit is None:
            return torch.ones(act.shape[:-1], dtype=torch.bool, device=act.device)
        return act.float().norm(dim=-1) <= self.norm_limit


NOTHING = LeftOut()


def read_left_out(storage: Storage, ref: str) -> LeftOut:
    """What was left out of a part set, or of the one that its rows come from. Raises: StoreError when it is missing."""
    plan = require_record(storage, ref)
    while (source := plan.inputs.get("source")) is not None:
        plan = require_record(storage, require_record(storage, source).spec["parts"][0])
    filtered = plan.spec.get("max_norm_multiple") is not None
    limit = require_record(storage, plan.ref, 0).metrics["norm_limit"] if filtered else None
    return LeftOut(tuple(plan.metrics.get("dropped_ids", ())), limit)
