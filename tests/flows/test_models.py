"""Models made on the spot with `save_pretrained` go through the whole DAG, loaded as any Hugging Face model is."""

import json
from pathlib import Path

import pytest

from sae.plan import make_plan
from sae.store.artefacts.records import local_files, require_record, verify
from sae.store.storage.filesystem import Storage
from tests.flows.conftest import tiny_config
from tests.flows.models import HOOK_POINTS, save_model

pytestmark = pytest.mark.usefixtures("prefect_backend")

BEFORE, AFTER, MLP_OUT, MLP_HIDDEN = range(4)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        pytest.param("gpt_neox", MLP_HIDDEN, marks=pytest.mark.slow),  # the embedded subject is one
        ("gpt2", BEFORE),
        ("llama", AFTER),
        pytest.param("qwen2", MLP_HIDDEN, marks=pytest.mark.slow),
        ("qwen3", MLP_OUT),
        ("bert", AFTER),
    ],
)
def test_a_hugging_face_model_goes_through_the_whole_dag(family: str, kind: int, tmp_path: Path, corpus: Path) -> None:
    from flows.pipeline import pipeline

    save_model(family, tmp_path / "model")
    config = tiny_config(
        tmp_path / "root",
        corpus,
        subject={"kind": "huggingface", "name": str(tmp_path / "model")},
        activations={"hook_points": [HOOK_POINTS[family][kind]], "n_tokens": 1500, "n_heldout_tokens": 500},
        evaluation={"n_contexts": 8, "n_bootstrap": 20},
    )
    pipeline(config)
    storage, plan = Storage(config.execution.root), make_plan(config)
    assert plan.control is None
    for spec in plan.specs():
        assert verify(storage, require_record(storage, spec.ref)) == []
    subject = require_record(storage, plan.subject.ref)
    assert subject.spec["pinned"].startswith("files:")
    assert subject.metrics["causal"] == (family != "bert")

    record = require_record(storage, plan.evaluations[0].ref)
    with local_files(storage, record) as folder:
        evaluation = json.loads((folder / "evaluation.json").read_text())
    assert 0 < evaluation["fvu"] < 1.5
    if family == "bert":
        assert evaluation["ce"] is None
        assert not any(name.startswith("ce_") for name in record.metrics)
    else:
        ce = evaluation["ce"]
        assert 0 < ce["clean"] < 20
        assert ce["increase"] == pytest.approx(ce["sae"] - ce["clean"])
        assert ce["sae"] != ce["clean"]

    report = require_record(storage, plan.report.ref)
    page = storage.read_bytes(report.path("index.html")).decode()
    assert "CE increase" in page
    assert ("not measured" in page) == (family == "bert")
