"""Labels as a stage of the whole run: a stub endpoint is asked, once; its key is found nowhere."""

import itertools
import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sae.errors import ConfigError, InputError, TransientError
from sae.explain.questions import write_questions
from sae.plan import PipelineConfig, make_plan
from sae.store.artefacts.records import local_files, require_record
from sae.store.reading.blocks import iter_rows
from sae.store.snapshots.snapshot import read_snapshot
from sae.store.storage.filesystem import Storage
from sae.weights import load_sae
from tests.flows.conftest import with_settings
from tests.sae.explain.local_model import save_local_model
from tests.sae.explain.stub import KEY, Fault, Stub, serve

pytestmark = pytest.mark.usefixtures("prefect_backend")

N_LATENTS = 10


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setenv("STUB_API_KEY", KEY)
    with serve() as server:
        server.key = KEY
        yield server


def labelled(config: PipelineConfig, stub: Stub, **explainer: Any) -> PipelineConfig:
    """The run with labels of some latents by the stub."""
    asked = {"kind": "openai", "base_url": stub.base_url, "model": "stub", "api_key_env": "STUB_API_KEY"}
    asked |= {"retry_delay_seconds": 0.01, "n_retries": 1} | explainer
    return with_settings(config, {"labels": {"explainer": asked, "n_latents": N_LATENTS}})


def run(config: PipelineConfig, **options: Any) -> list[dict[str, Any]]:
    from flows.pipeline import pipeline

    return pipeline(config, **options)


def computed(outcomes: list[dict[str, Any]]) -> set[str]:
    return {outcome["stage"] for outcome in outcomes if outcome["outcome"] == "computed"}


def read_labels(config: PipelineConfig) -> list[dict[str, Any]]:
    storage = Storage(config.execution.root)
    with local_files(storage, require_record(storage, make_plan(config).labels[0].ref)) as folder:
        return pq.read_table(folder / "labels.parquet").to_pylist()


def files_with(secret: str, places: list[Path]) -> tuple[list[Path], int]:
    """Files below some folders that hold a text, and how many there are."""
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    return [path for path in files if secret.encode() in path.read_bytes()], len(files)


def runs(numbers: list[int]) -> list[range]:
    """Neighbouring numbers as ranges."""
    breaks = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
    return [range(numbers[i], numbers[j - 1] + 1) for i, j in itertools.pairwise([0, *breaks, len(numbers)])]


