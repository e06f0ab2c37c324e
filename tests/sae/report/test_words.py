import base64
import json
import re
import zlib
from bisect import bisect_left, bisect_right
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae.report import words
from sae.report.examples import Context, frozen
from sae.report.latents import Latent
from sae.report.words import LatentIndex, key, words_of


def latent(number: int, text: str, *, document: str = "", prefers: tuple[bytes, ...] = ()) -> Latent:
    row = {
        "latent": number,
        "rule_kind": None,
        "token_bytes": list(prefers),
        "token_precision": [0.5] * len(prefers),
        "token_lift": [3.0] * len(prefers),
        "logits_up_bytes": [],
    }
    tokens = [frozen(i, [piece], piece.encode()) for i, piece in enumerate(re.findall(r".{1,3}", text))]
    return Latent(row, [Context("top", 1.0, 0, 0, 0, "train", document, tokens, [(0, 1.0)])])


def read(path: Path) -> list[list[Any]]:
    encoded = re.fullmatch(r'SAE\.put\("[^"]+","([^"]+)"\);\n', path.read_text())
    assert encoded
    return json.loads(zlib.decompress(base64.b64decode(encoded[1]), -15))


def entries(folder: Path, kind: str) -> list[list[Any]]:
    files = sorted((folder / "index" / kind).glob("*.js"), key=lambda path: int(path.stem))
    return [entry for path in files for entry in read(path)]


def latents_in(entry: list[Any]) -> list[int]:
    return np.cumsum(entry[1:]).tolist()


def test_every_word_leads_to_exactly_the_latents_that_show_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vocabulary = ["self", "naïve", "日本", "is_not_none", "Zürich", "x1", "İstanbul", "ǅ", "ﬁ"]
    index, expected = LatentIndex(400, 1 << 30), {}
    for number in range(400):
        chosen = rng.choice(vocabulary, 3).tolist()
        index.add(latent(number, " ".join(chosen)))
        for word in words_of(" ".join(chosen)):
            expected.setdefault(word, []).append(number)
    index.write(tmp_path, "index")
    assert {entry[0]: latents_in(entry) for entry in entries(tmp_path, "words")} == expected
    assert "none" in expected
    assert "is_not_none" in expected


def test_files_are_sorted_of_even_size_and_found_by_their_first_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "FILE_BYTES", 3000)
    monkeypatch.setattr(words, "_RAW_BYTES", 6000)
    rng = np.random.default_rng(1)
    index = LatentIndex(500, 1 << 30)
    for number in range(500):
        index.add(latent(number, " ".join(f"w{n:x}" for n in rng.integers(0, 3000, 6))))
    edges = index.write(tmp_path, "index")["words"]
    files = sorted((tmp_path / "index/words").glob("*.js"), key=lambda path: int(path.stem))
    assert len(files) == len(edges) > 3
    assert max(path.stat().st_size for path in files) <= 3000
    assert min(path.stat().st_size for path in files[:-1]) > 700
    assert edges == sorted(edges)
    for number, path in enumerate(files):
        for term, *_ in read(path):
            # As search.js looks it up.
            first = max(0, bisect_left(edges, key(term)) - 1)
            last = max(first, bisect_right(edges, key(term)) - 1)
            assert first <= number <= last


def test_terms_differing_in_space_and_case_lie_together(tmp_path: Path) -> None:
    index = LatentIndex(3, 1 << 30)
    for number, tokens in enumerate([(b" Self", b"\n"), (b"self",), (b"SELF ", b"\xff")]):
        index.add(latent(number, "", prefers=tokens))
    index.write(tmp_path, "index")
    found = [entry[0] for entry in entries(tmp_path, "tokens")]
    assert [term for term in found if key(term) == "self"] == [" Self", "SELF ", "self"]
    assert {"↵", "⟨FF⟩"} <= set(found)


def test_words_of_too_many_latents_are_listed_without_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "COMMON_AT_LEAST", 4)
    index = LatentIndex(100, 1 << 30)
    for number in range(100):
        index.add(latent(number, "often" if number % 2 else f"rarely{number}", document="a.py"))
    index.write(tmp_path, "index")
    found = {entry[0]: entry[1:] for entry in entries(tmp_path, "words")}
    assert found["often"] == [-1]
    assert found["rarely2"] == [2]
    assert len(entries(tmp_path, "docs")[0]) == 101


def test_an_index_above_its_limit_is_given_up_and_says_why(tmp_path: Path) -> None:
    index = LatentIndex(1000, 2000)
    for number in range(1000):
        index.add(latent(number, f"word{number} other{number}"))
    assert index.write(tmp_path, "index") == {"off": "an index of all words would take more than 0 MB (index_bytes)"}
    assert not (tmp_path / "index").exists()
