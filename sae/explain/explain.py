"""Ask a model to explain latents and to find them again by its explanations: shard by shard, then one table.

An endpoint may answer otherwise tomorrow. Answers are therefore asked for once: a shard that is committed is never
asked again, and a refresh that gets other answers is an error that leaves the recorded ones, as for every artefact. To
ask anew, delete the artefact's folder or change the seed.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sae.errors import InputError, TransientError
from sae.explain.config import AnyExplainer, ChatEndpoint, EndpointModel, LabelsSpec
from sae.explain.endpoint import EndpointExplainer
from sae.explain.explainer import Explainer, NoAnswer, add_tokens
from sae.explain.label import ANSWERS_SCHEMA, TESTS, label_latent, labels_schema
from sae.explain.local import LocalExplainer
from sae.progress import Progress, silent
from sae.store.artefacts import records
from sae.store.artefacts.records import Record
from sae.store.storage.filesystem import Storage

logger = logging.getLogger(__name__)

Job = TypeVar("Job")
Result = TypeVar("Result")

LATENTS_PER_SHARD = 8
"""Latents that are asked about in one task, and lost when it is killed. Another number is another set of parts: bump
PROMPT_VERSION."""
LABELS_FILE, ANSWERS_FILE = "labels.parquet", "answers.parquet"
INTERVALS = (
    "95 %: Wilson 1927 for accuracy, precision and recall; for balanced accuracy the Wilson intervals of recall and "
    "specificity joined (Newcombe 1998); for f1 the Wilson interval of TP / (TP + FP + FN), transformed. Answers are "
    "taken as independent; contexts of one document and answers to one request are not, so true intervals are wider."
)


def count_shards(storage: Storage, spec: LabelsSpec) -> int:
    """How many parts the artefact is made of. Raises: StoreError when the questions are not there."""
    return -(-len(_latents(storage, spec)) // LATENTS_PER_SHARD)


def label_shard(
    storage: Storage,
    spec: LabelsSpec,
    part: int,
    explainer: AnyExplainer,
    *,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> Record:
    """Explain and test the latents of one shard and commit what came of it.

    A latent without an answer is recorded with the reason. The order of requests in time decides nothing.

    Args:
        explainer: where the model of `spec` is asked.
        device: where a model in memory runs.

    Raises:
        InputError: the key is missing or refused, the model is unknown or cannot be loaded, every request is refused.
        TransientError: nobody is there to ask, or nobody answers at all.
    """
    started = time.perf_counter()
    latents = _latents(storage, spec)[part * LATENTS_PER_SHARD : (part + 1) * LATENTS_PER_SHARD]
    asked = [entry["latent"] for entry in latents if entry["not_asked_because"] is None]
    questions = _read_questions(storage, spec, asked)
    model = open_explainer(spec, explainer, device)
    try:
        jobs = [(entry, questions.get(entry["latent"], [])) for entry in latents]
        labelled = map_in_order(lambda job: label_latent(model, spec, *job), jobs, model.n_at_once, progress)
        failures = [each.failure for each in labelled if each.row["latent"] in questions]
        _raise_on_outage(model, spec, explainer, failures)
    finally:
        model.close()
    rows = [each.row for each in labelled]
    metrics = _counts(rows) | {"models": sorted({name for each in labelled for name in each.models})}
    with storage.staging() as folder:
        pq.write_table(pa.Table.from_pylist(rows, labels_schema()), folder / LABELS_FILE, compression="zstd")
        answers = pa.Table.from_pylist([row for each in labelled for row in each.answers], ANSWERS_SCHEMA)
        pq.write_table(answers, folder / ANSWERS_FILE, compression="zstd")
        seconds = time.perf_counter() - started
        return records.commit(storage, spec, folder, metrics, seconds=seconds, part=part, device=device)


def merge_labels(storage: Storage, spec: LabelsSpec, *, progress: Progress = silent) -> Record:
    """Join the shards and sum up (`labels.parquet`, `answers.parquet`, `labels.json`).

    Raises: StoreError when a shard is not finished.
    """
    started = time.perf_counter()
    n_shards = count_shards(storage, spec)
    tables: dict[str, list[pa.Table]] = {LABELS_FILE: [], ANSWERS_FILE: []}
    models: set[str] = set()
    for part in range(n_shards):
        record = records.require_record(storage, spec.ref, part)
        with records.local_files(storage, record) as folder:
            for name, found in tables.items():
                found.append(pq.read_table(folder / name))
        models |= set(record.metrics["models"])
        progress(part + 1, n_shards, "parts", "merged")
    labels, answers = (pa.concat_tables(found) for found in tables.values())
    metrics = _counts(labels.to_pylist()) | _means(labels)
    summary = {
        "model": spec.model_name,
        "explainer": spec.explainer.model_dump(mode="json"),
        "model_in_answers": sorted(models),
        "prompt_version": spec.code_version,
        "seed": spec.seed,
        **metrics,
        "intervals": INTERVALS,
        "chance": "balanced accuracy .5",
        "right_by_kind": _right_by_kind(answers),
    }
    with storage.staging() as folder:
        pq.write_table(labels, folder / LABELS_FILE, compression="zstd")
        pq.write_table(answers, folder / ANSWERS_FILE, compression="zstd")
        (folder / "labels.json").write_text(json.dumps(summary, indent=1) + "\n")
        return records.commit(storage, spec, folder, metrics, seconds=time.perf_counter() - started)


def open_explainer(spec: LabelsSpec, explainer: AnyExplainer, device: torch.device | str = "cpu") -> Explainer:
    """The model that the spec names, ready to be asked. Raises: InputError when it is not to be had."""
    if isinstance(spec.explainer, EndpointModel):
        assert isinstance(explainer, ChatEndpoint)
        return EndpointExplainer(explainer)
    return LocalExplainer(spec.explainer, device)


def map_in_order(
    function: Callable[[Job], Result], jobs: Sequence[Job], n_at_once: int, progress: Progress
) -> list[Result]:
    """Call `function` on every job, several at a time; results in the jobs' order.

    Raises: the error of a call as soon as it fails, or of `progress`; calls that have begun are left to themselves.
    """
    pool = ThreadPoolExecutor(n_at_once, thread_name_prefix="explainer")
    try:
        futures = [pool.submit(function, job) for job in jobs]
        pending: set[Future[Result]] = set(futures)
        while pending:
            progress(len(jobs) - len(pending), len(jobs), "latents")
            finished, pending = wait(pending, timeout=0.5, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
        progress(len(jobs), len(jobs), "latents")
        return [future.result() for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _raise_on_outage(
    model: Explainer, spec: LabelsSpec, explainer: AnyExplainer, failures: list[NoAnswer | None]
) -> None:
    """Do not record as latents' fate what is the server's or the settings': where no latent got through, ask something
    harmless.

    Raises: TransientError when that gets no answer either; InputError when it is refused.
    """
    if not failures or any(failure is None for failure in failures):
        return
    try:
        model.complete([{"role": "user", "content": "Say OK."}], max_tokens=spec.max_tokens, seed=spec.seed)
    except NoAnswer as err:
        where = f"base_url: {explainer.base_url}" if isinstance(explainer, ChatEndpoint) else f"name: {explainer.name}"
        kind = TransientError if err.outage else InputError
        raise kind(f"labels.explainer.{where} answers no request: {err}") from err


def _latents(storage: Storage, spec: LabelsSpec) -> list[dict[str, Any]]:
    """Every latent with its number of firings and why it is not asked about, in order."""
    record = records.require_record(storage, spec.questions)
    with records.local_files(storage, record, "questions.json") as folder:
        return list(json.loads((folder / "questions.json").read_text())["latents"])


def _read_questions(storage: Storage, spec: LabelsSpec, latents: list[int]) -> dict[int, list[dict[str, Any]]]:
    """Latent -> its rows of questions.parquet, in order."""
    record = records.require_record(storage, spec.questions)
    found: dict[int, list[dict[str, Any]]] = {}
    with records.local_files(storage, record, "questions.parquet") as folder:
        path: Path = folder / "questions.parquet"
        for row in pq.read_table(path, filters=[("latent", "in", latents)]).to_pylist() if latents else []:
            found.setdefault(row["latent"], []).append(row)
    return found


def _counts(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What was asked and what it cost, summed over latents."""
    return {
        "n_latents": len(rows),
        "n_explained": sum(row["explanation"] is not None for row in rows),
        "n_failed": sum(row["error"] is not None for row in rows),
        "n_unparsed": sum(row["n_unparsed"] for row in rows),
        "n_requests": sum(row["n_requests"] for row in rows),
        "prompt_tokens": add_tokens([row["prompt_tokens"] for row in rows]),
        "completion_tokens": add_tokens([row["completion_tokens"] for row in rows]),
    }


def _means(labels: pa.Table) -> dict[str, float | None]:
    """Balanced accuracy of every test, over the latents that have one."""
    found: dict[str, float | None] = {}
    for test in TESTS:
        values = [value for value in labels[f"{test}_balanced_accuracy"].to_pylist() if value is not None]
        found[f"{test}_balanced_accuracy"] = sum(values) / len(values) if values else None
    return found


def _right_by_kind(answers: pa.Table) -> dict[str, dict[str, list[int]]]:
    """Test -> kind of context -> [answered rightly, answered], over all latents: where explanations fail."""
    found: dict[str, dict[str, list[int]]] = {test: {} for test in TESTS}
    for row in answers.to_pylist():
        if row["answer"] is not None:
            counts = found[row["test"]].setdefault(row["kind"], [0, 0])
            counts[0] += row["answer"] == row["truth"]
            counts[1] += 1
    return {test: dict(sorted(kinds.items())) for test, kinds in found.items()}
