"""The toy page: SAEs on given activations whose right answer is known. concepts.json -> tables ready to show."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.architectures.base import SAE
from sae.report.display import plain
from sae.report.inputs import SAEInputs
from sae.report.numbers import NOT_AVAILABLE, decimal
from sae.store.reading.blocks import iter_rows
from sae.store.snapshots.snapshot import read_snapshot
from sae.store.storage.filesystem import Storage
from sae.weights import load_sae

MAX_ROWS, MAX_LATENTS = 64, 64
"""Larger activation tables are not shown as a heat table."""
MAX_FEATURES = 200
MAX_WIDTH = 16
"""Vectors with more dimensions are not written out."""
RECOVERED_ABOVE = 0.95
_FOUND_AT = "features found at cosine > .95"


def toy_of(storage: Storage, inputs: SAEInputs) -> dict[str, Any] | None:
    """What the toy page shows of one SAE; None when its right answer is not known. What is missing is left out."""
    found, recovery = inputs.concepts or {}, inputs.evaluation.get("superposition")
    if not found and not recovery:
        return None
    if inputs.snapshot is not None:
        found = found | vectors_of(load_sae(inputs.sae_folder), small_rows(storage, inputs.snapshot))
    labels = _labels(found)
    tables = [
        *_recovery(recovery),
        _replicates(found.get("replicates")),
        _vectors("Decoder rows", "latent", [str(i) for i in range(len(found.get("W_dec") or []))], found.get("W_dec")),
        _pairs(labels, found.get("x"), found.get("x_hat")),
    ]
    return {
        "title": "Known answers",
        "notes": _notes(found),
        "concepts": [_concept(concept, labels, bool(found.get("passes_gates", True))) for concept in _concepts(found)],
        "heat": _heat(labels, found.get("latents")),
        "tables": [table for table in tables if table],
    }


def verdict(toy: Mapping[str, Any]) -> str:
    """The toy page in one line, for the overview."""
    parts = []
    if toy["concepts"]:
        found = [concept for concept in toy["concepts"] if concept["found"]]
        unions = sum(len(concept["latents"]) > 1 for concept in found)
        union_text = f" ({unions} only as a union of two latents)" if unions else ""
        parts.append(f"{len(found)} of {len(toy['concepts'])} named concepts found{union_text}")
    parts += [table["title"] for table in toy["tables"] if table["title"].endswith(_FOUND_AT)]
    return "; ".join(parts)


def small_rows(storage: Storage, snapshot_ref: str) -> Tensor | None:
    """The training rows in the order of their source, [rows, d_in]; None when there are more than MAX_ROWS."""
    snapshot = read_snapshot(storage, snapshot_ref)
    if snapshot.n_rows > MAX_ROWS:
        return None
    blocks = [(block.seq.copy(), block.act.astype(np.float32)) for block in iter_rows(storage, snapshot)]
    order = np.argsort(np.concatenate([seq for seq, _ in blocks]), kind="stable")
    return torch.from_numpy(np.concatenate([act for _, act in blocks])[order])


@torch.no_grad()
def vectors_of(sae: SAE, x: Tensor | None) -> dict[str, Any]:
    """Decoder rows and, where the rows are few, every activation and reconstruction. x: [rows, d_in]"""
    found: dict[str, Any] = {"W_dec": sae.W_dec.tolist()}
    if x is not None:
        latents = sae.encode(x)
        found |= {"latents": latents.tolist(), "x": x.tolist(), "x_hat": sae.decode(latents).tolist()}
    return found


def _concepts(found: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return found.get("concepts") or []


def _labels(found: Mapping[str, Any]) -> list[str]:
    """Names of the rows, as far as they are known."""
    rows = found.get("latents") or found.get("x") or []
    given = found.get("labels") or []
    return [plain(str(given[i]), 60) if i < len(given) else f"row {i}" for i in range(len(rows))]


def _notes(found: Mapping[str, Any]) -> list[str]:
    notes = [plain(str(found["rule"]), 1000)] if found.get("rule") else []
    if "fvu" in found and "l0" in found:
        verdict = "passed" if found.get("passes_gates") else "not passed, so nothing counts as found"
        notes.append(f"Here FVU is {decimal(found['fvu'])} and L0 {decimal(found['l0'])}: {verdict}.")
    return notes


def _concept(concept: Mapping[str, Any], labels: list[str], passes_gates: bool) -> dict[str, Any]:
    latents = [int(latent) for latent in concept.get("latents") or []]
    if not latents:
        where = "no latent, and no two latents together, fire on exactly these rows"
    elif len(latents) == 1:
        where = f"latent {latents[0]}"
    else:
        where = f"the union of latents {' + '.join(map(str, latents))}"
    return {
        "name": plain(str(concept.get("name", "")), 80),
        "rows": [labels[row] if row < len(labels) else f"row {row}" for row in concept.get("rows") or []],
        "found": bool(latents) and passes_gates,
        "latents": latents,
        "where": where,
    }


def _heat(labels: list[str], latents: Any) -> dict[str, Any] | None:
    """Every latent's activation on every row; None when there are too many to read."""
    if not latents or len(latents) > MAX_ROWS or len(latents[0]) > MAX_LATENTS:
        return None
    return {"rows": labels, "latents": list(range(len(latents[0]))), "values": latents}


