"""A report that has every view: two SAEs of one hook point with weights and text, one of given activations."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from synthetic import toy_concepts, write_evaluation, write_sae, write_statistics
from synthetic_text import HOSTILE, HOSTILE_TEXT

from sae.architectures import build_sae
from sae.architectures.config import TopKConfig
from sae.config import Spec
from sae.explain.config import EndpointModel, LabelsSpec
from sae.explain.label import labels_schema
from sae.report.config import ReportConfig, ReportedSAE, ReportSpec
from sae.store.artefacts import records
from sae.store.storage.filesystem import Storage
from sae.weights import save_sae

D_IN = 64
N_LABELLED = 60
"""Latents of the first SAE that a model was asked about."""


class WeightsSpec(Spec):
    stage = "saes"
    code_version = 1

    name: str
    config: dict[str, int]
    snapshot: str = "activations/0123456789abcdef"


def write_weights(storage: Storage, name: str, W_dec: np.ndarray, seed: int = 0) -> str:
    """A TopK SAE with this decoder, on the same activations as all others. Returns: its ref."""
    spec = WeightsSpec(name=name, config={"seed": seed})
    sae = build_sae(TopKConfig(d_sae=len(W_dec), k=8), W_dec.shape[1]).requires_grad_(False)
    sae.W_dec.copy_(torch.from_numpy(W_dec))
    with storage.staging() as folder:
        save_sae(sae, folder)
        records.commit(storage, spec, folder, {}, seconds=0.0)
    return spec.ref


def whole_spec(
    storage: Storage, *, n_latents: int = 300, n_other: int = 120, hostile: bool = False, **options: Any
) -> ReportSpec:
    """Write everything the report needs and return its spec; `options` are ReportConfig's.

    The larger SAE has the directions of the smaller one, a little turned, and others. With `hostile` tokens, labels,
    names of documents, SAEs, concepts and models, a model's words and the title try to be markup.
    """
    rng = np.random.default_rng(3)
    small = rng.standard_normal((n_other, D_IN), np.float32)
    large = rng.standard_normal((n_latents, D_IN), np.float32)
    large[:n_other] = small + 0.2 * rng.standard_normal(small.shape, np.float32)
    marked = (lambda text: f"{HOSTILE_TEXT} {text}") if hostile else str
    words = marked("calls and their names")
    concepts = toy_concepts()
    concepts["labels"][0] = concepts["concepts"][0]["name"] = marked("cat")
    saes = []
    for name, W_dec in ((marked("large"), large), (marked("small"), small)):
        labels = write_labels(storage, words, marked("stub 7B")) if W_dec is large else None
        evaluation = write_evaluation(storage, name, len(W_dec), rule_name=words if hostile else None)
        statistics = write_statistics(storage, name, len(W_dec), extra=HOSTILE if hostile else ())
        sae = write_weights(storage, name, W_dec)
        saes.append(
            ReportedSAE(
                name=name,
                family=name,
                sparsity="k 8",
                sae=sae,
                evaluation=evaluation,
                statistics=statistics,
                labels=labels,
            )
        )
    saes.append(
        ReportedSAE(
            name=marked("toy"),
            family=marked("toy"),
            sparsity="k 1",
            sae=write_sae(storage, "toy", 8),
            evaluation=write_evaluation(storage, "toy", 8, rules=False, concepts=concepts, fvu=0.02),
            statistics=write_statistics(storage, "toy", 8, has_text=False),
        )
    )
    title = marked("Python standard library, one-layer LM")
    return ReportSpec(config=ReportConfig(title=title, **({"chunk_bytes": 20_000} | options)), saes=tuple(saes))


def write_labels(storage: Storage, words: str, model: str) -> str:
    """What a model says about every other latent of the first N_LABELLED: words, or every fourth time an error."""
    spec = LabelsSpec(
        questions="questions/" + "0" * 16,
        explainer=EndpointModel(model=model, temperature=0.0),
        contexts_per_request=8,
        max_tokens=100,
        seed=0,
    )
    scores = {
        f"{test}_{name}": value
        for test in ("detection", "fuzzing")
        for name, value in {
            "balanced_accuracy": 0.8,
            "balanced_accuracy_low": 0.7,
            "balanced_accuracy_high": 0.9,
            "n": 32,
        }.items()
    }
    rows = [
        {"latent": latent, "explanation": words, "error": None, "model": model, "n_unparsed": 0} | scores
        if latent % 8
        else {"latent": latent, "explanation": None, "error": f"status 500: {words}", "model": model, "n_unparsed": 0}
        for latent in range(0, N_LABELLED, 2)
    ]
    with storage.staging() as folder:
        pq.write_table(pa.Table.from_pylist(rows, labels_schema()), folder / "labels.parquet")
        records.commit(storage, spec, folder, {}, seconds=0.0)
    return spec.ref
