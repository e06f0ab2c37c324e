"""A report of a real tiny model and a random SAE on it, and its server in a process of its own."""

import http.client
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
import torch

from sae.architectures import SAE, TopKConfig, build_sae
from sae.extract.config import PartsSpec, TokensSpec
from sae.report.config import ReportConfig, ReportedSAE, ReportSpec
from sae.report.render import render_report
from sae.statistics.config import StatisticsConfig, StatisticsSpec
from sae.store.artefacts import records
from sae.store.artefacts.records import Record
from sae.store.snapshots.snapshot import SnapshotSpec
from sae.store.storage.filesystem import Storage
from sae.subject.config import HFModel, HFModelSpec
from sae.subject.huggingface import pin_subject, resolve_pin
from sae.train.config import SAESpec, TrainConfig
from sae.weights import save_sae

ROOT = Path(__file__).parents[3]
HOOK_POINT = "gpt_neox.layers.0.mlp.act"
SEPARATOR = 0
CONTEXT = 16
D_IN, D_SAE = 12, 64
NOWHERE = "0" * 16


class Served(NamedTuple):
    """A report, what it was made from, and the same in memory."""

    storage: Storage
    record: Record
    sae: SAE
    model: Any
    given: ReportSpec
    """A report of given activations alone."""


class Answer(NamedTuple):
    """What a request came back with."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body. Every error has this form, and no trace in it."""
        assert self.headers["content-type"] == "application/json", self.body[:200]
        found = json.loads(self.body)
        if self.status != 200:
            assert set(found) == {"error"}
            assert set(found["error"]) == {"what", "where", "do"}
            assert "Traceback" not in str(found)
        return found


class Server(NamedTuple):
    """A running `sae-pipeline serve`."""

    url: str
    process: subprocess.Popen[str]

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """One request, its path sent as it is; `header_name` in Python is `header-name`."""
        at = urlsplit(self.url)
        connection = http.client.HTTPConnection(str(at.hostname), at.port, timeout=60)
        try:
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, names)
            response = connection.getresponse()
            head = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, head, response.read())
        finally:
            connection.close()

    def post(self, call: str, **fields: Any) -> Answer:
        """Call the API with a JSON body."""
        return self.ask("POST", f"/api/{call}", json.dumps(fields).encode(), content_type="application/json")


