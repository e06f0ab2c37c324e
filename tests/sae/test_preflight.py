"""What cannot be trained in the memory of a machine, alone and with others."""

import contextlib
from typing import Any

import pytest

from sae import memory
from sae.errors import ConfigError
from sae.pipeline_config import ExecutionConfig, PipelineConfig
from sae.plan import make_plan
from sae.preflight import check_devices, check_training_memory, plan_sizes

NODES = [{"address": f"10.0.0.{number}"} for number in range(4)]


def needed(monkeypatch: pytest.MonkeyPatch, **execution: Any) -> int:
    """Bytes from which on it is not refused."""
    config = PipelineConfig.model_validate(
        {
            "activations": {
                "kind": "given",
                "sets": {"mine": {"kind": "inline", "values": [[float(i), 1.0] for i in range(64)]}},
            },
            "saes": [{"sae": {"architecture": "topk", "d_sae": 4096, "k": 2}, "batch_rows": 16}],
            "evaluation": {"untrained": None},
            "execution": execution,
        }
    )
    plan = make_plan(config)
    sizes = plan_sizes(plan)
    fits, refused = 1 << 40, 0
    while fits - refused > 1:
        middle = (fits + refused) // 2
        monkeypatch.setattr(memory, "machine_bytes", lambda middle=middle: middle)
        try:
            check_training_memory(plan, sizes)
            fits = middle
        except ConfigError:
            refused = middle
    return fits


def test_latents_that_are_shared_by_machines_need_a_share_of_the_memory_of_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = needed(monkeypatch)
    assert alone == 4096 * (16 * 2 * 2 + 2048 + 8 * 16)
    assert needed(monkeypatch, mesh={"latents": 4}) == alone, "all on this machine"
    assert needed(monkeypatch, mesh={"latents": 4}, nodes=NODES) == alone // 4
    # Each of two data ranks has all latents, and half of the rows.
    assert needed(monkeypatch, mesh={"data": 2}) == 2 * (alone - 4096 * 8 * 8)


@pytest.mark.parametrize(
    ("execution", "n_here"),
    [
        ({}, 0),
        ({"mesh": {"latents": 8}}, 8),
        ({"mesh": {"latents": 8}, "nodes": [{"address": "10.0.0.1"}, {"address": "10.0.0.2", "command": ["ssh"]}]}, 4),
        ({"mesh": {"latents": 8}, "nodes": [{"address": "10.0.0.2", "command": ["ssh"]}]}, 0),
    ],
)
def test_gpus_are_counted_for_the_processes_of_this_machine(
    execution: dict[str, Any], n_here: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae.device.count_gpus", lambda: max(1, n_here))
    check_devices(ExecutionConfig.model_validate(execution))
    monkeypatch.setattr("sae.device.count_gpus", lambda: max(1, n_here) - 1 or 1)
    with pytest.raises(ConfigError, match=rf"{n_here} processes on") if n_here > 1 else contextlib.nullcontext():
        check_devices(ExecutionConfig.model_validate(execution))
