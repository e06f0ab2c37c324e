"""What tasks and the ranks of gangs ask a Ray cluster for, and whether its machines can have that."""

import logging
from collections.abc import Mapping, Sequence

from sae.errors import ConfigError
from sae.pipeline_config import RayConfig, RayRequest

logger = logging.getLogger(__name__)

Machines = Mapping[str, Mapping[str, float]]
"""By name, what each has in all, idle or not."""


def bundle(request: RayRequest) -> dict[str, float]:
    """A request in Ray's words."""
    return {"CPU": float(request.num_cpus)} | ({"GPU": request.num_gpus} if request.num_gpus else {})


def told(request: RayRequest) -> str:
    """A request in a sentence."""
    return amount(bundle(request))


def amount(resources: Mapping[str, float]) -> str:
    """What a machine or a cluster has, in a sentence."""
    return f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"


def count_places(request: RayRequest, machines: Machines) -> int:
    """How many of whoever asks for this the machines can have at once."""
    wanted = bundle(request)
    return sum(
        int(min(has.get(name, 0.0) / amount_of_it + 1e-9 for name, amount_of_it in wanted.items()))
        for has in machines.values()
    )


def check_requests(
    config: RayConfig, stages: Sequence[str], machines: Machines, n_ranks: Mapping[str, int] | None = None
) -> None:
    """Raises: ConfigError when the machines can never have what a task of a stage asks for, or all ranks of a gang.

    Args:
        n_ranks: processes that share a task, by stage; the request is of each then. One where nothing is said.
    """
    for stage in stages:
        request: RayRequest = getattr(config.requests, stage)
        places, n = count_places(request, machines), (n_ranks or {}).get(stage, 1)
        if places >= n:
            continue
        there = ", ".join(f"{name} has {amount(has)}" for name, has in list(machines.items())[:8])
        if places == 0:
            whom = "one task" if n == 1 else f"one of the {n} processes that share a task (execution.mesh)"
            wrong = f"no machine of the Ray cluster at {config.address} can have {told(request)} for {whom}"
        else:
            wrong = (
                f"the Ray cluster at {config.address} has places for {places} processes with {told(request)} each, and "
                f"{n} share a task (execution.mesh)"
            )
        raise ConfigError(f"execution.ray.requests.{stage}: {wrong} ({there}). Ask for less, or add machines first.")
    n_gpus = sum(has.get("GPU", 0.0) for has in machines.values())
    if n_gpus and not any(getattr(config.requests, stage).num_gpus for stage in stages):
        logger.warning(
            "the Ray cluster has %g GPUs and no task asks for one, so none is used: execution.ray.requests", n_gpus
        )
