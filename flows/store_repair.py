"""Computing again what is damaged, through the flows that made it; records stay as they are."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flows.stages import FOLDER_STAGES, STAGES, Stage
from sae.errors import DamagedError

if TYPE_CHECKING:
    from sae.plan import PipelineConfig, Plan
    from sae.store.storage.filesystem import Storage
    from sae.store.upkeep.verify import Target


def plan_targets(storage: "Storage", plan: "Plan") -> "list[Target]":
    """Every commit record that a plan's artefacts have in the root, in the order in which they are made."""
    from sae.store.upkeep.verify import targets_of

    found = (targets_of(storage, spec.ref) for spec in plan.specs())
    return list(dict.fromkeys(itertools.chain.from_iterable(found)))


def repair(config: "PipelineConfig", damaged: "Sequence[Target]") -> None:
    """Run the stages that hold damage, each alone; what they make is compared with the records.

    Raises: StoreError when other bytes come out; nothing stored is changed then. DamagedError when an input is damaged
        that is not among `damaged`.
    """
    from flows.repair import address
    from flows.server import call_flow, prefect_server

    damaged_in: dict[Stage, list[str]] = {}
    for target in damaged:
        damaged_in.setdefault(FOLDER_STAGES[target.ref.partition("/")[0]], []).append(address(target.ref, target.part))
    waiting = [stage for stage in STAGES if stage in damaged_in]
    with prefect_server():
        while waiting:
            # Subject and tokens need something of each other: a stage whose input is still damaged comes again.
            again: list[Stage] = []
            for stage in waiting:
                try:
                    call_flow("run", config, only=stage, repair=tuple(damaged_in[stage]))
                except DamagedError:
                    again.append(stage)
                    if len(again) == len(waiting):
                        raise
            waiting = again
