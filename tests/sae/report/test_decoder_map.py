"""The map of decoder directions: exact sums, equal bytes, and clusters that stay together."""

import numpy as np
import pytest

from sae.progress import silent
from sae.report import decoder_map as module
from sae.report.decoder_map import GRID, DecoderMap, decoder_map, layout, principal_components, repulsion


def clusters(n: int, n_clusters: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows about random centres, and which centre each belongs to."""
    rng = np.random.default_rng(seed)
    member = rng.integers(0, n_clusters, n)
    rows = rng.normal(size=(n_clusters, d))[member] + 0.5 * rng.normal(size=(n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), member


def nearest(points: np.ndarray, n: int) -> np.ndarray:
    distance = ((points[:, None] - points[None]) ** 2).sum(axis=-1)
    np.fill_diagonal(distance, np.inf)
    return distance.argsort(axis=1, kind="stable")[:, :n]


def drawn(rows: np.ndarray, seed: int = 0) -> DecoderMap:
    return decoder_map(rows, nearest(rows, 10), seed, silent)


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STEPS", 60)
    monkeypatch.setattr(module, "_EARLY", 30)


def test_repulsion_on_the_grid_equals_the_sum_over_pairs() -> None:
    y = np.random.default_rng(0).normal(size=(300, 2)) * 6
    q = 1 / (1 + ((y[:, None] - y[None]) ** 2).sum(axis=-1))
    np.fill_diagonal(q, 0)
    exact = ((q * q)[:, :, None] * (y[:, None] - y[None])).sum(axis=1)
    push, total = repulsion(y)
    assert abs(total - q.sum()) < 5e-3 * q.sum()
    assert np.abs(push - exact).max() < 0.05 * np.abs(exact).max()


def test_planted_clusters_stay_together_and_more_neighbours_than_in_two_components() -> None:
    rows, member = clusters(400, 20, 64)
    found = drawn(rows)
    near = nearest(found.xy.astype(np.float64), 10)
    assert (member[near] == member[:, None]).mean() > 0.9
    truth = nearest(rows, 10)
    kept = (truth[:, :, None] == near[:, None, :]).any(axis=2).mean()
    assert abs(found.kept - kept) < 0.02  # quantised coordinates tie
    by_components = nearest(principal_components(rows), 10)
    assert found.kept_by_components == (truth[:, :, None] == by_components[:, None, :]).any(axis=2).mean()
    assert found.kept > 2 * found.kept_by_components
    assert found.n_measured == 400


@pytest.mark.usefixtures("few_steps")
def test_the_same_decoder_gives_the_same_bytes() -> None:
    rows, _ = clusters(120, 6, 16)
    first, second = drawn(rows), drawn(rows.copy())
    assert first.xy.tobytes() == second.xy.tobytes()
    assert (first.kept, first.kept_by_components) == (second.kept, second.kept_by_components)


@pytest.mark.usefixtures("few_steps")
def test_coordinates_fill_the_grid_at_one_scale() -> None:
    rows, _ = clusters(150, 5, 16)
    found = drawn(rows)
    spread = found.xy.max(axis=0).astype(int) - found.xy.min(axis=0)
    assert found.xy.dtype == np.uint16
    assert spread.max() == GRID - 1
    y = layout(principal_components(rows), nearest(rows, 10), silent)
    extent = np.ptp(y, axis=0)
    np.testing.assert_allclose(spread / spread.max(), extent / extent.max(), atol=1e-3)


@pytest.mark.usefixtures("few_steps")
def test_equal_and_empty_rows_have_a_place() -> None:
    rows = np.zeros((60, 8), np.float32)
    rows[:50] = np.repeat(np.eye(5, 8, dtype=np.float32), 10, axis=0)
    found = decoder_map(rows, nearest(rows, 5), 0, silent)
    assert np.isfinite(found.xy).all()
    assert 0 <= found.kept <= 1
