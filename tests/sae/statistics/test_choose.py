"""Which firings become examples."""

import numpy as np

from sae.statistics.accumulate import LatentSums, Sizes
from sae.statistics.choose import GROUPS, choose_examples
from sae.statistics.firings import Block, Firings, Rows
from sae.statistics.quantiles import quartile_edges


def sums_of(counts: list[int]) -> LatentSums:
    """Latent i fires counts[i] times, each in its own context and document, with distinct activations."""
    rng = np.random.default_rng(0)
    latent = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    place = np.arange(len(latent))
    rows = Rows(place, place * 0, place, place * 0, place * 0, place.astype(np.uint8))
    sums = LatentSums(Sizes(len(counts), n_top=6, n_samples=32, seed=0))
    sums.add("train", Block(rows, place, latent, (rng.permutation(len(latent)) + 1).astype(np.float32)))
    return sums


def chosen(counts: list[int]) -> tuple[dict[tuple[int, str], list[float]], Firings, np.ndarray]:
    sums = sums_of(counts)
    sample = sums.sample.read()[0]
    edges = quartile_edges(sums.histogram, sums.max, sample)
    examples = choose_examples(sums.top.read()[0], sample, Firings.empty(), edges, n_per_group=3)
    found: dict[tuple[int, str], list[float]] = {}
    rows = zip(examples.firings.latent, examples.group, examples.rank, examples.firings.value, strict=True)
    last = (-1, -1, -1)
    for latent, group, rank, value in rows:
        assert (latent, group, rank) > last, "rows are sorted by latent, group and rank"
        last = (latent, group, rank)
        found.setdefault((int(latent), GROUPS[group]), []).append(float(value))
    return found, sample, edges


def test_groups_hold_firings_of_their_quarter() -> None:
    found, sample, edges = chosen([100, 20, 3, 0])
    for latent in (0, 1):
        bounds = [0, *edges[latent], np.inf]
        for i in range(4):
            group = found[latent, f"q{i}"]
            assert len(group) == 3
            assert all(bounds[i] < value <= bounds[i + 1] for value in group)
            assert set(group) <= set(sample.value[sample.latent == latent].tolist())
            assert group == sorted(group, reverse=True)


def test_near_misses_keep_their_order_and_their_latent() -> None:
    places = np.array([70, 30, 50])
    misses = Firings(np.array([0, 0, 2], np.int32), np.zeros(3, np.float32), places, places.astype(np.int32), places)
    sums = sums_of([100, 20, 3, 0])
    sample = sums.sample.read()[0]
    edges = quartile_edges(sums.histogram, sums.max, sample)
    examples = choose_examples(sums.top.read()[0], sample, misses, edges, n_per_group=3)
    miss = examples.group == GROUPS.index("miss")
    assert examples.firings.context[miss].tolist() == [70, 30, 50]
    assert examples.firings.latent[miss].tolist() == [0, 0, 2]
    assert examples.rank[miss].tolist() == [0, 1, 0]


def test_top_holds_the_strongest_in_order() -> None:
    sums = sums_of([100])
    found, _, _ = chosen([100])
    assert found[0, "top"] == [100, 99, 98, 97, 96, 95]
    assert sums.max[0] == 100


def test_rare_latents_show_all_their_firings_and_no_quarters() -> None:
    found, sample, _ = chosen([100, 20, 3, 0])
    assert (2, "q0") not in found
    assert sorted(found[2, "random"]) == sorted(sample.value[sample.latent == 2].tolist())
    assert not any(latent == 3 for latent, _ in found)


def test_random_firings_do_not_repeat_the_quarters_when_the_sample_is_large() -> None:
    found, _, _ = chosen([400])
    quarters = {value for i in range(4) for value in found[0, f"q{i}"]}
    assert len(quarters) == 12
    assert not quarters & set(found[0, "random"])