@pytest.fixture(scope="session")
def synthetic() -> ModuleType:
    """What makes artefacts of a report up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tests/sae/report"))
        return importlib.import_module("synthetic")


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory, one_layer_model: Path, synthetic: ModuleType) -> Served:
    """Two SAEs: `live` on the one-layer model, `given` without a model. Statistics are made up, weights are not."""
    from transformers import GPTNeoXForCausalLM

    storage = Storage(str(tmp_path_factory.mktemp("serve") / "root"))
    subject = HFModelSpec(
        config=HFModel(name=str(one_layer_model)), pinned=resolve_pin(HFModel(name=str(one_layer_model)))
    )
    pin_subject(storage, subject)
    tokens = TokensSpec(
        segment=f"segments/{NOWHERE}",
        tokenizer=subject.ref,
        context_tokens=CONTEXT,
        packing=True,
        syntax=False,
        seed=0,
    )
    _commit(storage, tokens, {"special_ids": [SEPARATOR], "separator_id": SEPARATOR})
    parts = PartsSpec(
        tokens=tokens.ref,
        subject=subject.ref,
        split="train",
        hook_point=HOOK_POINT,
        dtype="float16",
        part_bytes=1,
        row_group_bytes=1,
        batch_contexts=4,
        keep_special=False,
        seed=0,
    )
    _commit(storage, parts, {"dropped_ids": [SEPARATOR]})
    snapshot = SnapshotSpec(parts=(parts.ref,), n_tokens=None)
    _commit(storage, snapshot)

    config = TrainConfig(sae=TopKConfig(d_sae=D_SAE, k=4), hook_point=HOOK_POINT)
    sae_spec = SAESpec(config=config, snapshot=snapshot.ref, order_seed=0)
    sae = random_sae(config.sae)
    with storage.staging() as folder:
        save_sae(sae, folder)
        records.commit(storage, sae_spec, folder, {}, seconds=0)

    statistics = StatisticsSpec(
        config=StatisticsConfig(),
        sae=sae_spec.ref,
        snapshots={"train": snapshot.ref},
        tokens=(tokens.ref,),
        subject=subject.ref,
        hook_point=HOOK_POINT,
        seed=0,
    )
    _commit_copy(storage, statistics, synthetic.write_statistics(storage, "live", D_SAE))
    # Without a model, as statistics of given activations are.
    given = statistics.model_copy(update={"subject": None, "tokens": ()})
    _commit_copy(storage, given, synthetic.write_statistics(storage, "given", 8, has_text=False))
    entries = (
        ReportedSAE(
            name="live",
            family="live",
            sparsity="k 4",
            sae=sae_spec.ref,
            evaluation=synthetic.write_evaluation(storage, "live", D_SAE),
            statistics=statistics.ref,
        ),
        ReportedSAE(
            name="given",
            family="given",
            sparsity="k 4",
            sae=synthetic.write_sae(storage, "given", 8),
            evaluation=synthetic.write_evaluation(storage, "given", 8, rules=False),
            statistics=given.ref,
        ),
    )
    spec = ReportSpec(config=ReportConfig(title="Served"), saes=entries)
    record = render_report(storage, spec, synthetic.LINEAGE)
    model = GPTNeoXForCausalLM.from_pretrained(one_layer_model).eval()
    return Served(storage, record, sae, model, ReportSpec(config=ReportConfig(title="Given"), saes=entries[1:]))


@pytest.fixture(scope="session")
def server(served: Served) -> Iterator[Server]:
    """`sae-pipeline serve` on a free port, for all tests."""
    yield from start_server(served.storage.uri(served.record.ref))


@pytest.fixture
def new_server() -> Iterator[Any]:
    """`new_server(uri)`: one for a test that ends it."""
    started = []

    def start(uri: str) -> Server:
        started.append(start_server(uri))
        return next(started[-1])

    yield start
    for one in started:
        next(one, None)


def start_server(uri: str) -> Iterator[Server]:
    """A server while the caller holds the iterator."""
    command = [sys.executable, "-m", "flows.cli", "serve", uri, "--port", "0"]
    # One thread: models this small are slower with more.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            assert line.startswith("report: http://127.0.0.1:"), line + (
                process.stderr.read() if process.stderr else ""
            )
            yield Server(line.split()[1].rstrip("/"), process)
        finally:
            process.kill()


def random_sae(config: TopKConfig) -> SAE:
    """An SAE whose latents matter to the model: decoder rows are long."""
    generator = torch.Generator().manual_seed(0)
    sae = build_sae(config, D_IN).requires_grad_(False)
    sae.W_dec.copy_(torch.randn(sae.W_dec.shape, generator=generator))
    sae.W_enc.copy_(torch.randn(sae.W_enc.shape, generator=generator))
    sae.b_enc.copy_(torch.rand(D_SAE, generator=generator))
    sae.b_dec.copy_(0.1 * torch.randn(D_IN, generator=generator))
    return sae


def _commit(storage: Storage, spec: Any, metrics: dict[str, Any] | None = None) -> None:
    with storage.staging() as folder:
        records.commit(storage, spec, folder, metrics or {}, seconds=0)


def _commit_copy(storage: Storage, spec: Any, ref: str) -> None:
    """Commit the files of another artefact under `spec`."""
    with (
        records.local_files(storage, records.require_record(storage, ref)) as files,
        storage.staging() as folder,
    ):
        shutil.copytree(files, folder, dirs_exist_ok=True)
        records.commit(storage, spec, folder, {}, seconds=0)
