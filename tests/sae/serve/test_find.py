"""Which report an address means, and its files from a store that is no folder."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from sae.errors import ConfigError, StoreError
from sae.serve.find import find_report
from sae.serve.refusals import Refused
from sae.serve.site import BLOCK_BYTES, Site
from sae.store.artefacts import records
from sae.store.storage.filesystem import Storage


@pytest.mark.parametrize("inside", ["", "/", "/{content}", "/{content}/index.html"])
def test_anything_inside_a_report_names_it(served: Any, inside: str) -> None:
    uri = served.storage.uri(served.record.ref) + inside.format(content=served.record.content)
    storage, record = find_report(uri)
    assert (storage.root, record) == (served.storage.root, served.record)
    assert find_report(f"file://{uri}")[1] == served.record
    assert find_report(os.path.relpath(uri))[1] == served.record


def test_a_root_names_its_newest_report(served: Any, tmp_path: Path) -> None:
    assert find_report(served.storage.root)[1] == served.record
    storage = Storage(str(tmp_path / "root"))
    for title in ("first", "second"):
        spec = served.given.model_copy(update={"config": served.given.config.model_copy(update={"title": title})})
        with storage.staging() as folder:
            (folder / "index.html").write_text(title)
            made = records.commit(storage, spec, folder, {}, seconds=0)
        later = {"first": "2026-01-02", "second": "2026-01-01"}[title]
        produced = made.produced.model_copy(update={"created": f"{later}T00:00:00+00:00"})
        storage.replace(f"{made.ref}/record.json", records.encode(made.model_copy(update={"produced": produced})))
    assert find_report(storage.root)[1].spec["config"]["title"] == "first"


def test_what_is_no_report_is_an_error_that_says_so(served: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no report there"):
        find_report(str(tmp_path))
    with pytest.raises(ConfigError, match="no report there"):
        find_report(served.storage.uri(served.record.spec["saes"][0]["sae"]))
    with pytest.raises(StoreError, match="never finished"):
        find_report(f"{tmp_path}/reports/{'0' * 16}")


def test_files_come_from_any_store_in_blocks(served: Any, memory_storage: Storage) -> None:
    big = os.urandom(2 * BLOCK_BYTES + 17)
    with memory_storage.staging() as folder:
        (folder / "index.html").write_bytes(big)
        (folder / "empty.json").write_bytes(b"")
        record = records.commit(memory_storage, served.given, folder, {}, seconds=0)
    site = Site(memory_storage, record)

    async def body(path: str) -> bytes:
        scope = {"type": "http", "method": "GET", "headers": [], "path_params": {"path": path}}
        answer = await site.respond(Request(scope))
        return b"".join([bytes(piece) async for piece in answer.body_iterator])  # type: ignore[attr-defined]

    assert asyncio.run(body("")) == big
    assert asyncio.run(body("empty.json")) == b""
    memory_storage.replace(record.path("index.html"), b"cut off")
    with pytest.raises(Refused, match="shorter"):
        asyncio.run(body("index.html"))
    memory_storage.remove(record.path("index.html"))
    with pytest.raises(Refused, match="cannot be read") as refused:
        asyncio.run(body("index.html"))
    assert refused.value.status == 500
