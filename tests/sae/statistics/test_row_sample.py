"""Sampled rows and the latents that fire together on them."""

import itertools

import numpy as np
import pytest

from sae.statistics import row_sample
from sae.statistics.firings import Block, Rows
from sae.statistics.kept import row_numbers
from sae.statistics.row_sample import MIN_TOGETHER, RowSample, coactivation

D_SAE = 9


def make_block(fires: np.ndarray, first: int = 0, seed: int = 0) -> Block:
    """Rows `first` and on; fires: [n_rows, d_sae] bool."""
    place = np.arange(first, first + len(fires))
    nothing = np.zeros(len(fires), np.int32)
    rows = Rows(place, nothing, place, nothing, nothing, nothing.astype(np.uint8))
    row, latent = np.nonzero(fires)
    value = np.random.default_rng(seed).random(len(row), np.float32) + np.float32(0.1)
    return Block(rows, row, latent.astype(np.int32), value)


def fires_of(n_rows: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    fires = rng.random((n_rows, D_SAE)) < 0.1
    fires[:, 4] = fires[:, 2] | (rng.random(n_rows) < 0.02)
    fires[:, 8] = False
    return fires


def sample(share: float, blocks: list[Block]) -> row_sample.SampledRows:
    collected = RowSample(share)
    for block in blocks:
        collected.add(block, row_numbers(5, block.rows))
    return collected.read()


def test_the_sample_has_the_wanted_share_and_all_latents_of_its_rows() -> None:
    fires = fires_of(4000)
    sampled = sample(0.25, [make_block(fires)])
    n_rows = len(sampled.rows.context)
    assert abs(n_rows - 1000) < 5 * np.sqrt(4000 * 0.25 * 0.75)
    for i, place in enumerate(sampled.rows.context):
        mine = slice(*sampled.offsets[i : i + 2])
        assert sorted(sampled.latent[mine].tolist()) == np.flatnonzero(fires[place]).tolist()
        assert (np.diff(sampled.value[mine]) <= 0).all()


def test_two_saes_sample_the_same_rows() -> None:
    a, b = sample(0.3, [make_block(fires_of(500))]), sample(0.3, [make_block(~fires_of(500))])
    assert a.rows.context.tolist() == b.rows.context.tolist()
    assert len(sample(1.0, [make_block(fires_of(500))]).rows.context) == 500
    assert len(sample(0.0, [make_block(fires_of(500))]).rows.context) == 0


def test_blocks_in_any_order_give_the_sample_of_the_whole() -> None:
    fires = fires_of(600)
    whole = sample(0.5, [make_block(fires)])
    pieces = [make_block(fires[start : start + 200], start) for start in (400, 0, 200)]
    split = sample(0.5, pieces)
    assert split.rows.context.tolist() == whole.rows.context.tolist()
    assert split.offsets.tolist() == whole.offsets.tolist()
    for i in range(len(whole.rows.context)):
        mine = slice(*whole.offsets[i : i + 2])
        assert sorted(split.latent[mine]) == sorted(whole.latent[mine])


@pytest.mark.parametrize("block_pairs", [row_sample.BLOCK_PAIRS, 600])
def test_coactivation_equals_counting_by_hand(monkeypatch: pytest.MonkeyPatch, block_pairs: int) -> None:
    monkeypatch.setattr(row_sample, "BLOCK_PAIRS", block_pairs)  # 600: one latent, one row at a time
    fires = fires_of(400)
    found = coactivation(sample(1.0, [make_block(fires)]), D_SAE, 3)
    for latent in range(D_SAE):
        pairs = []
        for other in set(range(D_SAE)) - {latent}:
            both = int((fires[:, latent] & fires[:, other]).sum())
            if both >= MIN_TOGETHER:
                lift = both * 400 / (fires[:, latent].sum() * fires[:, other].sum())
                pairs.append((-lift, -both, other, both / fires[:, latent].sum()))
        mine = found.latent == latent
        expected = sorted(pairs)[:3]
        assert found.other[mine].tolist() == [other for _, _, other, _ in expected]
        np.testing.assert_allclose(found.lift[mine], [-lift for lift, _, _, _ in expected])
        np.testing.assert_allclose(found.share[mine], [share for _, _, _, share in expected])
    assert found.other[found.latent == 2][0] == 4


def test_rows_with_very_many_latents_keep_the_strongest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_sample, "MAX_LATENTS_PER_ROW", 3)
    block = make_block(np.ones((20, D_SAE), bool))
    sampled = sample(1.0, [block])
    assert np.diff(sampled.offsets).tolist() == [3] * 20
    for i, (start, end) in enumerate(itertools.pairwise(sampled.offsets)):
        strongest = np.sort(block.value[block.row == i])[::-1][:3]
        assert sampled.value[start:end].tolist() == strongest.tolist()


def test_no_rows_have_no_pairs() -> None:
    found = coactivation(sample(0.0, []), D_SAE, 3)
    assert len(found.latent) == 0
