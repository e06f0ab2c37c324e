"""Probes measure and leave nothing; the correlation of a context's rows against a naive loop."""

import itertools
from pathlib import Path

import pytest
import torch

from sae.errors import StoreError
from sae.probe import context_correlation, probe_storage
from sae.store.storage.filesystem import Storage


def test_correlation_of_rows_of_a_context_is_that_of_a_naive_loop() -> None:
    act = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0)).cumsum(1)
    mean = act.reshape(-1, 3).mean(0)
    pairs = [
        float((context[a] - mean) @ (context[b] - mean))
        for context in act
        for a, b in itertools.permutations(range(5), 2)
    ]
    variance = float((act - mean).square().sum(-1).mean())
    assert context_correlation(act) == pytest.approx(sum(pairs) / len(pairs) / variance)


def test_correlation_of_a_known_mixture() -> None:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(2000, 1, 4, generator=generator)
    own = torch.randn(2000, 6, 4, generator=generator)
    assert context_correlation(0.6 * shared + 0.8 * own) == pytest.approx(0.36, abs=0.02)
    assert context_correlation(shared.expand(2000, 6, 4)) == pytest.approx(1)


def test_a_probe_of_a_root_leaves_it_as_it_was(tmp_path: Path) -> None:
    there = Storage(str(tmp_path / "there"))
    there.replace("a", b"mine")
    before = {file.path for file in there.walk("")}
    for storage in (there, Storage(str(tmp_path / "new" / "root"))):
        speed = probe_storage(storage, 1 << 20)
        assert min(speed) > 0
    assert {file.path for file in there.walk("")} == before
    assert not (tmp_path / "new").exists()


def test_a_probe_that_fails_leaves_nothing(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> bytes:
        raise StoreError("unreadable")

    monkeypatch.setattr(storage, "read_bytes", fail)
    with pytest.raises(StoreError, match="unreadable"):
        probe_storage(storage, 1 << 20)
    assert not Path(storage.root).exists()
