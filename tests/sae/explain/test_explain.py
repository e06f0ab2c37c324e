"""Shards of latents asked about at a real HTTP server or a tiny local model; scores worked by hand."""

import json
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae.errors import InputError, StopRequested, TransientError
from sae.explain.config import ChatEndpoint, ContextsConfig, EndpointModel, LabelsSpec, QuestionsSpec
from sae.explain.explain import LATENTS_PER_SHARD, count_shards, label_shard, map_in_order, merge_labels
from sae.explain.questions import SCHEMA
from sae.progress import silent
from sae.store.artefacts.records import commit, local_files, require_record
from sae.store.storage.filesystem import Storage
from sae.subject.config import HFModel, HFModelSpec
from sae.subject.huggingface import resolve_pin
from tests.sae.explain.local_model import save_local_model
from tests.sae.explain.stub import KEY, Fault, Stub

N_LATENTS = LATENTS_PER_SHARD + 3
SILENT_LATENT = 2


def word(latent: int) -> str:
    return f"word{chr(ord('a') + latent)}"


def question(latent: int, role: str, number: int, kind: str, truth: bool | None, text: str, at: int = 1) -> dict:
    tokens = [b"x ", text.encode(), f" {role}{number}".encode()]
    fires = [index == 1 and (truth is not False or role == "fuzzing") for index in range(3)]
    return {
        "latent": latent,
        "role": role,
        "number": number,
        "kind": kind,
        "truth": truth,
        "tokens": tokens,
        "marked": [index == at for index in range(3)] if role != "detection" else [False] * 3,
        "activations": [float(fired) for fired in fires],
        "segment": 0,
        "seq": number,
        "pos": 1,
    }


def rows_of(latent: int) -> list[dict]:
    """The latent fires on its word; of 8 contexts where it fires 2 lack the word, of 8 where it does not 2 have it.

    Fuzzing: 4 right, all on the word; 4 wrong, of which 1 marks a word that only looks wrong.
    """
    mine = word(latent)
    shown = [question(latent, "shown", i, "top", None, mine) for i in range(3)]
    firing = [question(latent, "detection", i, f"q{i % 4}", True, mine if i < 6 else "other") for i in range(8)]
    quiet = [question(latent, "detection", 8 + i, "miss", False, mine if i < 2 else "other") for i in range(8)]
    right = [question(latent, "fuzzing", i, "q0", True, mine) for i in range(4)]
    wrong = [question(latent, "fuzzing", 4 + i, "q1", False, mine, at=1 if i == 0 else 0) for i in range(4)]
    return shown + firing + quiet + right + wrong


@pytest.fixture
def spec(storage: Storage) -> LabelsSpec:
    """Labels of 11 latents whose questions lie in the store; one has too few firings to be asked about."""
    questions = QuestionsSpec(
        contexts=ContextsConfig(),
        n_latents=N_LATENTS,
        latents=None,
        sae="saes/" + "0" * 16,
        statistics="statistics/" + "0" * 16,
        tokens=(),
        snapshot="activations/" + "0" * 16,
        window_tokens=3,
        seed=0,
    )
    rows = [row for latent in range(N_LATENTS) if latent != SILENT_LATENT for row in rows_of(latent)]
    listed = [
        {"latent": latent, "n_fired": 9, "not_asked_because": "it never fires" if latent == SILENT_LATENT else None}
        for latent in range(N_LATENTS)
    ]
    with storage.staging() as folder:
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / "questions.parquet")
        (folder / "questions.json").write_text(json.dumps({"latents": listed}))
        commit(storage, questions, folder, {}, seconds=0.0)
    model = EndpointModel(model="stub", temperature=0.0)
    return LabelsSpec(questions=questions.ref, explainer=model, contexts_per_request=8, max_tokens=50, seed=0)


def label_all(storage: Storage, spec: LabelsSpec, explainer: Any) -> list[dict[str, Any]]:
    for part in range(count_shards(storage, spec)):
        label_shard(storage, spec, part, explainer)
    return read(storage, merge_labels(storage, spec), "labels.parquet")


def read(storage: Storage, record: Any, name: str) -> list[dict[str, Any]]:
    with local_files(storage, record) as folder:
        return pq.read_table(folder / name).to_pylist()


def counts(row: dict[str, Any], test: str) -> list[Any]:
    names = ("true_positive", "false_positive", "true_negative", "false_negative", "n", "n_unparsed")
    return [row[f"{test}_{name}"] for name in names]


