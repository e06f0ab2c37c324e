"""Which device a process computes on. GPUs are counted and tried for real where there are some."""

import platform

import pytest
import torch

from sae import device
from sae.device import CPU, check_gpus, choose_device, choose_rank_device
from sae.errors import ConfigError, TransientError


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "count_gpus", lambda: 4)
    monkeypatch.setattr(device, "_try", lambda device: None)


@pytest.mark.without_gpu
def test_auto_is_the_cpu_where_there_is_no_gpu() -> None:
    assert choose_device("auto", 3) == choose_rank_device("auto", 5, 8) == CPU
    check_gpus("auto", 8)


@pytest.mark.without_gpu
def test_a_gpu_that_is_wanted_and_not_there_is_one_clear_error() -> None:
    message = rf"^execution\.device: cuda is wanted, and no GPU can be used on {platform.node()} \(torch .*"
    for choose in (lambda: choose_device("cuda"), lambda: check_gpus("cuda"), lambda: choose_rank_device("cuda", 0, 1)):
        with pytest.raises(ConfigError, match=message):
            choose()


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_workers_take_gpus_in_turn_and_ranks_the_one_of_their_number(wanted) -> None:
    assert [choose_device(wanted, number).index for number in range(6)] == [0, 1, 2, 3, 0, 1]
    assert [choose_rank_device(wanted, rank, 4) for rank in range(4)] == [torch.device("cuda", i) for i in range(4)]
    assert choose_device("cpu", 1) == choose_rank_device("cpu", 1, 8) == CPU


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_more_ranks_on_a_machine_than_gpus_are_refused(wanted) -> None:
    message = rf"execution\.mesh: 5 processes on {platform.node()}, which has 4 GPUs for them, and each needs its own\."
    with pytest.raises(ConfigError, match=message):
        check_gpus(wanted, 5)
    with pytest.raises(ConfigError, match=message):
        choose_rank_device(wanted, 0, 5)
    check_gpus(wanted, 4)
    check_gpus("cpu", 5)


@pytest.mark.usefixtures("four_gpus")
def test_a_gpu_that_does_not_work_is_told_of_and_passed_over_or_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(device: torch.device) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    monkeypatch.setattr(device, "_try", fail)
    assert choose_device("auto", 1) == CPU
    assert "GPU 1 of" in caplog.text
    assert "no kernel image is available for execution on the device. The CPU computes instead" in caplog.text
    with pytest.raises(ConfigError, match=r"execution\.device: GPU 1 of .* does not work: CUDA error: no kernel"):
        choose_device("cuda", 1)


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_a_gpu_that_is_full_is_waited_for(wanted, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    monkeypatch.setattr(device, "_try", fail)
    with pytest.raises(TransientError, match=r"GPU 2 of .* out of memory.*lower execution\.max_workers"):
        choose_device(wanted, 2)


@pytest.mark.gpu
def test_a_gpu_is_found_and_works() -> None:
    assert choose_device("auto").type == choose_device("cuda").type == "cuda"
    assert choose_rank_device("auto", 0, 1) == torch.device("cuda", 0)
