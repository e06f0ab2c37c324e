"""The controls against plain reconstructions of the same rows."""

import numpy as np
import pytest
import torch

from sae.evaluate.controls import (
    Coordinates,
    RandomDictionary,
    control_figures,
    k_of,
    make_controls,
    measure_controls,
    principal_directions,
    random_directions,
)
from sae.store.snapshots.snapshot import read_snapshot


@pytest.fixture
def rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator)
    return torch.randn(200, 6, generator=generator) @ mixing + 3


@pytest.fixture
def given(make_given_world, rows: torch.Tensor):
    """The rows as a store."""
    world = make_given_world(rows.numpy())
    return world.storage, read_snapshot(world.storage, world.snapshots["train"])


@pytest.mark.parametrize(("l0", "k"), [(0.0, 1), (0.3, 1), (24.0, 24), (24.0 + 1e-12, 24), (24.01, 25)])
def test_sparsity_is_that_of_the_sae_rounded_up(l0: float, k: int) -> None:
    assert k_of(l0) == k


def test_neurons_keep_the_dimensions_farthest_from_the_mean() -> None:
    control = Coordinates(torch.tensor([1.0, 1.0, 1.0]), k=1)
    code = control.code(torch.tensor([[1.5, 4.0, 0.0], [1.0, 2.0, -5.0]]))
    assert code.x_hat.tolist() == [[1, 4, 1], [1, 1, -5]]
    assert code.unit.tolist() == [[2], [5]], "the two sides of a coordinate are units of their own"
    assert code.value.tolist() == [[3], [6]]


def test_principal_directions_are_the_singular_vectors_in_order(given, rows: torch.Tensor) -> None:
    basis = principal_directions(*given).double()
    centred = rows.double() - rows.double().mean(dim=0)
    _, _, expected = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close((basis.T @ expected.T).abs(), torch.eye(6).double(), atol=1e-4, rtol=0)
    few = principal_directions(*given, max_rows=50)
    assert few.shape == (6, 6)
    assert not torch.allclose(few.abs(), basis.float().abs(), atol=1e-3)


def test_all_coordinates_together_reconstruct_everything(given) -> None:
    storage, snapshot = given
    controls = make_controls(storage, snapshot, l0=99.0, d_sae=20, seed=0)
    found = control_figures(measure_controls(storage, controls, snapshot, max_rows=1000), 99.0)
    assert found["fvu"]["pca"] == pytest.approx(0, abs=1e-8)
    assert found["fvu"]["neurons"] == pytest.approx(0, abs=1e-8)
    assert found["n_rows"] == 200


def test_error_of_every_control_equals_a_plain_loop(given) -> None:
    storage, snapshot = given
    controls = make_controls(storage, snapshot, l0=2.0, d_sae=20, seed=3)
    found = measure_controls(storage, controls, snapshot, max_rows=1000, keep_rows=150)
    from sae.store.reading.blocks import iter_rows

    x = np.concatenate([block.act.astype(np.float64) for block in iter_rows(storage, snapshot)])
    centred = x - x.mean(axis=0)
    basis = principal_directions(storage, snapshot).double().numpy()
    directions = random_directions(20, 6, 3).double().numpy()
    errors = {"neurons": 0.0, "pca": 0.0, "random": 0.0}
    fired = []
    for row in centred:
        for name, coordinates in (("neurons", row), ("pca", basis.T @ row)):
            kept = np.argsort(-np.abs(coordinates))[:2]
            errors[name] += (row @ row) - (coordinates[kept] ** 2).sum()
        products = directions @ row
        chosen = np.argsort(-products)[:2]
        written = np.maximum(products[chosen], 0) @ directions[chosen]
        errors["random"] += ((row - (row @ written) / (written @ written) * written) ** 2).sum()
        fired.append({(int(unit), round(float(products[unit]), 3)) for unit in chosen if products[unit] > 0})
    for name, error in errors.items():
        assert found.squared_error[name] == pytest.approx(error, rel=1e-4)
    assert found.squared_deviation == pytest.approx((centred**2).sum(), rel=1e-6)
    unit, row, value = found.firings["random"]
    for i in range(150):
        mine = row == i
        assert {(int(u), round(float(v), 3)) for u, v in zip(unit[mine], value[mine], strict=True)} == fired[i]
    assert row.max() == 149
    assert (np.diff(row) >= 0).all()


def test_random_directions_are_unit_vectors_of_their_seed() -> None:
    directions = random_directions(500, 8, 0)
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(500))
    assert torch.equal(directions, random_directions(500, 8, 0))
    assert not torch.equal(directions, random_directions(500, 8, 1))
    assert directions.mean(dim=0).norm() < 0.1


def test_a_row_at_the_mean_is_reconstructed_as_the_mean() -> None:
    mean = torch.ones(4)
    code = RandomDictionary(mean, k=2, n_units=5, seed=0).code(mean[None])
    assert code.x_hat.tolist() == [[1, 1, 1, 1]]


def test_a_hook_point_that_is_too_wide_has_no_principal_components(given, monkeypatch) -> None:
    from sae.evaluate import controls

    storage, snapshot = given
    monkeypatch.setattr(controls, "MAX_PCA_WIDTH", 5)
    made = make_controls(storage, snapshot, l0=1.0, d_sae=4, seed=0)
    assert list(made) == ["neurons", "random"]
    figures = control_figures(measure_controls(storage, made, snapshot, 10), 1.0)
    assert figures["fvu"]["pca"] is None
    assert figures["n_rows"] == 10
