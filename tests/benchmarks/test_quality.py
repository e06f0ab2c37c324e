"""Activation sets, what is measured on them, and what is kept of it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from sae.architectures import TopKConfig, build_sae
from sae.metrics import max_cosines
from sae.train.config import TrainConfig
from tests.benchmarks.peer_sets import ActivationSet, dictionary, given, hierarchy
from tests.benchmarks.quality import (
    Kept,
    Quality,
    chance,
    measure,
    new_run,
    qualities_of_ours,
    topk,
    train_ours,
    what_of_ours,
)

SETS = {"dictionary": dictionary, "hierarchy": hierarchy}
CONFIG = TrainConfig(sae=TopKConfig(d_sae=512, k=8))


@pytest.fixture(scope="module", params=SETS)
def data(request: pytest.FixtureRequest) -> ActivationSet:
    return SETS[request.param](2000, 500)


def test_rows_are_scaled_and_the_same_every_time(data: ActivationSet) -> None:
    again = SETS[data.name](2000, 500)
    assert torch.equal(data.train, again.train)
    assert torch.equal(data.heldout, again.heldout)
    assert len(data.train) == 2000
    assert len(data.heldout) == 500
    assert float(data.train.square().mean()) == pytest.approx(1, rel=1e-4)


def test_rows_are_made_of_the_features_alone(data: ActivationSet) -> None:
    """A row's nearest feature stands out against what random directions would show; features are unit and distinct."""
    assert data.features is not None
    torch.testing.assert_close(data.features.norm(dim=1), torch.ones(len(data.features)))
    centred = data.train - data.train.mean(dim=0)
    random = torch.randn(len(data.features), data.train.shape[1], generator=torch.Generator().manual_seed(1))
    assert max_cosines(centred, data.features).mean() > max_cosines(centred, random).mean() + 0.1


def test_more_tokens_than_rows_are_several_passes(data: ActivationSet) -> None:
    few = dataclasses.replace(data, train=data.train[:2048].repeat(2, 1)[:2048])
    once, twice = (train_ours(few, topk(512, 0, {}), n * 2048) for n in (1, 2))
    again = train_ours(dataclasses.replace(few, train=few.train.repeat(2, 1)), topk(512, 0, {}), 2 * 2048)
    assert torch.equal(twice.W_dec, again.W_dec)
    assert not torch.equal(twice.W_dec, once.W_dec)


def test_settings_reach_the_run_and_its_sae() -> None:
    config = topk(512, 1, {"lr": 0.01, "sae.k_aux": 64})
    assert (config.lr, config.sae.k_aux, config.seed, config.batch_rows) == (0.01, 64, 1, 2048)


def test_what_was_measured_is_not_trained_again(data: ActivationSet, tmp_path: Path) -> None:
    kept = Kept(tmp_path / "folder" / "kept.jsonl")
    found = [Quality(0.5, 32.0, 0.1), Quality(0.25, 32.0, 0.0, mmcs=0.5, recovered=0.75)]
    for seed, quality in enumerate(found):
        kept.add(what_of_ours(data, topk(512, seed, {"lr": 1}), 10**12), quality)
    assert list(qualities_of_ours(data, 10**12, 512, 2, {"lr": 1}, kept)) == found
    assert kept.get(what_of_ours(data, topk(512, 2, {"lr": 1}), 10**12)) is None
    assert kept.get(what_of_ours(data, topk(512, 1, {"lr": 1, "adam_betas": [0.9, 0.5]}), 10**12)) is None


@pytest.mark.parametrize("seed", range(3))
def test_our_start_is_as_far_from_the_features_as_chance(data: ActivationSet, seed: int) -> None:
    config = TrainConfig.model_validate(CONFIG.model_dump() | {"seed": seed})
    assert new_run(data, config, n_steps=1).state.step == 0


def test_a_start_at_the_features_is_noticed(data: ActivationSet) -> None:
    start = new_run(data, CONFIG, n_steps=1).state.sae.W_dec.detach()
    leaked = dataclasses.replace(data, features=start)
    with pytest.raises(AssertionError, match=r"MMCS 1\.000 at the start"):
        new_run(leaked, CONFIG, n_steps=1)


def test_chance_is_that_of_unrelated_directions(data: ActivationSet) -> None:
    assert data.features is not None
    assert 0.1 < chance(data.features, 512) < 0.3


def test_the_mean_alone_explains_nothing_and_every_latent_is_dead(data: ActivationSet) -> None:
    sae = build_sae(CONFIG.sae, data.train.shape[1]).requires_grad_(False)
    sae.b_dec.copy_(data.heldout.mean(dim=0))
    quality = measure(sae, data)
    assert quality.fvu == pytest.approx(1, abs=1e-6)
    assert quality.dead == 1
    assert quality.recovered == 0


def test_the_true_features_are_recovered_by_themselves(data: ActivationSet) -> None:
    assert data.features is not None
    sae = build_sae(TopKConfig(d_sae=len(data.features), k=24), data.train.shape[1]).requires_grad_(False)
    sae.W_dec.copy_(data.features)
    sae.W_enc.copy_(data.features)
    quality = measure(sae, data)
    assert quality.mmcs == pytest.approx(1, abs=1e-5)
    assert quality.recovered == 1


def test_given_rows_are_drawn_once_each_and_scaled_together(tmp_path: Path) -> None:
    rows = np.arange(40, dtype=np.float32).reshape(20, 2)
    np.save(tmp_path / "train.npy", rows)
    np.save(tmp_path / "heldout.npy", rows + 1)
    data = given("given", tmp_path / "train.npy", tmp_path / "heldout.npy", 12)
    assert len(np.unique(data.train[:, 0])) == 12
    scale = float(data.heldout[0, 0])
    np.testing.assert_allclose(np.sort(data.train / scale % 2, axis=1), np.tile([0, 1], (12, 1)), atol=1e-3)
    assert float(data.train.square().mean()) == pytest.approx(1, rel=1e-5)
    with pytest.raises(ValueError, match="has 20 rows, 21 are asked for"):
        given("given", tmp_path / "train.npy", tmp_path / "heldout.npy", 21)
