"""Per-latent sums against a plain loop, and the promise that they merge."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.statistics.accumulate import HISTOGRAM_EDGES, N_BINS, LatentSums, Sizes, bins_of, position_edges
from sae.statistics.firings import NO_LABEL, Block, Firings, Rows, context_key, document_key, split_context_key
from sae.statistics.kept import derived_numbers, row_numbers

D_SAE, N_TOP, N_SAMPLES, VOCAB, N_LABELS, N_TOKENS, N_CONTEXTS = 5, 3, 4, 7, 3, 6, 8
SIZES = Sizes(D_SAE, N_TOP, N_SAMPLES, 7, row_share=0.4, vocab_size=VOCAB, n_labels=N_LABELS, context_tokens=N_TOKENS)


def make_block(seed: int) -> Block:
    """All rows of some contexts and firings on them; few values and documents, so that ties and repeats are common."""
    rng = np.random.default_rng(seed)
    context, pos = (axis.reshape(-1) for axis in np.mgrid[:N_CONTEXTS, :N_TOKENS])
    rows = Rows(
        context=context_key(seed, "train", context),
        pos=pos.astype(np.int32),
        doc=document_key(0, context // 2),
        token=rng.integers(0, VOCAB, len(pos)).astype(np.int32),
        previous=np.where(pos > 0, rng.integers(0, VOCAB, len(pos)), -1).astype(np.int32),
        label=rng.choice([0, 1, 2, NO_LABEL], len(pos)).astype(np.uint8),
    )
    row, latent = np.nonzero(rng.random((len(pos), D_SAE)) < rng.random(D_SAE) ** 2)
    value = rng.choice([1e-6, 0.25, 0.3, 1.0, 2.0, 1e6], len(row)).astype(np.float32)
    return Block(rows, row, latent.astype(np.int32), value)


def part_of(block: Block, chosen: np.ndarray) -> Block:
    """The rows at `chosen` (sorted indices) and their firings."""
    number = np.full(len(block.rows), -1)
    number[chosen] = np.arange(len(chosen))
    inside = number[block.row] >= 0
    rows = Rows(*(column[chosen] for column in block.rows))
    return Block(rows, number[block.row[inside]], block.latent[inside], block.value[inside])


def accumulate(pieces: list[Block]) -> LatentSums:
    sums = LatentSums(SIZES)
    for piece in pieces:
        sums.add("train", piece)
    return sums


def rows_of(firings: Firings) -> list[tuple]:
    return list(zip(*(column.tolist() for column in firings), strict=True))


def assert_same(a: LatentSums, b: LatentSums) -> None:
    for name in ("n_rows", "n_fired", "max", "histogram"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    for name in ("sum", "sum_sq"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-12)
    for name in ("top", "sample", "places"):
        assert rows_of(getattr(a, name).read()[0]) == rows_of(getattr(b, name).read()[0]), name
    for mine, theirs in zip(
        [*a.rows.read().rows, *a.rows.read()[1:]], [*b.rows.read().rows, *b.rows.read()[1:]], strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)
    for name in a.on:
        np.testing.assert_array_equal(a.on[name].rows, b.on[name].rows, err_msg=name)
        np.testing.assert_array_equal(a.on[name].counts, b.on[name].counts, err_msg=name)


def test_sums_equal_a_plain_loop() -> None:
    block = make_block(seed=0)
    sums = accumulate([block])
    firings = block.firings()
    priorities = derived_numbers(row_numbers(7, block.rows)[block.row], block.latent)
    by_latent = defaultdict(list)
    for row, priority in zip(rows_of(firings), priorities.tolist(), strict=True):
        by_latent[row[0]].append((row, priority))
    top, sample = [], []
    for latent in range(D_SAE):
        rows = by_latent[latent]
        values = [row[1] for row, _ in rows]
        assert sums.n_fired[1, latent] == len(values)
        assert sums.n_fired[0, latent] == 0
        assert sums.sum[latent] == pytest.approx(sum(values), rel=1e-12)
        assert sums.sum_sq[latent] == pytest.approx(sum(v * v for v in values), rel=1e-12)
        assert sums.max[latent] == max(values, default=0)
        histogram = [0] * N_BINS
        for value in values:
            bins = [i for i in range(N_BINS) if HISTOGRAM_EDGES[i] <= value < HISTOGRAM_EDGES[i + 1]]
            histogram[bins[0] if bins else (0 if value < 1 else N_BINS - 1)] += 1
        assert sums.histogram[latent].tolist() == histogram
        best = {}
        for row, _ in sorted(rows, key=lambda item: (-item[0][1], item[0][2], item[0][3])):
            best.setdefault(row[4], row)
        top += list(best.values())[:N_TOP]
        sample += [row for row, _ in sorted(rows, key=lambda item: item[1])[:N_SAMPLES]]
    assert rows_of(sums.top.read()[0]) == top
    assert rows_of(sums.sample.read()[0]) == sample


def test_what_stands_at_a_row_is_counted_as_in_a_plain_loop() -> None:
    block = make_block(seed=1)
    sums = accumulate([block])
    rows = block.rows
    counts = {name: np.zeros_like(each.counts) for name, each in sums.on.items()}
    carried = {name: np.zeros_like(each.rows) for name, each in sums.on.items()}

    def codes(row: int) -> dict[str, int]:
        found = {"token": int(rows.token[row]), "position": [0, 1, 2, 2, 3, 3][rows.pos[row]]}
        if rows.previous[row] >= 0:
            found["previous token"] = int(rows.previous[row])
        if rows.label[row] != NO_LABEL:
            found["syntax"] = int(rows.label[row])
        return found

    for row in range(len(rows)):
        for name, code in codes(row).items():
            carried[name][code] += 1
    for row, latent in zip(block.row, block.latent, strict=True):
        for name, code in codes(int(row)).items():
            counts[name][latent, code] += 1
    for name, each in sums.on.items():
        np.testing.assert_array_equal(each.counts, counts[name], err_msg=name)
        np.testing.assert_array_equal(each.rows, carried[name], err_msg=name)
    places = sums.places.read()[0]
    for token in range(VOCAB):
        mine = set(zip(places.context[places.latent == token], places.pos[places.latent == token], strict=True))
        there = set(zip(rows.context[rows.token == token], rows.pos[rows.token == token], strict=True))
        assert mine == there if len(there) <= 16 else mine < there


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 50), n_pieces=st.integers(1, 6), order=st.randoms(use_true_random=False))
def test_statistics_of_parts_merge_to_statistics_of_whole(seed: int, n_pieces: int, order) -> None:
    block = make_block(seed)
    owner = np.array([order.randrange(n_pieces) for _ in range(len(block.rows))])
    pieces = [part_of(block, np.flatnonzero(owner == piece)) for piece in range(n_pieces)]
    whole = accumulate([block])
    order.shuffle(pieces)
    merged = [accumulate([piece]) for piece in pieces]
    while len(merged) > 1:  # any tree of merges
        a = merged.pop(order.randrange(len(merged)))
        merged[order.randrange(len(merged))].merge(a)
    assert_same(merged[0], whole)


def test_kept_examples_do_not_depend_on_when_they_are_sorted_in(monkeypatch) -> None:
    block = make_block(seed=3)
    pieces = [part_of(block, np.arange(start, start + 6)) for start in range(0, len(block.rows), 6)]
    late = accumulate(pieces)
    monkeypatch.setattr("sae.statistics.kept.MAX_PENDING", 1)
    assert_same(accumulate(pieces), late)


def test_saved_statistics_merge_like_those_in_memory(tmp_path: Path) -> None:
    a, b = make_block(seed=1), make_block(seed=2)
    accumulate([a]).save(tmp_path / "a")
    accumulate([b]).save(tmp_path / "b")
    accumulate([b]).save(tmp_path / "again")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "again").read_bytes()
    sums = LatentSums(SIZES)
    sums.merge_file(tmp_path / "a")
    sums.merge_file(tmp_path / "b")
    direct = accumulate([a])
    direct.merge(accumulate([b]))
    assert_same(sums, direct)


def test_every_row_is_sampled_equally_often() -> None:
    n, kept, n_seeds = 200, 20, 400
    nothing = np.zeros(n, np.int32)
    rows = Rows(np.arange(n), nothing, np.arange(n), nothing, nothing, nothing.astype(np.uint8))
    times = np.zeros(n)
    for seed in range(n_seeds):
        times[np.argsort(derived_numbers(row_numbers(seed, rows), nothing))[:kept]] += 1
    expected = n_seeds * kept / n
    # Sum of squared deviations over the binomial variance: chi-square with 199 degrees, 5 sigma is 100 above.
    assert ((times - expected) ** 2 / (expected * (1 - kept / n))).sum() < 300
    assert times.min() > 0


@given(st.lists(st.floats(2**-20, 2**20, width=32), min_size=1, max_size=50))
def test_bins_are_those_between_the_edges(values: list[float]) -> None:
    value = np.array(values, np.float32)
    found = bins_of(value)
    expected = np.clip(np.searchsorted(HISTOGRAM_EDGES, value, side="right") - 1, 0, N_BINS - 1)
    np.testing.assert_array_equal(found, expected)


def test_bins_of_positions_double_in_width() -> None:
    assert position_edges(128).tolist() == [0, 1, 2, 4, 8, 16, 32, 64, 128]
    assert position_edges(6).tolist() == [0, 1, 2, 4, 6]
    assert position_edges(1).tolist() == [0, 1]
    assert position_edges(0).tolist() == [0]


def test_context_keys_hold_segment_split_and_number() -> None:
    seq = np.array([0, 5, 2**31 - 1], np.int32)
    segment, split, number = split_context_key(context_key(3, "train", seq))
    assert segment.tolist() == [3, 3, 3]
    assert split.tolist() == [1, 1, 1]
    assert number.tolist() == seq.tolist()