def _vectors(title: str, what: str, names: list[str], vectors: Any) -> dict[str, Any] | None:
    if not vectors or len(vectors) > MAX_ROWS or len(vectors[0]) > MAX_WIDTH:
        return None
    return {
        "title": title,
        "note": f"One {what} per line, one dimension per column.",
        "columns": [what, *map(str, range(len(vectors[0])))],
        "rows": [[name, *(decimal(value) for value in row)] for name, row in zip(names, vectors, strict=False)],
    }


def _pairs(labels: list[str], x: Any, x_hat: Any) -> dict[str, Any] | None:
    """Original and reconstructed vectors, line by line."""
    if not x or not x_hat or len(x) > MAX_ROWS or len(x[0]) > MAX_WIDTH:
        return None
    rows = []
    for label, before, after in zip(labels, x, x_hat, strict=False):
        distance = math.dist(before, after)
        rows.append([label, "original", *(decimal(value) for value in before), ""])
        rows.append(["", "reconstructed", *(decimal(value) for value in after), decimal(distance)])
    return {
        "title": "Original and reconstructed",
        "note": "The last column is the distance between the two.",
        "columns": ["row", "", *map(str, range(len(x[0]))), "distance"],
        "rows": rows,
    }


def _replicates(replicates: Any) -> dict[str, Any] | None:
    """How often each recipe finds each concept when only the seed changes. replicates: {recipe: counts}."""
    if not isinstance(replicates, dict) or not replicates:
        return None
    recipes = {"this recipe": replicates} if "n_seeds" in replicates else replicates
    names = [concept["name"] for concept in next(iter(recipes.values())).get("concepts") or []]
    rows = []
    for recipe, counts in recipes.items():
        n_seeds = int(counts.get("n_seeds", 0))
        by_name = {concept["name"]: concept for concept in counts.get("concepts") or []}
        rows.append(
            [
                plain(str(recipe), 80),
                _of(counts.get("n_all_found"), n_seeds),
                _of(counts.get("n_passed_gates"), n_seeds),
                *(_concept_count(by_name.get(name)) for name in names),
            ]
        )
    return {
        "title": "The same from other seeds",
        "note": "Found all: passed the gates and found every concept. Then, per concept, by one latent or by a union.",
        "columns": ["recipe", "found all", "passed the gates", *(plain(str(name), 60) for name in names)],
        "rows": rows,
    }


def _of(count: Any, total: int) -> str:
    return NOT_AVAILABLE if count is None else f"{count} of {total}"


def _concept_count(concept: Mapping[str, Any] | None) -> str:
    if concept is None:
        return NOT_AVAILABLE
    union = int(concept.get("by_union", 0))
    return f"{concept.get('by_latent', 0)} by a latent" + (f", {union} by a union" if union else "")


def _recovery(recovery: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """True features against decoder rows, with what random directions would score."""
    if not recovery:
        return []
    cosines = list(recovery.get("cosines") or [])
    n_features = int(recovery.get("n_features") or len(cosines))
    latents = list(recovery.get("latents") or [None] * len(cosines))
    found = sum(cosine > RECOVERED_ABOVE for cosine in cosines)
    random = recovery.get("random_recovered")
    summary = {
        "title": f"{found} of {n_features} {_FOUND_AT}",
        "note": "Beside it the same for as many random directions: in few dimensions chance alone scores high.",
        "columns": ["", "this SAE", "random directions"],
        "rows": [
            ["features found", str(found), decimal(None if random is None else random * n_features)],
            ["mean of best cosines (MMCS)", decimal(recovery.get("mmcs")), decimal(recovery.get("random_mmcs"))],
            ["worst best cosine", decimal(recovery.get("min_cosine")), NOT_AVAILABLE],
        ],
    }
    each = {
        "title": "Every feature",
        "note": "",
        "columns": ["feature", "best latent", "cosine"],
        "rows": [
            [str(feature), NOT_AVAILABLE if latent is None else str(latent), decimal(cosine, 4)]
            for feature, (latent, cosine) in enumerate(zip(latents[:MAX_FEATURES], cosines, strict=False))
        ],
    }
    return [summary, each]
