"""Damaged artefacts are computed again: what reads one says which it is, and the flow goes through its tasks again.

The work must give the recorded bytes, which are put back under the recorded names; nothing downstream is touched.
Other bytes are an error, and so is an artefact that cannot be computed any more.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from flows.stages import FLOW_FOLDERS, Stage
from sae.errors import DamagedError, InputError, StoreError

logger = logging.getLogger(__name__)

Outcomes = list[dict[str, Any]]
Round = Callable[[tuple[str, ...], Outcomes], None]
"""Goes through a flow's tasks: given addresses to compute whatever the store says, it adds to the outcomes."""


def address(ref: str, part: int | None) -> str:
    """How an artefact, or one part of it, is named in `repair`."""
    return ref if part is None else f"{ref}/part-{part:05d}"


def run_repairing(flow: str | None, only: Stage | None, repair: Sequence[str], go: Round) -> Outcomes:
    """Go through a flow's tasks, and again for every damaged artefact that turns up.

    Args:
        flow: whose artefacts can be made here; None: all flows'.
        only: a stage that runs alone makes no other stage's artefacts.
        repair: addresses to compute again from the start.

    Returns: the outcomes of all rounds; what any round computed counts as computed.
    Raises: DamagedError when the artefact is not made here; StoreError when it cannot be restored.
    """
    repaired = tuple(repair)
    outcomes: Outcomes = []
    found: DamagedError | None = None
    while True:
        try:
            go(repaired, outcomes)
        except DamagedError as err:
            damaged = address(err.ref, err.part)
            if damaged in repaired:
                raise StoreError(f"{err} It was computed again and is still damaged.") from err
            if only is not None or (flow is not None and err.ref.partition("/")[0] not in FLOW_FOLDERS[flow]):
                raise
            logger.warning("%s Computing it again.", err)
            repaired, found = (*repaired, damaged), err
        except InputError as err:
            if found is not None:
                raise StoreError(f"{found} It cannot be computed again: {err}") from err
            raise
        else:
            return _merged(outcomes)


def _merged(outcomes: Outcomes) -> Outcomes:
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for outcome in outcomes:
        key = (outcome["task"], outcome["ref"], outcome["part"])
        if outcome["outcome"] == "computed" or key not in merged:
            merged[key] = outcome
    return list(merged.values())