def test_scores_are_those_worked_by_hand(
    storage: Storage, spec: LabelsSpec, stub: Stub, endpoint: ChatEndpoint
) -> None:
    labels = label_all(storage, spec, endpoint)
    assert [row["latent"] for row in labels] == list(range(N_LATENTS))
    for row in labels:
        if row["latent"] == SILENT_LATENT:
            continue
        assert (row["explanation"], row["error"], row["model"]) == (f"the word {word(row['latent'])}", None, "stub")
        assert counts(row, "detection") == [6, 2, 6, 2, 16, 0]
        assert counts(row, "fuzzing") == [4, 1, 3, 0, 8, 0]
        assert row["detection_balanced_accuracy"] == pytest.approx(0.75)
        assert [row[f"detection_balanced_accuracy_{end}"] for end in ("low", "high")] == pytest.approx(
            [0.50907, 0.87623], abs=2e-5
        )
        assert (row["fuzzing_accuracy"], row["fuzzing_recall"], row["fuzzing_precision"]) == (7 / 8, 1.0, 4 / 5)
        # One explanation, two detection requests of 8, one of fuzzing.
        assert (row["n_requests"], row["prompt_tokens"], row["completion_tokens"]) == (4, 400, 28)


def test_a_latent_that_is_not_asked_about_says_why(
    storage: Storage, spec: LabelsSpec, stub: Stub, endpoint: ChatEndpoint
) -> None:
    row = label_all(storage, spec, endpoint)[SILENT_LATENT]
    assert (row["explanation"], row["error"], row["n_requests"]) == (None, "it never fires", 0)
    assert row["detection_accuracy"] is row["detection_n"] is None
    assert not any(word(SILENT_LATENT) in json.dumps(request) for request in stub.requests)


def test_the_summary_counts_latents_requests_and_tokens(
    storage: Storage, spec: LabelsSpec, endpoint: ChatEndpoint
) -> None:
    label_all(storage, spec, endpoint)
    record = require_record(storage, spec.ref)
    with local_files(storage, record) as folder:
        summary = json.loads((folder / "labels.json").read_text())
    assert summary["model_in_answers"] == ["stub-2026"]
    assert (summary["n_latents"], summary["n_explained"], summary["n_failed"]) == (11, 10, 1)
    assert (summary["n_requests"], summary["prompt_tokens"]) == (40, 4000)
    assert summary["detection_balanced_accuracy"] == pytest.approx(0.75)
    assert summary["right_by_kind"]["detection"] == {"miss": [60, 80], "q0": [20, 20], "q1": [20, 20]} | {
        "q2": [10, 20],
        "q3": [10, 20],
    }
    answers = read(storage, record, "answers.parquet")
    assert len(answers) == 10 * 24
    assert sum(row["answer"] == row["truth"] for row in answers) == 10 * (12 + 7)


def test_results_do_not_depend_on_how_many_requests_run_at_once(
    tmp_path: Path, storage: Storage, spec: LabelsSpec, stub: Stub, endpoint: ChatEndpoint
) -> None:
    stub.delay = 0.01
    one = ChatEndpoint.model_validate(endpoint.model_dump() | {"n_at_once": 1})
    first = label_shard(storage, spec, 0, one)
    assert stub.most_at_once == 1
    many = ChatEndpoint.model_validate(endpoint.model_dump() | {"n_at_once": 3})
    again = label_shard(storage, spec, 0, many)  # other bytes would be an error
    assert stub.most_at_once == 3
    assert again.content == first.content


def test_an_answer_that_cannot_be_read_is_asked_for_once_more_and_then_counted(
    storage: Storage, spec: LabelsSpec, stub: Stub, endpoint: ChatEndpoint
) -> None:
    def fault_of(prompt: str) -> Fault | None:
        is_detection = "numbered passages" in prompt and "marked" not in prompt
        return Fault(content="I think so") if is_detection and word(1) in prompt else None

    stub.fault_of = fault_of
    row = label_all(storage, spec, endpoint)[1]
    assert counts(row, "detection") == [0, 0, 0, 0, 0, 16]
    assert row["detection_accuracy"] is None
    assert counts(row, "fuzzing") == [4, 1, 3, 0, 8, 0]
    assert (row["n_unparsed"], row["n_requests"], row["error"]) == (2, 1 + 2 * 2 + 1, None)
    asked_again = [request for request in stub.requests if len(request["messages"]) == 3]
    assert [message["role"] for message in asked_again[0]["messages"]] == ["user", "assistant", "user"]
    assert asked_again[0]["seed"] == 1


def test_an_explanation_that_cannot_be_read_leaves_none(
    storage: Storage, spec: LabelsSpec, stub: Stub, endpoint: ChatEndpoint
) -> None:
    stub.fault_of = lambda prompt: Fault(content="no JSON") if f"<<{word(3)}>>" in prompt else None
    row = label_all(storage, spec, endpoint)[3]
    assert (row["explanation"], row["n_unparsed"], row["n_requests"]) == (None, 1, 2)
    assert "JSON" in row["error"]


def test_a_latent_whose_requests_fail_for_good_is_recorded_and_the_others_go_on(
    storage: Storage, spec: LabelsSpec, stub: Stub, endpoint: ChatEndpoint
) -> None:
    endpoint = ChatEndpoint.model_validate(endpoint.model_dump() | {"n_retries": 1})
    stub.fault_of = lambda prompt: Fault(500, body=f"broken {KEY}".encode()) if word(4) in prompt else None
    labels = label_all(storage, spec, endpoint)
    assert labels[4]["explanation"] is None
    assert labels[4]["error"] == "status 500: broken [key] (tried 2 times)"
    assert [row["latent"] for row in labels if row["error"]] == [SILENT_LATENT, 4]