def test_latents_are_explained_and_asked_about_once_and_the_key_is_nowhere(
    copy: PipelineConfig, stub: Stub, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    from prefect.settings import get_current_settings

    lock = threading.Lock()
    repeated: set[str] = set()

    def first_time(prompt: str) -> Fault | None:
        """Every third prompt is refused once, with the key."""
        with lock:
            if len(stub.requests) % 3 == 0 and prompt not in repeated:
                repeated.add(prompt)
                return Fault(500, body=f"you sent Bearer {KEY}".encode())
        return None

    stub.fault_of = first_time
    config = labelled(copy, stub, n_retries=5)
    assert computed(run(config)) == {"labels", "report"}
    assert repeated
    labels = read_labels(config)
    assert len(labels) == N_LATENTS
    explained = [row for row in labels if row["explanation"]]
    assert explained
    for row in explained:
        assert row["explanation"].startswith("the word")
        assert row["detection_n"] > 8
        low, value, high = (row[f"detection_accuracy{end}"] for end in ("_low", "", "_high"))
        assert 0 <= low <= value <= high <= 1
    n_requests = len(stub.requests)
    assert n_requests == sum(row["n_requests"] for row in labels) + len(repeated)
    assert computed(run(config)) == set()
    assert len(stub.requests) == n_requests

    url = get_current_settings().server.database.connection_url
    assert url
    database = Path(url.get_secret_value().partition("///")[2])
    assert database.is_file()
    found, n_files = files_with(KEY, [tmp_path, database.parent, get_current_settings().results.local_storage_path])
    assert found == []
    assert n_files > 50
    assert KEY not in caplog.text


def test_another_address_or_key_asks_nothing_again_and_another_model_does(copy: PipelineConfig, stub: Stub) -> None:
    run(labelled(copy, stub), only="labels")
    n_requests = len(stub.requests)
    moved = labelled(copy, stub, base_url="http://127.0.0.1:9/v1", api_key_env="OTHER_API_KEY", timeout_seconds=5)
    assert computed(run(moved, only="labels")) == set()
    # What labels are built on is computed again to the same bytes: no reason to ask.
    assert computed(run(moved, only="labels", refresh="statistics")) == set()
    assert len(stub.requests) == n_requests
    other = run(labelled(copy, stub, model="another"), only="labels")
    asked = {outcome["task"] for outcome in other if outcome["outcome"] == "computed"}
    assert asked == {"label_latents", "merge_labels"}  # the questions are the same


def test_a_wrong_key_an_unknown_model_and_an_absent_server_stop_with_the_setting_s_name(
    copy: PipelineConfig, stub: Stub
) -> None:
    copy = with_settings(copy, {"execution": copy.execution.model_dump(mode="json") | {"retries": 0}})
    stub.fault_of = lambda _: Fault(404, body=b"no such model")
    with pytest.raises(InputError, match=r"labels\.explainer\.model: .* knows no model 'stub'"):
        run(labelled(copy, stub), only="labels")
    with pytest.raises(TransientError, match=r"labels\.explainer\.base_url: \S+ cannot be reached"):
        run(labelled(copy, stub, base_url="http://127.0.0.1:9/v1"), only="labels")
    stub.key = "changed"
    with pytest.raises(InputError, match=r"labels\.explainer\.api_key_env: \S+ refused the key in STUB_API_KEY"):
        run(labelled(copy, stub), only="labels")
    # What was made before is kept: the questions.
    storage, plan = Storage(copy.execution.root), make_plan(labelled(copy, stub))
    assert storage.exists(f"{plan.questions[0].ref}/record.json")
    assert not storage.exists(f"{plan.labels[0].ref}/record.json")


def test_a_missing_key_is_found_before_any_work(
    copy: PipelineConfig, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STUB_API_KEY")
    with pytest.raises(InputError, match="STUB_API_KEY is not set"):
        run(labelled(copy, stub), refresh="sae")
    assert stub.requests == []
    assert computed(run(labelled(copy, stub), only="evaluation")) == set()


def test_a_run_that_broke_off_goes_on_with_the_shards_that_are_missing(copy: PipelineConfig, stub: Stub) -> None:
    config = labelled(copy, stub)
    run(config, only="labels")
    storage, ref = Storage(config.execution.root), make_plan(config).labels[0].ref
    first = read_labels(config)
    storage.remove(f"{ref}/part-00001.json")
    storage.remove(f"{ref}/record.json")
    n_requests = len(stub.requests)
    outcomes = [o for o in run(config, only="labels") if o["task"] == "label_latents"]
    assert {o["part"]: o["outcome"] for o in outcomes} == {0: "cached", 1: "computed"}
    assert len(stub.requests) - n_requests == sum(row["n_requests"] for row in first[8:])
    assert read_labels(config) == first


def test_a_damaged_table_is_put_back_from_its_shards_without_asking(copy: PipelineConfig, stub: Stub) -> None:
    config = labelled(copy, stub)
    run(config, only="labels")
    storage, ref = Storage(config.execution.root), make_plan(config).labels[0].ref
    before, n_requests = read_labels(config), len(stub.requests)
    path = Path(storage.full(require_record(storage, ref).path("labels.parquet")))
    path.write_bytes(path.read_bytes()[:-1])
    outcomes = run(config, only="labels")
    assert {outcome["task"] for outcome in outcomes if outcome["outcome"] == "computed"} == {"merge_labels"}
    assert read_labels(config) == before
    assert len(stub.requests) == n_requests


def test_what_is_asked_about_is_true_of_the_stored_activations(copy: PipelineConfig) -> None:
    """Every window of the questions, encoded once more from the store, row by row."""
    endpoint = {"kind": "openai", "base_url": "http://127.0.0.1:9/v1", "model": "none"}
    config = with_settings(copy, {"labels": {"explainer": endpoint, "n_latents": 64}})
    storage, plan = Storage(config.execution.root), make_plan(config)
    record = write_questions(storage, plan.questions[0])
    with local_files(storage, record) as folder:
        rows = pq.read_table(folder / "questions.parquet").to_pylist()
    with local_files(storage, require_record(storage, plan.saes[0].ref)) as folder:
        sae = load_sae(folder).float()
    acts: dict[tuple[int, int], np.ndarray] = {}
    for spec in plan.snapshots.values():
        for block in iter_rows(storage, read_snapshot(storage, spec.ref)):
            with torch.no_grad():
                latents = sae.encode(torch.from_numpy(block.act.astype(np.float32))).numpy()
            acts |= {(seq, pos): latents[i] for i, (seq, pos) in enumerate(zip(block.seq, block.pos, strict=True))}
    width, n_left, n_context = 32, 24, 16
    silence = np.zeros(64)
    seen: Counter[str] = Counter()
    for row in rows:
        positions = range(max(0, row["pos"] - n_left), min(n_context, row["pos"] + width - n_left))
        if row["kind"] == "silent":  # only tokens of which something is known: separators have no row
            known = [pos for pos in positions if (row["seq"], pos) in acts]
            positions = next(run for run in runs(known) if row["pos"] in run)
        assert len(positions) == len(row["tokens"])
        fires = [bool(acts.get((row["seq"], pos), silence)[row["latent"]] > 0) for pos in positions]
        seen[f"{row['role']} {row['kind']}"] += 1
        if row["role"] == "detection":
            assert any(fires) == row["truth"]
        elif row["role"] == "fuzzing":
            assert sum(row["marked"]) == sum(fires)
            assert (row["marked"] == fires) == row["truth"]
        else:
            assert row["marked"] == fires
    kinds = {"shown top", "detection q3", "detection q0", "detection silent", "detection miss", "fuzzing q1"}
    assert kinds <= set(seen), seen


def test_labels_are_off_by_default(copy: PipelineConfig) -> None:
    assert make_plan(copy).labels == ()
    with pytest.raises(ConfigError, match=r"labels: the configuration has no such section"):
        run(copy, only="labels")


def test_no_name_of_a_document_is_sent(copy: PipelineConfig, stub: Stub) -> None:
    outcomes = run(labelled(copy, stub), only="labels")
    assert {outcome["stage"] for outcome in outcomes} == {"labels"}
    sent = json.dumps(stub.requests)
    assert "active on" in sent
    assert "document-0" not in sent
    assert copy.execution.root not in sent


def test_a_local_model_is_pinned_and_asked_without_an_endpoint(copy: PipelineConfig, tmp_path: Path) -> None:
    save_local_model(tmp_path / "model")
    local = {"kind": "huggingface", "name": str(tmp_path / "model")}
    config = with_settings(copy, {"labels": {"explainer": local, "n_latents": 3, "max_tokens": 8}})
    assert computed(run(config, only="labels")) == {"labels"}
    assert make_plan(config).labels[0].explainer.pinned.startswith("files:")
    assert {row["model"] for row in read_labels(config)} == {str(tmp_path / "model")}
    assert computed(run(config, only="labels")) == set()


def test_a_local_model_that_is_not_there_is_the_explainer_s_setting(copy: PipelineConfig) -> None:
    config = with_settings(copy, {"labels": {"explainer": {"kind": "huggingface", "name": "/nowhere"}}})
    with pytest.raises(InputError, match=r"/nowhere: no such folder. Check labels\.explainer\.name"):
        make_plan(config)
