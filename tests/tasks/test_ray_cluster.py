"""What a Ray cluster is asked for and refused, as far as that needs no Ray."""

import copy
import logging
import sys
from pathlib import Path

import pytest

from flows.cli import main
from flows.stages import STAGES
from sae.errors import ConfigError, DamagedError
from sae.pipeline_config import ExecutionConfig, RayConfig, RayRequests
from tasks import ray_worker
from tasks.ray_cluster import check_prefect_server, check_runner
from tasks.ray_requests import check_requests, count_places

MACHINES = {"10.0.0.1": {"CPU": 16.0, "GPU": 4.0}, "10.0.0.2": {"CPU": 64.0}}


def asking(**requests: dict[str, float]) -> RayConfig:
    return RayConfig.model_validate({"address": "local", "requests": requests})


def test_every_stage_has_a_request_of_its_own() -> None:
    assert tuple(RayRequests.model_fields) == STAGES


@pytest.mark.parametrize(
    ("stage", "request_", "fits"),
    [
        ("sae", {"num_cpus": 16, "num_gpus": 4}, True),
        ("sae", {"num_cpus": 1, "num_gpus": 0.25}, True),
        ("statistics", {"num_cpus": 64}, True),
        ("sae", {"num_cpus": 1, "num_gpus": 5}, False),
        ("sae", {"num_cpus": 32, "num_gpus": 1}, False),  # no single machine has both
        ("statistics", {"num_cpus": 80}, False),  # both together have them
    ],
)
def test_what_no_machine_can_have_is_refused(stage: str, request_: dict[str, float], fits: bool) -> None:
    config = asking(**{stage: request_})
    if fits:
        check_requests(config, STAGES, MACHINES)
        return
    with pytest.raises(ConfigError, match=rf"requests\.{stage}: no machine .* \(10\.0\.0\.1 has 16 CPUs and 4 GPUs"):
        check_requests(config, STAGES, MACHINES)
    check_requests(config, [other for other in STAGES if other != stage], MACHINES)


@pytest.mark.parametrize(
    ("request_", "n_ranks", "complaint"),
    [
        ({"num_cpus": 4, "num_gpus": 1}, 4, None),
        ({"num_cpus": 4, "num_gpus": 1}, 5, "has places for 4 processes with 4 CPUs and 1 GPUs each, and 5 share"),
        ({"num_cpus": 10}, 7, None),  # one on the first machine and six on the second
        ({"num_cpus": 10}, 8, "has places for 7 processes with 10 CPUs and 0 GPUs each, and 8 share"),
        ({"num_cpus": 80}, 2, "no machine .* can have 80 CPUs and 0 GPUs for one of the 2 processes that share a task"),
    ],
)
def test_a_gang_may_have_several_machines_but_a_rank_has_one(
    request_: dict[str, float], n_ranks: int, complaint: str | None
) -> None:
    config = asking(sae=request_)
    assert (count_places(config.requests.sae, MACHINES) >= n_ranks) == (complaint is None)
    if complaint is None:
        check_requests(config, STAGES, MACHINES, {"sae": n_ranks})
        return
    with pytest.raises(ConfigError, match=rf"requests\.sae: .*{complaint}"):
        check_requests(config, STAGES, MACHINES, {"sae": n_ranks})
    check_requests(config, ["statistics"], MACHINES, {"sae": n_ranks})


def test_gpus_that_nobody_asks_for_are_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tasks.ray_requests"):
        check_requests(asking(sae={"num_gpus": 1}), STAGES, MACHINES)
        assert not caplog.records
        check_requests(asking(), STAGES, MACHINES)
    assert "has 4 GPUs and no task asks for one" in caplog.text


@pytest.mark.parametrize("missing", ["ray", "prefect_ray", "grpc"])
def test_without_the_extra_one_line_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    execution = ExecutionConfig(runner="ray", ray=RayConfig(address="local"))
    with pytest.raises(ConfigError, match=r"pip install 'sae-pipeline\[ray\]'"):
        check_runner(execution)
    check_runner(ExecutionConfig(ray=RayConfig(address="local")))  # nothing asks for it


def test_the_command_line_says_so_before_it_starts_anything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "prefect_ray", None)
    settings = ["--set", "execution.runner=ray", "--set", "execution.ray.address=local"]
    assert main(["run", "superposition", "--root", str(tmp_path), *settings]) == 2
    err = capsys.readouterr().err
    assert "pip install 'sae-pipeline[ray]'" in err
    assert "starting a Prefect server" not in err


@pytest.mark.parametrize(
    ("url", "address", "reached"),
    [
        ("http://127.0.0.1:4200/api", "10.0.0.1:6379", False),
        ("http://localhost:4200/api", "10.0.0.1:6379", False),
        ("http://[::1]:4200/api", "head:6379", False),
        ("http://10.0.0.9:4200/api", "10.0.0.1:6379", True),
        ("http://127.0.0.1:4200/api", "127.0.0.1:6379", True),
    ],
)
def test_tasks_elsewhere_need_a_prefect_server_that_they_reach(url: str, address: str, reached: bool) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: url}):
        if reached:
            check_prefect_server(address)
        else:
            with pytest.raises(ConfigError, match=r"execution\.ray\.address: .* set PREFECT_API_URL"):
                check_prefect_server(address)


def test_a_machine_with_other_code_or_another_root_is_told_apart() -> None:
    here = ray_worker.facts(__file__)
    assert ray_worker.differing(here, ray_worker.facts(__file__)) == ""
    assert ray_worker.differing(here, ray_worker.facts(f"{__file__}.not-there")) == "the folder of execution.root"
    other = here | {"torch": "1.0", "the code of sae-pipeline": "00000000"}
    assert "torch (1.0, here " in ray_worker.differing(here, other)
    assert "the code of sae-pipeline (00000000, here " in ray_worker.differing(here, other)


def test_what_is_damaged_is_known_on_the_other_side_of_a_process() -> None:
    error = copy.copy(DamagedError("gone", "parts/0123456789abcdef", 3))  # made anew, as processes do it
    assert (type(error), str(error), error.ref, error.part) == (DamagedError, "gone", "parts/0123456789abcdef", 3)
