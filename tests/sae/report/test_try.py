"""Data of the view "Try it"."""

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sae.report.display import show_tokens
from sae.report.inputs import open_inputs
from sae.report.try_it import write_passages


def read_chunk(folder: Path, key: str) -> Any:
    text = (folder / f"{key}.js").read_text()
    return json.loads(zlib.decompress(base64.b64decode(text.split('"')[3]), -zlib.MAX_WBITS))


@pytest.mark.parametrize("chunk_bytes", [1, 3000, 1 << 20])
def test_passages_come_back_from_files_of_any_size(report: Any, tmp_path: Path, chunk_bytes: int) -> None:
    with open_inputs(report.storage, report.spec) as (inputs,):
        stored = pq.read_table(inputs.passages).to_pylist()
        assert write_passages(tmp_path, inputs, chunk_bytes) == len(stored)
    key = f"data/{inputs.key}/try"
    listed = read_chunk(tmp_path, key)["passages"]
    assert len(listed) == len(stored)
    files = {path.stem for path in (tmp_path / key).iterdir()}
    assert files == {str(number) for _, _, number, _, _ in listed}
    assert (len(files) == 1) == (chunk_bytes == 1 << 20)
    assert (len(files) == len(stored)) == (chunk_bytes == 1)
    for row, (doc, seq, number, index, preview) in zip(stored, listed, strict=True):
        file = read_chunk(tmp_path, f"{key}/{number}")
        passage = file["passages"][index]
        tokens = [file["tokens"][place] for place in passage["tokens"]]
        assert [token for token, *_ in tokens] == row["token_ids"]
        assert [segments for _, *segments in tokens] == show_tokens(row["token_bytes"])
        assert passage["latents"] == row["latents"]
        assert passage["values"] == pytest.approx(row["values"], rel=1e-6)
        assert seq == row["seq"]
        assert doc
        assert preview


def test_given_activations_have_no_passages(sweep_report: Any, tmp_path: Path) -> None:
    with open_inputs(sweep_report.storage, sweep_report.spec) as (text, given):
        assert write_passages(tmp_path, text, 1 << 20) > 0
        assert write_passages(tmp_path, given, 1 << 20) == 0
        assert not (tmp_path / "data" / given.key).exists()
