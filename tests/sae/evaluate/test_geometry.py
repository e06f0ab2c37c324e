"""Figures of dictionaries whose geometry is known."""

import math

import numpy as np
import pytest
import torch

from sae.architectures import StandardConfig, build_sae
from sae.evaluate import geometry
from sae.evaluate.controls import random_directions
from sae.evaluate.geometry import decoder_geometry, directions_figures


def test_orthogonal_directions_fill_their_dimensions_and_have_no_neighbours() -> None:
    found = directions_figures(torch.diag(torch.tensor([1.0, 5.0, 0.2])), np.arange(3))
    assert found == {
        "mean_max_cosine": 0,
        "duplicate_share": 0,
        "participation_ratio": pytest.approx(3),
    }


def test_a_repeated_direction_is_a_duplicate_whatever_its_norm() -> None:
    W = torch.tensor([[1.0, 0, 0], [3.0, 0, 0], [0, 1, 0], [0, 1, 1]])
    found = directions_figures(W, np.arange(4))
    assert found["duplicate_share"] == 0.5
    assert found["mean_max_cosine"] == pytest.approx((1 + 1 + 2 * math.sqrt(0.5)) / 4)


def test_directions_on_a_line_span_one_dimension() -> None:
    assert directions_figures(torch.ones(5, 3), np.arange(5))["participation_ratio"] == pytest.approx(1)
    assert directions_figures(torch.ones(2, 7), np.arange(2))["participation_ratio"] == pytest.approx(1)


def test_participation_ratio_equals_its_definition_over_eigenvalues() -> None:
    for shape in ((40, 7), (7, 40)):
        W = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.arange(1, shape[1] + 1)
        unit = torch.nn.functional.normalize(W.double(), dim=1)
        eigenvalues = torch.linalg.eigvalsh(unit.T @ unit)
        expected = float(eigenvalues.sum() ** 2 / eigenvalues.square().sum())
        assert directions_figures(W, np.arange(3))["participation_ratio"] == pytest.approx(expected, rel=1e-5)


def test_a_random_decoder_is_as_its_control_and_a_tied_encoder_has_cosine_one(monkeypatch) -> None:
    monkeypatch.setattr(geometry, "MAX_COMPARED", 100)
    sae = build_sae(StandardConfig(d_sae=300, l1_coefficient=0), 16)
    with torch.no_grad():
        sae.W_dec.copy_(2 * random_directions(300, 16, 5))
        sae.W_enc.copy_(sae.W_dec / 3)
    found = decoder_geometry(sae, 0)
    assert found["n_compared"] == 100
    for name in ("mean_max_cosine", "participation_ratio"):
        assert found["decoder"][name] == pytest.approx(found["random"][name], rel=0.1)
    assert found["encoder_decoder_cosine"] == pytest.approx(1)
    assert (found["norm_min"], found["norm_max"]) == pytest.approx((2, 2), rel=1e-6)


def test_one_latent_has_no_neighbour() -> None:
    found = directions_figures(torch.ones(1, 3), np.arange(1))
    assert math.isnan(found["mean_max_cosine"])
    assert found["duplicate_share"] is None
