"""Runs on a mesh end with the weights of one process, also after a stop, on the same mesh and on another."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.sae.train import mesh_runs
from tests.sae.train.mesh_runs import HOPS, SHAPES, STOP_AT, Shape
from tests.sae.train.ranks import run_ranks


class _Trained:
    """What ranks found in roots of a folder, and one process."""

    def __init__(self, world: int, folder: Path) -> None:
        self._folder = folder
        mesh_runs.new_root(folder / "alone")
        for name in ["torn", "damaged", "late", *map(str, SHAPES[world]), *(f"{of} to {to}" for of, to in HOPS[world])]:
            shutil.copytree(folder / "alone", folder / name)
        self.alone = mesh_runs.train(folder / "alone")
        for of, to in HOPS[world]:
            if of is None:
                mesh_runs.train(folder / f"{of} to {to}", stop=True)
        self._found = run_ranks(world, mesh_runs.all_runs, folder)

    def of(self, title: str) -> dict[str, Tensor]:
        """What all ranks found, the same bits."""
        names = [f"{title}: {name}" for name in self.alone]
        for of_rank in self._found:
            assert all(torch.equal(of_rank[name], self._found[0][name]) for name in names)
        return {name: self._found[0][f"{title}: {name}"] for name in self.alone}

    def by_rank(self, name: str) -> list[Tensor]:
        return [of_rank[name] for of_rank in self._found]

    def go_on_alone(self, of: Shape) -> dict[str, Tensor]:
        return mesh_runs.train(self._folder / f"{of} to None")


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> _Trained:
    return _Trained(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> _Trained:
    return _Trained(4, tmp_path_factory.mktemp("four"))


def _assert_equal(found: dict[str, Tensor], alone: dict[str, Tensor], first_step: int) -> None:
    for name, expected in alone.items():
        if name == "first step":
            assert int(found[name]) == first_step
        else:
            torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-12, msg=name)


def _check_hop(trained: _Trained, of: Shape | None, to: Shape | None) -> None:
    found = trained.of(f"{of} to {to}") if to else trained.go_on_alone(of)
    _assert_equal(found, trained.alone, first_step=STOP_AT + 1)
    if of == to:
        whole = trained.of(f"{of}")
        assert all(torch.equal(tensor, whole[name]) for name, tensor in found.items() if name != "first step")


@pytest.mark.parametrize("shape", SHAPES[2], ids=str)
def test_two_ranks_end_as_one(shape: Shape, of_two: _Trained) -> None:
    _assert_equal(of_two.of(f"{shape}"), of_two.alone, first_step=1)


def test_rows_are_read_once_on_a_host(of_two: _Trained) -> None:
    """By the first of the ranks that need them; where each needs others, each reads its own."""
    assert [n > 0 for n in of_two.by_rank("(1, 2): bytes read")] == [True, False]
    assert [n > 0 for n in of_two.by_rank("(2, 1): bytes read")] == [True, True]


@pytest.mark.parametrize(("of", "to"), HOPS[2], ids=str)
def test_two_ranks_that_are_stopped_go_on(of: Shape | None, to: Shape | None, of_two: _Trained) -> None:
    """One of them is asked to stop; the same mesh goes on to the same bits, another to rounding."""
    _check_hop(of_two, of, to)


def test_a_save_that_was_torn_never_happened(of_two: _Trained) -> None:
    _assert_equal(of_two.of("torn"), of_two.alone, first_step=5)


def test_a_checkpoint_waits_for_the_last_rank_and_training_does_not(of_two: _Trained) -> None:
    found, whole = of_two.of("late"), of_two.of(f"{SHAPES[2][0]}")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in found.items())


def test_a_damaged_part_is_passed_over_by_all_ranks(of_two: _Trained) -> None:
    _assert_equal(of_two.of("damaged"), of_two.alone, first_step=9)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES[4], ids=str)
def test_four_ranks_end_as_one(shape: Shape, of_four: _Trained) -> None:
    _assert_equal(of_four.of(f"{shape}"), of_four.alone, first_step=1)


@pytest.mark.slow
@pytest.mark.parametrize(("of", "to"), HOPS[4], ids=str)
def test_four_ranks_that_are_stopped_go_on(of: Shape | None, to: Shape | None, of_four: _Trained) -> None:
    _check_hop(of_four, of, to)
