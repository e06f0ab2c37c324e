"""Which contexts are shown and which are held back, and what is known to be silent."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.architectures import TopKConfig, build_sae
from sae.errors import InputError
from sae.explain.config import ContextsConfig, QuestionsSpec
from sae.explain.prompts import marked_runs
from sae.explain.questions import (
    QUARTERS,
    Chosen,
    Drawn,
    Window,
    choose_latents,
    choose_windows,
    mark_others,
    read_examples,
)
from sae.explain.silence import draw_windows
from sae.store.storage.filesystem import Storage
from tests.conftest import MakeSnapshot


def spec(**fields: object) -> QuestionsSpec:
    base = {
        "contexts": ContextsConfig(),
        "n_latents": 5,
        "latents": None,
        "sae": "saes/" + "0" * 16,
        "statistics": "statistics/" + "0" * 16,
        "tokens": ["tokens/" + "0" * 16],
        "snapshot": "activations/" + "0" * 16,
        "window_tokens": 8,
        "seed": 0,
    }
    return QuestionsSpec.model_validate(base | fields)


def window(kind: str, seq: int, value: float = 1.0, text: str | None = None) -> Window:
    tokens = (b"a", (text or f"w{seq}").encode())
    return Window(kind, tokens, (0.0, value), 0, seq, 1)


def groups(n_per_quarter: int = 5, n_top: int = 20) -> dict[str, list[Window]]:
    found = {name: [window(name, 100 * i + j) for j in range(n_per_quarter)] for i, name in enumerate(QUARTERS)}
    found["top"] = [window("top", 1000 + j) for j in range(n_top)]
    found["miss"] = [window("miss", 2000 + j, value=0.0) for j in range(5)]
    return found


def drawn(n: int = 50, fires: frozenset[int] = frozenset()) -> list[Drawn]:
    return [Drawn(window("silent", 3000 + j, value=0.0), fires) for j in range(n)]


def places(windows: list[Window]) -> set[tuple[int, int]]:
    return {(each.segment, each.seq) for each in windows}


def kinds(windows: list[Window]) -> dict[str, int]:
    return {kind: sum(each.kind == kind for each in windows) for kind in dict.fromkeys(each.kind for each in windows)}


def test_every_quarter_is_held_back_and_shown_and_the_strongest_are_shown() -> None:
    chosen = choose_windows(spec(), 7, groups(), drawn())
    assert kinds(chosen.firing) == dict.fromkeys(QUARTERS, 4)
    assert kinds(chosen.shown) == {"top": 8} | dict.fromkeys(QUARTERS, 1)
    assert [each.seq for each in chosen.shown[:8]] == list(range(1000, 1008))
    assert kinds(chosen.silent) == {"miss": 5, "silent": 11}


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_nothing_that_is_asked_about_was_shown(data: st.DataObject) -> None:
    # Few contexts and texts, so that groups share many.
    def some(kind: str, value: float) -> list[Window]:
        pairs = data.draw(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=8))
        return [window(kind, seq, value, f"w{text}") for seq, text in pairs]

    given_groups = {kind: some(kind, 1.0) for kind in (*QUARTERS, "top", "random")} | {"miss": some("miss", 0.0)}
    chosen = choose_windows(spec(), 3, given_groups, [Drawn(each, frozenset()) for each in some("silent", 0.0)])
    used = [*chosen.shown, *chosen.firing, *chosen.silent]
    assert len(places(used)) == len(used)
    assert len({each.tokens for each in used}) == len(used)
    assert not any(any(each.fires) for each in chosen.silent)
    assert all(any(each.fires) for each in [*chosen.shown, *chosen.firing])


def test_few_firings_are_shared_between_showing_and_asking() -> None:
    chosen = choose_windows(spec(), 7, groups(n_per_quarter=2, n_top=0), drawn())
    assert kinds(chosen.firing) == kinds(chosen.shown) == dict.fromkeys(QUARTERS, 1)


def test_a_near_miss_counts_only_where_the_whole_window_is_silent() -> None:
    mine = groups()
    mine["miss"] = [window("miss", 2000, value=0.5), window("miss", 2001, value=0.0)]
    chosen = choose_windows(spec(), 7, mine, drawn())
    assert kinds(chosen.silent) == {"miss": 1, "silent": 15}
    assert (0, 2000) not in places(chosen.silent)


def test_windows_in_which_the_latent_fires_are_not_silent() -> None:
    mixed = drawn(50, frozenset({7}))[:40] + drawn(50, frozenset({8}))[40:]
    chosen = choose_windows(spec(), 7, groups(), mixed)
    assert places([each for each in chosen.silent if each.kind == "silent"]) == {(0, 3000 + j) for j in range(40, 50)}


def test_without_near_misses_there_is_more_silence() -> None:
    mine = groups()
    del mine["miss"]
    assert kinds(choose_windows(spec(), 7, mine, drawn()).silent) == {"silent": 16}


def test_another_seed_draws_other_contexts_and_the_same_seed_the_same() -> None:
    def held(seed: int) -> Chosen:
        return choose_windows(spec(seed=seed), 7, groups(), drawn())

    assert held(1) == held(1)
    assert held(1).firing != held(2).firing


def test_random_latents_are_live_and_named_ones_are_taken_as_they_are() -> None:
    n_fired = np.array([0, 5, 0, 7, 9, 0, 1, 2])
    assert choose_latents(spec(n_latents=3), n_fired) == choose_latents(spec(n_latents=3), n_fired)
    assert choose_latents(spec(n_latents=50), n_fired) == [1, 3, 4, 6, 7]
    assert choose_latents(spec(n_latents=None, latents=[4, 0]), n_fired) == [0, 4]
    with pytest.raises(InputError, match=r"labels\.latents: there is no latent 8, .* has 8"):
        choose_latents(spec(n_latents=None, latents=[8]), n_fired)
    with pytest.raises(InputError, match="ever fires"):
        choose_latents(spec(), np.zeros(4))


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=24), st.integers(0, 5))
def test_other_tokens_are_as_many_in_pieces_as_long_where_it_is_silent(fires: list[bool], seed: int) -> None:
    marked = mark_others(fires, np.random.default_rng(seed))
    if marked is None:
        assert sum(fires) * 3 > len(fires) - sum(fires)  # there is little room
        return
    assert not any(fired and mark for fired, mark in zip(fires, marked, strict=True))
    lengths = [sorted(stop - start for start, stop in marked_runs(each)) for each in (fires, marked)]
    assert lengths[0] == lengths[1]


def test_examples_are_read_by_latent_and_group_in_order_of_rank(tmp_path: Path) -> None:
    rows = [
        (3, "top", 1, 11),
        (3, "top", 0, 10),
        (4, "top", 0, 12),
        (3, "q0", 0, 13),
        (5, "miss", 0, 14),
    ]
    table = pa.table(
        {
            "latent": pa.array([row[0] for row in rows], pa.int32()),
            "group": [row[1] for row in rows],
            "rank": pa.array([row[2] for row in rows], pa.int32()),
            "seq": pa.array([row[3] for row in rows], pa.int32()),
            "pos": pa.array([1] * 5, pa.int32()),
            "segment": pa.array([0] * 5, pa.int32()),
            "token_bytes": [[b"a", b"\xff"]] * 5,
            "activations": pa.array([[0.0, 2.5]] * 5, pa.list_(pa.float32())),
            "doc_name": ["secret"] * 5,
        }
    )
    pq.write_table(table, tmp_path / "examples.parquet")
    found = read_examples(tmp_path / "examples.parquet", [3, 5])
    assert {latent: {group: [w.seq for w in ws] for group, ws in each.items()} for latent, each in found.items()} == {
        3: {"q0": [13], "top": [10, 11]},
        5: {"miss": [14]},
    }
    assert found[3]["q0"][0] == Window("q0", (b"a", b"\xff"), (0.0, 2.5), 0, 13, 1)


def test_drawn_windows_know_every_latent_that_fires_in_them(storage: Storage, make_snapshot: MakeSnapshot) -> None:
    rng = np.random.default_rng(0)
    n_contexts, n_tokens, d_in = 24, 16, 6
    seq = np.repeat(np.arange(n_contexts, dtype=np.int32), n_tokens)
    pos = np.tile(np.arange(n_tokens, dtype=np.int32), n_contexts)
    kept = pos != 9  # a token of every context has no row
    order = rng.permutation(np.flatnonzero(kept))
    act = rng.standard_normal((n_contexts * n_tokens, d_in)).astype(np.float32)
    token = (seq * 100 + pos).astype(np.int32)
    halves = np.array_split(order, 2)
    snapshot = make_snapshot(
        storage,
        [act[half] for half in halves],
        seq=[seq[half] for half in halves],
        pos=[pos[half] for half in halves],
        token=[token[half] for half in halves],
    )
    sae = build_sae(TopKConfig(d_sae=12, k=2, k_aux=2), d_in)
    with torch.no_grad():
        sae.W_enc.copy_(torch.from_numpy(rng.standard_normal((12, d_in)).astype(np.float32)))
    windows = draw_windows(storage, sae, snapshot, 8, seed=3)
    assert len(windows) > n_contexts // 2
    assert [w.token_ids.tolist() for w in draw_windows(storage, sae, snapshot, 8, seed=3)] == [
        w.token_ids.tolist() for w in windows
    ]
    with torch.no_grad():
        latents = sae.encode(torch.from_numpy(act)).numpy()
    for each in windows:
        rows = each.token_ids // 100 * n_tokens + each.token_ids % 100
        assert (seq[rows] == each.seq).all()
        assert (np.diff(pos[rows]) == 1).all()  # never across the token without a row
        assert each.pos in pos[rows]
        assert 1 <= len(rows) <= 8
        assert each.latents == frozenset(np.flatnonzero((latents[rows] > 0).any(axis=0)).tolist())
