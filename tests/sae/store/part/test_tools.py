"""docs/parts.md: what it says of DuckDB, Polars and numpy runs, and gives the rows that were written."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae.store.part.encoding import Dtype, decode, encode
from sae.store.storage.filesystem import Storage
from tests.conftest import MakeSnapshot

duckdb = pytest.importorskip("duckdb")
pytest.importorskip("polars")

PAGE = (Path(__file__).parents[4] / "docs" / "parts.md").read_text()
FILES, POLARS, DECODED, MAPPED = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
VIEWS, PER_PART, LONGEST, JOINED, NEAREST, DIMENSIONS, PAGES, WORDS = re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL)
DTYPES: tuple[Dtype, ...] = ("float16", "float32", "bfloat16", "int8")


def opened(storage: Storage, ref: str) -> dict[str, Any]:
    """The names that the first block makes, for a store of our own."""
    block = FILES.replace('"runs"', repr(storage.root)).replace('"activations/0123456789abcdef"', repr(ref))
    assert block.count(storage.root) == block.count(ref) == 1
    names: dict[str, Any] = {}
    exec(block, names)
    return names


@pytest.fixture
def world(make_world: Callable, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A store with text, in whose folder we are."""
    made = make_world()
    monkeypatch.chdir(made.storage.root)
    return made


def everything(world: Any) -> dict[tuple[int, int], tuple[int, int | None, np.ndarray]]:
    """(seq, pos) -> token, token before, activation; of both splits."""
    found = {}
    for split in ("train", "heldout"):
        table = world.contexts[0, split]
        tokens = dict(zip(table.seq.tolist(), table.tokens.tolist(), strict=True))
        for (seq, pos), act in world.rows[0, split].items():
            found[seq, pos] = (tokens[seq][pos], tokens[seq][pos - 1] if pos else None, act)
    return found


def test_the_queries_find_what_was_written(world: Any) -> None:
    rows = everything(world)
    connection = duckdb.connect()
    connection.execute(VIEWS)

    def ask(query: str) -> list[tuple]:
        return connection.execute(query).fetchall()

    assert sum(n_rows for _, n_rows, _ in ask(PER_PART)) == len(rows)

    norms: dict[int, list[float]] = {}
    for token, _, act in rows.values():
        norms.setdefault(token, []).append(float(np.linalg.norm(act)))
    expected = sorted(((np.mean(norm), token, len(norm)) for token, norm in norms.items()), reverse=True)
    longest = ask(LONGEST)
    assert [row[:2] for row in longest] == [row[1:] for row in expected[:20]]
    assert np.allclose([row[2] for row in longest], [row[0] for row in expected[:20]], rtol=1e-5)

    joined = ask(JOINED)
    assert len(joined) == 20
    for seq, pos, token, previous, act in joined:
        assert rows[seq, pos][:2] == (token, previous)
        assert np.array_equal(np.array(act, np.float32), rows[seq, pos][2])

    first = rows[min(rows)][2]
    cosine = {key: act @ first / np.linalg.norm(act) / np.linalg.norm(first) for key, (_, _, act) in rows.items()}
    nearest = ask(NEAREST)
    assert [row[:2] for row in nearest] == sorted(cosine, key=lambda key: -cosine[key])[:10]
    for seq, pos, ids, value in nearest:
        assert ids[-1] == rows[seq, pos][0]
        assert value == pytest.approx(cosine[seq, pos], abs=1e-5)

    acts = np.stack([act for _, _, act in rows.values()]).astype(np.float64)
    assert np.allclose(ask(DIMENSIONS), np.stack([np.arange(1, 7), acts.mean(0), acts.std(0)], 1), rtol=1e-5, atol=1e-7)
    assert {row[-1] for row in ask(PAGES)} == {"UNCOMPRESSED"}
    assert {row[1:] for row in ask(WORDS)} == {
        ("sae.format", "2"),
        ("sae.dtype", "float16"),
        ("sae.d_in", "6"),
        ("sae.exponent", "0"),
    }


def test_polars_joins_rows_with_their_text(world: Any) -> None:
    names = opened(world.storage, world.snapshots["train"])
    exec(POLARS, names)
    rows = {key: row for key, row in everything(world).items() if key in world.rows[0, "train"]}
    joined, vectors, longest = names["joined"], names["vectors"], names["longest"]
    assert len(joined) == len(rows)
    assert vectors.shape == (len(rows), 6)
    for seq, pos, token, there, act in zip(
        *(joined[name].to_list() for name in ("seq", "pos", "token", "tokens")), vectors, strict=True
    ):
        assert token == there == rows[seq, pos][0]
        assert np.array_equal(act, rows[seq, pos][2])
    norms = [np.linalg.norm(act) for token, _, act in rows.values() if token == longest["token"][0]]
    assert longest["norm"][0] == pytest.approx(np.mean(norms), rel=1e-5)
    assert longest["len"][0] == len(norms)


@pytest.mark.parametrize("dtype", DTYPES)
def test_files_of_every_dtype_are_decoded_by_what_they_say(
    storage: Storage, make_snapshot: MakeSnapshot, dtype: Dtype
) -> None:
    rng = np.random.default_rng(0)
    parts = [(rng.standard_normal((50, 6)) * scale).astype(np.float32) for scale in (1, 1e5)]
    names = opened(storage, make_snapshot(storage, parts, row_group_rows=20, dtype=dtype).ref)
    exec(DECODED, names)
    stored = [encode(torch.from_numpy(part), dtype) for part in parts]
    expected = [decode(torch.from_numpy(raw), encoding).numpy() for raw, encoding in stored]
    assert np.array_equal(names["x"], np.concatenate(expected))
    exec(MAPPED, names)
    assert np.array_equal(names["mapped"], stored[0][0][:20])
