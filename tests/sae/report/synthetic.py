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
from sae.store.artefacts import records
from sae.store.storage.filesystem import Storage


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
    l0: float = 24.0,
    increase: float = 0.139,
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
        "shrinkage": {
            "gamma": 0.991,
            "gamma_centred": 0.987,
            "norm_ratio": 0.934,
            "mean_cosine": 0.932,
            "formula": "gamma = E ||x_hat||^2 / E [x . x_hat]",
        },
        "error_by": error_by(fvu) if rules else {},
        "controls": {
            "k": 24,
            "n_rows": 30_000,
            "definitions": {},
            "fvu": {"neurons": 0.378, "pca": 0.403, "random": 0.756},
        },
        "geometry": {
            "n_compared": d_sae,
            "duplicate_above": 0.9,
            "decoder": {"mean_max_cosine": 0.3, "duplicate_share": 0.004, "participation_ratio": 211.9},
            "random": {"mean_max_cosine": 0.15, "duplicate_share": 0.0, "participation_ratio": 409.4},
            "encoder_decoder_cosine": 0.606,
            "norm_min": 0.395,
            "norm_max": 0.396,
            "d_in": 512,
        },
        "l0": l0,
        "l0_rule": "topk",
        "n_latents": d_sae,
        "n_dead": 1,
        "dead_fraction": 1 / d_sae,
        "dead_rule": "never fired on the 30,000 measured rows",
        "ce": {
            "n_contexts": 512,
            "clean": 3.452,
            "sae": 3.452 + increase,
            "zero": 9.31,
            "mean": 6.02,
            "increase": increase,
            "increase_interval": [increase - 0.008, increase + 0.008],
            "recovered_zero": 0.976,
            "recovered_mean": 0.946,
            "bigram": 4.44,
            "unigram": 6.31,
            "n_targets": 65_024,
            "kl": 0.151,
            "kl_interval": [0.148, 0.154],
            "kl_zero": 5.81,
            "kl_mean": 2.72,
            "controls": {
                "neurons": {"increase": 0.692, "increase_interval": [0.68, 0.71], "kl": 0.695},
                "pca": {"increase": 0.553, "increase_interval": [0.54, 0.57], "kl": 0.54},
                "random": {"increase": 2.37, "increase_interval": [2.35, 2.4], "kl": 2.34},
            },
            "increase_by_position": [
                {
                    "name": name,
                    "n_targets": 512 << max(i - 1, 0),
                    "increase": -0.02 + 0.02 * i,
                    "increase_interval": [-0.06 + 0.025 * i, 0.02 + 0.015 * i],
                }
                for i, name in enumerate(POSITIONS)
            ],
        }
        if rules
        else None,
        "interpretability": {
            "n_rows": 30_000,
            "definitions": text,
            "latents": {"n_units": d_sae - 9, **scored},
            "neurons": {"n_units": 60, **neurons},
            "pca": {"n_units": 88, "top_tenth": 0.039, "mass": 0.024, "top_20": 0.068},
            "random": {"n_units": d_sae, "top_tenth": 0.011, "mass": 0.008, "top_20": 0.082},
        }
        if rules
        else None,
        "probing": probing() if rules else None,
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
        units = {"unit": list(range(60)), "n_fires": rng.integers(900, 20_000, 60).tolist()}
        pq.write_table(pa.table(units), folder / "neurons.parquet")

    return _commit(storage, _spec_of("evaluations", "evaluation", name), write)


POSITIONS = ("0", "1", "2-3", "4-7", "8-15", "16-31", "32-63", "64-127")


def error_by(fvu: float) -> dict[str, Any]:
    """Error by position and by syntax class."""

    def group(name: str, n_rows: int, value: float) -> dict[str, Any]:
        interval = [value - 1 / n_rows**0.5, value + 1 / n_rows**0.5]
        return {"name": name, "n_rows": n_rows, "fvu": value, "fvu_interval": interval, "error_share": 0.08}

    classes = ("whitespace", "keyword", "operator", "string", "docstring", "comment", "name", "function name")
    return {
        "position": [group(name, 230 << max(i - 1, 0), fvu * (1.3 - 0.05 * i)) for i, name in enumerate(POSITIONS)],
        "syntax_label": [group(name, 500 + 900 * i, fvu * (0.6 + 0.1 * i)) for i, name in enumerate(classes)],
    }


def probing() -> dict[str, Any]:
    """Probes in which five latents beat five neurons, and one latent does not beat one."""
    scores = []
    for task, n_classes in (("syntax", 15), ("first letter", 25)):
        for units, k, accuracy in (
            *(("latents", 1, 0.71), ("latents", 5, 0.86), ("neurons", 1, 0.77), ("neurons", 5, 0.83)),
            *(("pca", 1, 0.75), ("pca", 5, 0.81), ("random", 1, 0.62), ("random", 5, 0.73)),
            ("all neurons", None, 0.95),
        ):
            row = {"task": task, "units_of": units, "k": k, "n_classes": n_classes}
            scores.append(row | {"accuracy": 0.9, "balanced_accuracy": accuracy, "f1": accuracy - 0.3})
    return {"n_rows": 30_000, "n_fitted": 15_012, "rule": "one class against the rest", "scores": scores}


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


def demo_spec(
    storage: Storage, *, n_latents: int = 300, hostile: bool = False, sweep: bool = False, **options: Any
) -> ReportSpec:
    """Write everything one report needs and return its spec; `options` are ReportConfig's."""
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
            family=f"topk {n_latents}",
            sparsity="k 24",
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
                family="toy",
                sparsity="k 1",
                sae=write_sae(storage, "toy", 8),
                evaluation=write_evaluation(storage, "toy", 8, rules=False, fvu=0.02),
                statistics=write_statistics(storage, "toy", 8, has_text=False),
            )
        )
    title = HOSTILE_TEXT if hostile else "Python standard library, one-layer LM"
    return ReportSpec(config=ReportConfig(title=title, **({"chunk_bytes": 20_000} | options)), saes=tuple(saes))
