"""A network that fails on a tenth of the requests, under the whole of extraction, snapshot and training's reads."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from tests.bad_days import small_store
from tests.bad_days.place import Place, uninterrupted
from tests.bad_days.tiny_model import prepare
from tests.sae.store.network import Fault, Request

SHARE = 0.1
FAULTS: dict[str, dict[str, str]] = {
    "503 SlowDown": {"": "503 SlowDown"},
    "reset": {"GET": "reset", "PUT": "torn", "": "drop"},
    "stall": {"GET": "stall", "": "silent"},
    "truncated body": {"GET": "truncate", "PUT": "torn", "": "lose"},
    "lost answer": {"": "lose"},
}
"""What happens to a request of a method; "": to others."""


def on_a_tenth(kind: str, seed: int) -> Fault:
    """The fault of this kind for a tenth of all requests, drawn anew when one is tried again."""
    faults = FAULTS[kind]

    def draw(request: Request) -> str:
        hit = request.number(seed) % 10_000 < SHARE * 10_000
        return faults.get(request.method, faults[""]) if hit else ""

    return draw


def build_and_read(place: Place, kind: str, tries: int, seed: int = 0) -> Iterator[str]:
    """Parts, snapshot and an epoch of training's reads. Yields: what became of it."""
    expected = _digest_of_rows()
    for number in range(tries):
        storage = place.fresh(True)
        with place.network() as hop:
            hop.fault = on_a_tenth(kind, seed + number)
            end = place.children.run("build and read", storage.root, environment=place.environment(hop))
        assert end.signal == 0, end
        assert not end.said.startswith(tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")), end.said
        found, failures = json.loads(end.said)
        assert found == expected
        assert sum(count for fault, count in hop.faults.items() if fault) > 0
        small_store.check_resumed(storage, uninterrupted(), small_store.build, collected=True)
        yield "equal bytes" + (", with tasks tried again" if failures else "")


def extract(place: Place, kind: str, tries: int, seed: int = 0) -> Iterator[str]:
    """Extraction from a model that lies in the bucket, then snapshot and reads."""
    folder, expected = _extracted(place)
    for number in range(tries):
        storage = place.fresh(True)
        with place.network() as hop:
            hop.fault = on_a_tenth(kind, seed + number)
            end = place.children.run("extract", storage.root, str(folder), environment=place.environment(hop))
        assert end.signal == 0, end
        assert end.said.isdigit(), end.said
        assert sum(count for fault, count in hop.faults.items() if fault) > 0
        small_store.check_whole(storage, set())
        small_store.collect(storage)
        assert small_store.contents(storage) == expected
        yield "equal bytes" + (", with tasks tried again" if end.said != "0" else "")


@functools.cache
def _digest_of_rows() -> str:
    import tempfile

    from sae.store.storage.filesystem import Storage

    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(folder)
        small_store.build(storage)
        return xxhash.xxh3_64_hexdigest(small_store.read(storage))


@functools.cache
def _extracted(place: Place) -> tuple[Path, dict[str, Any]]:
    """The folder of model and corpus, and what a root holds when nothing goes wrong."""
    folder, storage = place.fresh_folder(), place.fresh(False)
    prepare(folder)
    end = place.children.run("extract", storage.root, str(folder))
    assert end.said == "0", end
    return folder, small_store.contents(storage)
