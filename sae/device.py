"""Which device computes: the CPU, or a GPU by CUDA (`execution.device`).

A GPU is looked for in the process that does the work, because another machine, and on a cluster another task, sees
other ones. What it computes equals the CPU's results up to rounding, so no address depends on the device; commit
records say which one it was.
"""

import gc
import logging
import platform

import torch

from sae.config import DeviceChoice
from sae.errors import ConfigError, TransientError

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")


def choose_device(wanted: DeviceChoice, number: int = 0) -> torch.device:
    """The device that this process computes on.

    Args:
        number: of this process among those of this machine that compute. They take its GPUs in turn.

    Returns: for `auto` a GPU that works, else the CPU.
    Raises: ConfigError when `cuda` is wanted and none works; TransientError when it has no memory left.
    """
    n_gpus = count_gpus() if wanted != "cpu" else 0
    if not n_gpus:
        if wanted == "cuda":
            raise ConfigError(_without_gpu())
        return CPU
    device = torch.device("cuda", number % n_gpus)
    try:
        _try(device)
    except RuntimeError as err:
        what = f"GPU {device.index} of {platform.node()} does not work: {str(err).splitlines()[0]}"
        if "out of memory" in str(err):
            raise TransientError(f"{what}. Wait for who has its memory, or lower execution.max_workers") from err
        if wanted == "cuda":
            raise ConfigError(f"execution.device: {what}") from err
        logger.warning("%s. The CPU computes instead (execution.device)", what)
        return CPU
    return device


def choose_rank_device(wanted: DeviceChoice, local_rank: int, n_local: int) -> torch.device:
    """The device of one process of a mesh: on each machine every one has a GPU of its own, or none has.

    Args:
        local_rank: number of the process on its machine.
        n_local: processes on that machine.

    Raises: as `choose_device`, and ConfigError when there are fewer GPUs than processes.
    """
    if wanted != "cpu":
        check_gpus(wanted, n_local)
    return choose_device(wanted, local_rank)


def check_gpus(wanted: DeviceChoice, n_ranks: int = 0) -> None:
    """What can be known to be wrong on this machine before anything is computed. Starts nothing on a GPU.

    Args:
        n_ranks: processes of a mesh on this machine.

    Raises: ConfigError when `cuda` is wanted and there is none, or a mesh has more processes here than there are GPUs.
    """
    if wanted == "cpu":
        return
    n_gpus = count_gpus()
    if not n_gpus and wanted == "cuda":
        raise ConfigError(_without_gpu())
    if 0 < n_gpus < n_ranks:
        raise ConfigError(
            f"execution.mesh: {n_ranks} processes on {platform.node()}, which has {n_gpus} GPU{'s' * (n_gpus > 1)} for "
            f"them, and each needs its own. Make the mesh smaller, spread it over more nodes, or set execution.device "
            f"to cpu."
        )


def count_gpus() -> int:
    """GPUs that torch sees here; CUDA_VISIBLE_DEVICES hides others."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def prepare(device: torch.device) -> None:
    """Make a device this thread's, and have torch compute on it so that the same work gives the same bits.

    Where torch has no such way it warns. On the CPU nothing needs to be asked for.
    """
    on_gpu = device.type == "cuda"
    torch.use_deterministic_algorithms(on_gpu, warn_only=True)
    # Nothing reads memory that was not written; to fill it first would take as long again.
    torch.utils.deterministic.fill_uninitialized_memory = not on_gpu  # type: ignore[attr-defined]
    if on_gpu:
        torch.cuda.set_device(device)


def release_memory() -> None:
    """Give back what torch keeps of a GPU's memory for later: other processes may need it."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def wait_for(device: torch.device | str) -> None:
    """Until a GPU has done what it was told. For whoever measures time."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _try(device: torch.device) -> None:
    """Compute something: a GPU that torch has no code for is seen like any other."""
    torch.ones(1, device=device).add_(1).item()


def _without_gpu() -> str:
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} is built without CUDA"
    else:
        why = (
            f"torch {torch.__version__} sees none: there is none, its driver is not for CUDA {torch.version.cuda}, or "
            f"CUDA_VISIBLE_DEVICES hides it"
        )
    return (
        f"execution.device: cuda is wanted, and no GPU can be used on {platform.node()} ({why}). With auto, the CPU "
        f"computes where there is none. On a Ray cluster a task sees the GPUs that its stage asks for: "
        f"execution.ray.requests."
    )
