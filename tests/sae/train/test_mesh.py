"""Joining a mesh, and losing a rank of it; what is told in one is in test_mesh_steps.py."""

import os
import signal
import subprocess
import sys

import pytest
import torch.distributed as dist

from sae.errors import ConfigError
from sae.train.collectives import ALONE
from sae.train.mesh import MeshConfig, connect
from tests.sae.train.ranks import ROOT, environment


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


ONE_COMES_LATE = """
import os, time, torch
from sae.train.config import MeshConfig
from sae.train.mesh import connect
if os.environ["RANK"] == "1":
    time.sleep(6)
with connect(MeshConfig(latents=2), timeout_seconds=1) as shared:
    print(int(shared.sum_latents(torch.ones(1))), flush=True)
    os._exit(0)
"""


@pytest.mark.slow
def test_a_rank_may_come_later_than_a_collective_may_take() -> None:
    shared = environment(world=2)
    ranks = [_start(ONE_COMES_LATE, rank, shared) for rank in range(2)]
    try:
        assert [process.communicate(timeout=120)[0] for process in ranks] == ["2\n", "2\n"]
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


ONE_IS_LOST = """
import os, signal, torch
from sae.errors import TransientError
from sae.train.config import MeshConfig
from sae.train.mesh import connect
with connect(MeshConfig(latents=2), timeout_seconds=3) as shared:
    print(shared.collect(os.getpid())[1], flush=True)
    if shared.rank == 1:
        os.kill(os.getpid(), {signal})
    for what in (lambda: shared.sum_latents(torch.ones(3)), lambda: shared.sum_latents(torch.ones(3))):
        try:
            what()
        except TransientError as err:
            print(err, flush=True)
    os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_lost_is_worth_a_retry_for_the_others(how: signal.Signals) -> None:
    """At its first collective and at any later one."""
    shared = environment(world=2)
    ranks = [_start(ONE_IS_LOST.format(signal=int(how)), rank, shared) for rank in range(2)]
    try:
        out, _ = ranks[0].communicate(timeout=120)
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    assert out.count("rank 0 lost touch with the other ranks (sum_latents: ") == 2


DEVICES_OF_TWO_KINDS = """
import os
from sae.errors import ConfigError
from sae.train.config import MeshConfig
from sae.train.mesh import connect
try:
    with connect(MeshConfig(latents=2), 60, ("cpu", "meta")[int(os.environ["RANK"])]):
        pass
except ConfigError as err:
    print(err, flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_some_ranks_with_a_gpu_and_some_without_are_refused_by_all() -> None:
    shared = environment(world=2)
    ranks = [_start(DEVICES_OF_TWO_KINDS, rank, shared) for rank in range(2)]
    try:
        said = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all("1 of the 2 processes of the mesh found no GPU that works" in text for text in said)
    assert ["computes on cpu" in text for text in said] == [True, False]


def _start(script: str, rank: int, shared: dict[str, str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        stdout=subprocess.PIPE,
        text=True,
    )
