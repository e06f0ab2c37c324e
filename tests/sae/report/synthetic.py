"""Artefacts as the earlier stages write them, small and made up: what a report can be rendered from in a second."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from synthetic_statistics import write_tables
from synthetic_text import HOSTILE, HOSTILE_TEXT, source_text

from sae.config import Spec
from sae.report.config import ReportConfig, ReportedSAE, ReportSpec
from sae.store import records
from sae.store.filesystem import Storage


class GivenSpec(Spec):
    """Stands for the spec of any stage."""

    kind: str
    name: str


def _spec_of(stage: str, kind: str, name: str) -> Spec:
    found = type("GivenSpec", (GivenSpec,), {"stage": stage, "code_version": 1, "__module__": __name__})
    return found(kind=kind, name=name)


def _commit(storage: Storage, spec: Spec, write: Callable[[Path], None]) -> str:
    with storage.staging() as folder:
        write(folder)
        records.commit(storage, spec, folder, {}, seconds=0.0)
    return spec.ref


def write_sae(storage: Storage, name: str, d_sae: int) -> str:
    """cfg.json and metrics.parquet of an SAE."""

    def write(folder: Path) -> None:
        steps = np.arange(1, 151)
        decay = np.exp(-steps / 30)
        table = {
            "step": steps * 3,
            "n_tokens": steps * 6144,
            "loss": 0.2 + decay,
            "fvu": 0.195 + 0.8 * decay + 0.004 * np.sin(steps),
            "l0": 24 + 40 * decay**2,
            "aux": 0.1 * decay,
            "dead": np.clip(0.3 * np.sin(steps / 50) * decay, 0, 1),
            "lr": np.full(150, 2e-3),
        }
        pq.write_table(pa.table(table), folder / "metrics.parquet")
        cfg = {"architecture": "topk", "d_in": 64, "d_sae": d_sae, "k": 24}
        (folder / "cfg.json").write_text(json.dumps(cfg))

    return _commit(storage, _spec_of("saes", "sae", name), write)


def write_statistics(
    storage: Storage, name: str, d_sae: int, *, extra: tuple[bytes, ...] = (), has_text: bool = True, seed: int = 0
) -> str:
    """latents.parquet, examples.parquet, rows.parquet, passages.parquet and statistics.json."""

    def write(folder: Path) -> None:
        write_tables(folder, d_sae, source_text(extra), has_text=has_text, seed=seed)

    return _commit(storage, _spec_of("statistics", "statistics", name), write)


def write_evaluation(
    storage: Storage,
    name: str,
    d_sae: int,
    *,
    rules: bool = True,
    rule_name: str | None = None,
    concepts: dict[str, Any] | None = None,
    fvu: float = 0.195,
) -> str:
    """evaluation.json, interpretability.parquet and, where given, concepts.json."""
    rng = np.random.default_rng(1)
    scored = {"top_tenth": 0.431, "mass": 0.26, "top_20": 0.58}
    neurons = {"top_tenth": 0.096, "mass": 0.008, "top_20": 0.31}
    text = {
        "top_tenth": "one token, current or previous, has at least 80% of the strongest 10% of a unit's firings",
        "mass": "one token has at least 50% of a unit's whole activation mass",
        "top_20": "one token has at least 80% of a unit's 20 strongest firings",
    }
    evaluation = {
        "n_rows": 30_000,
        "split": "heldout" if rules else "train",
        "fvu": fvu,
        "fvu_interval": [fvu - 0.003, fvu + 0.003],
        "fvu_legacy": {"mean_of_batches": fvu + 0.004, "centred_per_batch": fvu + 0.01},
        "l0": 24.0,
        "l0_rule": "topk",
        "n_latents": d_sae,
        "n_dead": 1,
        "dead_fraction": 1 / d_sae,
        "dead_rule": "never fired on the 30,000 measured rows",
        "ce": {
            "n_contexts": 512,
            "clean": 3.452,
            "sae": 3.591,
            "zero": 9.31,
            "mean": 6.02,
            "increase": 0.139,
            "increase_interval": [0.131, 0.147],
            "recovered_zero": 0.976,
            "recovered_mean": 0.946,
            "bigram": 4.44,
            "unigram": 6.31,
        }
        if rules
        else None,
        "interpretability": {
            "definitions": text,
            "latents": {"n_units": d_sae - 9, **scored},
            "neurons": {"n_units": 60, **neurons},
        }
        if rules
        else None,
        "superposition": recovery() if concepts else None,
    }

    def write(folder: Path) -> None:
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
        if concepts is not None:
            (folder / "concepts.json").write_text(json.dumps(concepts))
        if not rules:
            return
        table: dict[str, list[Any]] = {"unit": list(range(d_sae)), "n_fires": rng.integers(0, 900, d_sae).tolist()}
        names = (" self", "None", "import", "(", "\\n", " is not", "def", " raise")
        for definition in text:
            share = rng.beta(3, 1.2, d_sae)
            kind = rng.choice(["token", "previous token", "label"], d_sae, p=[0.6, 0.25, 0.15])
            chosen = [rule_name if rule_name and i < 40 else names[i % len(names)] for i in range(d_sae)]
            missing = rng.random(d_sae) < 0.06
            table[f"{definition}_kind"] = [None if gone else str(k) for k, gone in zip(kind, missing, strict=True)]
            table[f"{definition}_name"] = [None if gone else n for n, gone in zip(chosen, missing, strict=True)]
            table[f"{definition}_share"] = [None if gone else float(v) for v, gone in zip(share, missing, strict=True)]
            table[f"{definition}_passes"] = [
                None if gone else bool(v > 0.8) for v, gone in zip(share, missing, strict=True)
            ]
        pq.write_table(pa.table(table), folder / "interpretability.parquet")

    return _commit(storage, _spec_of("evaluations", "evaluation", name), write)


def toy_concepts() -> dict[str, Any]:
    """A concepts.json: eight rows, eight latents, one concept that only a union finds and one that nothing finds."""
    rng = np.random.default_rng(2)
    names = ["cat", "happy cat", "dog", "happy dog", "not cat", "not dog", "robot", "AI assistant"]
    active = np.zeros((8, 8))
    active[[0, 1, 2, 3], 0] = [1.2, 1.1, 0.9, 1.0]
    active[[6, 7], 1] = [1.5, 1.3]
    active[[4, 5], 2] = [0.7, 0.6]
    active[[0, 1], 3] = 0.4
    x = rng.normal(size=(8, 4))
    return {
        "rule": "A latent fires on a row when it exceeds 5 % of its own maximum over all rows.",
        "fvu": 0.021,
        "l0": 1.25,
        "passes_gates": True,
        "labels": names,
        "concepts": [
            {"name": "animal", "rows": [0, 1, 2, 3], "latents": [0]},
            {"name": "robot or AI", "rows": [6, 7], "latents": [1]},
            {"name": "not an animal", "rows": [4, 5, 6, 7], "latents": [1, 2]},
            {"name": "happy", "rows": [1, 3], "latents": []},
        ],
        "latents": active.tolist(),
        "W_dec": rng.normal(size=(8, 4)).tolist(),
        "x": x.tolist(),
        "x_hat": (x + 0.05 * rng.normal(size=(8, 4))).tolist(),
        "replicates": {
            "this recipe": {
                "n_seeds": 20,
                "n_passed_gates": 20,
                "n_all_found": 20,
                "fvu": [],
                "l0": [],
                "concepts": [
                    {"name": "animal", "by_latent": 20, "by_union": 0},
                    {"name": "not an animal", "by_latent": 0, "by_union": 20},
                ],
            },
            "the article's own initialisation and loss": {
                "n_seeds": 20,
                "n_passed_gates": 14,
                "n_all_found": 7,
                "fvu": [],
                "l0": [],
                "concepts": [
                    {"name": "animal", "by_latent": 11, "by_union": 2},
                    {"name": "not an animal", "by_latent": 0, "by_union": 9},
                ],
            },
        },
    }


def recovery() -> dict[str, Any]:
    """How well true features were found."""
    return {
        "n_features": 20,
        "d_sae": 20,
        "mmcs": 0.991,
        "min_cosine": 0.962,
        "recovered": 1.0,
        "random_mmcs": 0.72,
        "random_recovered": 0.01,
        "latents": list(range(20)),
        "cosines": np.linspace(0.962, 0.999, 20).tolist(),
    }


LINEAGE = [
    {
        "role": "subject",
        "ref": "subjects/0123456789abcdef",
        "title": "Embedded one-layer LM",
        "facts": {"d_model": 128, "d_mlp": 512, "steps": 2150, "held-out loss": 3.452},
    },
    {
        "role": "corpus",
        "ref": "tokens/0123456789abcdef",
        "title": "Python standard library",
        "facts": {"documents": 372, "SHA-256": hashlib.sha256(b"corpus").hexdigest()[:12], "tokens": 2_310_144},
    },
    {
        "role": "activations",
        "ref": "activations/0123456789abcdef",
        "title": "gpt_neox.layers.0.mlp.act",
        "facts": {"rows": 1_021_904, "d_in": 512, "dtype": "float16"},
    },
    {
        "role": "SAE",
        "ref": "saes/0123456789abcdef",
        "title": "TopK, k = 24",
        "facts": {"d_sae": 2048, "training tokens": 860_160, "seed": 0, "commit": "3f9c1d2"},
    },
]


def demo_spec(storage: Storage, *, n_latents: int = 300, hostile: bool = False, sweep: bool = False) -> ReportSpec:
    """Write everything one report needs and return its spec."""
    extra = HOSTILE if hostile else ()
    suffix = "hostile" if hostile else "plain"
    rule = HOSTILE_TEXT if hostile else None
    name = HOSTILE_TEXT if hostile else "topk-24"
    concepts = toy_concepts()
    if hostile:
        concepts["labels"][0] = concepts["concepts"][0]["name"] = HOSTILE_TEXT
    saes = [
        ReportedSAE(
            name=name,
            sae=write_sae(storage, suffix, n_latents),
            evaluation=write_evaluation(storage, suffix, n_latents, rule_name=rule, concepts=concepts),
            statistics=write_statistics(storage, suffix, n_latents, extra=extra),
            untrained_evaluation=write_evaluation(storage, f"untrained-{suffix}", n_latents, fvu=0.402),
        )
    ]
    if sweep:
        saes.append(
            ReportedSAE(
                name="toy",
                sae=write_sae(storage, "toy", 8),
                evaluation=write_evaluation(storage, "toy", 8, rules=False, fvu=0.02),
                statistics=write_statistics(storage, "toy", 8, has_text=False),
            )
        )
    title = HOSTILE_TEXT if hostile else "Python standard library, one-layer LM"
    return ReportSpec(config=ReportConfig(title=title, chunk_bytes=20_000), saes=tuple(saes))