def test_a_server_that_answers_nobody_is_not_the_latents_fate(
    storage: Storage, spec: LabelsSpec, stub: Stub, endpoint: ChatEndpoint
) -> None:
    endpoint = ChatEndpoint.model_validate(endpoint.model_dump() | {"n_retries": 0})
    stub.fault_of = lambda _: Fault(503)
    with pytest.raises(TransientError, match=r"labels\.explainer\.base_url: .* answers no request: status 503"):
        label_shard(storage, spec, 0, endpoint)
    assert not storage.exists(f"{spec.ref}/part-00000.json")
    stub.fault_of = lambda prompt: None if "Say OK" in prompt else Fault(503)
    record = label_shard(storage, spec, 0, endpoint)
    assert record.metrics["n_explained"] == 0


def test_settings_that_no_request_gets_through_with_are_not_the_latents_fate(
    storage: Storage, spec: LabelsSpec, stub: Stub, endpoint: ChatEndpoint
) -> None:
    stub.fault_of = lambda _: Fault(400, body=b"use max_completion_tokens")
    with pytest.raises(InputError, match=r"answers no request: refused with status 400: use max_completion_tokens"):
        label_shard(storage, spec, 0, endpoint)
    assert not storage.exists(f"{spec.ref}/part-00000.json")


def test_a_wrong_key_stops_and_commits_nothing(
    storage: Storage, spec: LabelsSpec, stub: Stub, endpoint: ChatEndpoint
) -> None:
    stub.key = "another"
    with pytest.raises(InputError, match=r"labels\.explainer\.api_key_env"):
        label_shard(storage, spec, 0, endpoint)
    assert not storage.exists(f"{spec.ref}/part-00000.json")


def test_nothing_but_the_windows_is_sent(
    storage: Storage, spec: LabelsSpec, stub: Stub, endpoint: ChatEndpoint
) -> None:
    label_all(storage, spec, endpoint)
    sent = json.dumps(stub.requests)
    for secret in (spec.ref, spec.questions, "seq", "segment", storage.root):
        assert secret not in sent


def test_the_same_shard_twice_has_the_same_bytes(storage: Storage, spec: LabelsSpec, endpoint: ChatEndpoint) -> None:
    first, second = (label_shard(storage, spec, 1, endpoint) for _ in range(2))
    assert first.content == second.content


def test_results_come_in_the_order_of_jobs_and_errors_at_once() -> None:
    event = threading.Event()

    def slow(job: int) -> int:
        if job == 0:
            event.wait(5)
        elif job == 3:
            event.set()
        return job * job

    assert map_in_order(slow, range(6), 2, silent) == [0, 1, 4, 9, 16, 25]

    def failing(job: int) -> None:
        if job == 1:
            raise InputError("at once")
        never.wait(5)

    never = threading.Event()
    with pytest.raises(InputError, match="at once"):
        map_in_order(failing, range(4), 2, silent)
    never.set()


def test_a_stop_is_noticed_while_requests_wait() -> None:
    never = threading.Event()
    calls = 0

    def progress(done: int, total: int, unit: str, note: str = "") -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise StopRequested("stopped by SIGTERM")

    with pytest.raises(StopRequested):
        map_in_order(lambda _: never.wait(5), range(3), 1, progress)
    never.set()


@pytest.mark.parametrize("template", [False, True])
def test_a_local_model_with_random_weights_is_asked_and_understood_by_nobody(
    storage: Storage, spec: LabelsSpec, tmp_path: Path, template: bool
) -> None:
    save_local_model(tmp_path / "model")
    if template:
        text = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant]"
        (tmp_path / "model" / "chat_template.jinja").write_text(text)
    config = HFModel(name=str(tmp_path / "model"))
    pinned = HFModelSpec(config=config, pinned=resolve_pin(config))
    spec = LabelsSpec.model_validate(spec.model_dump() | {"explainer": pinned.model_dump(), "max_tokens": 8})
    record, again = (label_shard(storage, spec, 1, config) for _ in range(2))
    assert record.content == again.content  # greedy
    for row in read(storage, record, "labels.parquet"):
        assert (row["explanation"], row["n_unparsed"], row["n_requests"]) == (None, 1, 2)
        assert row["completion_tokens"] <= 16
        assert row["prompt_tokens"] > 500


def test_a_prompt_that_a_local_model_does_not_take_is_the_latent_s_reason(
    storage: Storage, spec: LabelsSpec, tmp_path: Path
) -> None:
    save_local_model(tmp_path / "model", longest=64)
    config = HFModel(name=str(tmp_path / "model"))
    pinned = HFModelSpec(config=config, pinned=resolve_pin(config))
    spec = LabelsSpec.model_validate(spec.model_dump() | {"explainer": pinned.model_dump(), "max_tokens": 8})
    for row in read(storage, label_shard(storage, spec, 1, config), "labels.parquet"):
        assert "are more than the 64 tokens" in row["error"]
