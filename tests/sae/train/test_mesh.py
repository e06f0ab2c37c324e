"""Joining a mesh; what is told in one is in test_mesh_steps.py."""

import pytest
import torch.distributed as dist

from sae.errors import ConfigError
from sae.train.collectives import ALONE
from sae.train.mesh import MeshConfig, connect


def test_a_mesh_of_one_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with connect(MeshConfig(), timeout_seconds=1) as shared:
        assert shared is ALONE
        assert not dist.is_initialized()


@pytest.mark.parametrize("started", [None, "3"])
def test_another_number_of_processes_than_the_mesh_has_places_is_refused(
    started: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if started:
        monkeypatch.setenv("WORLD_SIZE", started)
    message = f"2 x 2 needs 4 processes, {started or 1} were started"
    with pytest.raises(ConfigError, match=message), connect(MeshConfig(data=2, latents=2), timeout_seconds=1):
        pass
