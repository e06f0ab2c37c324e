"""Comparisons of the report's SAEs: which pairs, their numbers, their per-latent columns; `matching.py` finds matches.

A pair is written once, under the order of the SAEs in the report, and read both ways:
data/compare/<a>--<b>.js has the numbers, data/compare/<a>--<b>/<side>-<column>.js one value per latent of that side.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae.philox import philox
from sae.progress import Progress
from sae.report import chunks
from sae.report.inputs import SAEInputs
from sae.report.matching import (
    CONTAINED,
    DEAD,
    MATCHED,
    MIN_FIRINGS,
    NEAR,
    NONE,
    ONLY,
    PARENT,
    PART,
    Firings,
    Side,
    chance_of_firings,
    classify,
    linked,
    match_decoders,
    match_firings,
    mutual,
    random_cosines,
    rows_together,
)
from sae.weights import WEIGHTS_FILE, load_sae

MAX_ALL_PAIRS = 8
"""SAEs of which every two are compared."""
MAX_WORK = 1 << 35
"""Pairs of latents compared in one report with every two SAEs; about a quarter of an hour on one core at d_in = 512.
Above either limit only SAEs of neighbouring widths are compared."""
MATCHED_ABOVE = {"decoder": 0.7, "firing": 0.7}
"""One-to-one from here on. Cosine .7: Leask et al. 2025, arXiv:2502.04878, find that above it a latent of a larger
dictionary can stand for its match in a smaller one, and below it brings something new."""
NEAR_ABOVE = {"decoder": 0.5, "firing": 0.3}
"""A part of its match from here on. Cosine .5: a quarter of the direction's squared length lies along the match, where
random directions of d_in = 512 stay below .25. Correlation .3: a part with a tenth of the whole's firings has .32."""
SHARES_ABOVE = (0.9, 0.7)
EDGES = [round(edge, 3) for edge in np.linspace(0, 1, 41).tolist()]
"""Bins of best scores; what is below 0 is counted in the first."""
CLASSES = {DEAD: "dead", ONLY: "only", NEAR: "near", MATCHED: "matched", PARENT: "parent", PART: "part"}


@dataclass(frozen=True)
class Comparison:
    """One pair: its numbers, and columns by side."""

    about: dict[str, Any]
    columns: tuple[dict[str, np.ndarray], dict[str, np.ndarray]]


def comparable_pairs(saes: Sequence[SAEInputs]) -> tuple[list[tuple[int, int]], int]:
    """Which SAEs are compared, as indices i < j, and how many pairs the limits leave out.

    Two SAEs can be compared by decoder when they were trained on the same activations, and by firing when their
    statistics share rows.
    """
    possible = [
        (i, j)
        for i, j in itertools.combinations(range(len(saes)), 2)
        if _by_decoder(saes[i], saes[j]) or _share_rows(saes[i], saes[j])
    ]
    work = sum(saes[i].latents.num_rows * saes[j].latents.num_rows for i, j in possible)
    if len(saes) <= MAX_ALL_PAIRS and work <= MAX_WORK:
        return possible, 0
    by_width = sorted(range(len(saes)), key=lambda i: (saes[i].snapshot or "", saes[i].latents.num_rows, i))
    adjacent = {tuple(sorted(pair)) for pair in itertools.pairwise(by_width)}
    kept = [pair for pair in possible if pair in adjacent]
    return kept, len(possible) - len(kept)


def write_comparisons(folder: Path, saes: Sequence[SAEInputs], seed: int, progress: Progress) -> dict[str, Any]:
    """Write data/compare/. Returns: what the page must know first, {"pairs": [[key, key]], "leftOut": n}."""
    pairs, left_out = comparable_pairs(saes)
    for done, (i, j) in enumerate(pairs):
        progress(done, len(pairs), "pairs of SAEs", f"{saes[i].key} and {saes[j].key}")
        found = compare(saes[i], saes[j], seed)
        key = f"data/compare/{saes[i].key}--{saes[j].key}"
        chunks.write_chunk(folder, key, chunks.encode_json(found.about))
        for side, columns in enumerate(found.columns):
            for name, values in columns.items():
                chunks.write_chunk(folder, f"{key}/{side}-{name}", chunks.encode_column(values))
    return {"pairs": [[saes[i].key, saes[j].key] for i, j in pairs], "leftOut": left_out}


def compare(a: SAEInputs, b: SAEInputs, seed: int) -> Comparison:
    """Everything about one pair; at least one of the two ways of matching must be possible."""
    firings = (_firings(a), _firings(b)) if _share_rows(a, b) else None
    decoders = (_decoder(a), _decoder(b)) if _by_decoder(a, b) else None
    live = (a.latents["n_fired"].to_numpy() > 0, b.latents["n_fired"].to_numpy() > 0)
    found = compare_arrays(decoders, firings, live, philox("compare", seed, a.entry.sae, b.entry.sae))
    return Comparison(found.about | {"a": a.key, "b": b.key, "sameRecipe": _same_recipe(a, b)}, found.columns)


def compare_arrays(
    decoders: tuple[np.ndarray, np.ndarray] | None,
    firings: tuple[Firings, Firings] | None,
    live: tuple[np.ndarray, np.ndarray],
    generator: np.random.Generator,
) -> Comparison:
    """The comparison of two dictionaries.

    Args:
        decoders: [d_a, d_in] and [d_b, d_in] float32; None where directions mean nothing to each other.
        firings: on the same rows; None where there are none. One of the two must be given.
        live: latents that take part. [d_a], [d_b] bool
        generator: of the random dictionaries and the shuffled rows.
    """
    by_decoder = match_decoders(*decoders, *live) if decoders else None
    by_firing = match_firings(*firings) if firings else None
    matches = by_decoder or by_firing
    assert matches
    way = "decoder" if by_decoder else "firing"
    together = rows_together(*firings, matches[0].index, matches[1].index) if firings else None
    sides = []
    for i in (0, 1):
        inside = np.full(len(live[i]), np.nan)
        if firings and together:
            enough = firings[i].counts >= MIN_FIRINGS
            inside[enough] = together[i][enough] / firings[i].counts[enough]
        sides.append(Side(matches[i], linked(matches[i], inside, NEAR_ABOVE[way]), live[i]))
    classes = classify(sides[0], sides[1], MATCHED_ABOVE[way], NEAR_ABOVE[way])

    columns: list[dict[str, np.ndarray]] = []
    numbers: list[dict[str, Any]] = []
    for i, other in ((0, 1), (1, 0)):
        columns.append({"match": matches[i].index, "class": classes[i], "linked": sides[i].linked})
        numbers.append(
            {
                "live": int(live[i].sum()),
                "classes": {name: int((classes[i] == code).sum()) for code, name in CLASSES.items()},
                "mutual": len(mutual(matches[i], matches[other])),
            }
        )
        if by_decoder and decoders:
            chance = random_cosines(int(live[i].sum()), int(live[other].sum()), decoders[0].shape[1], generator)
            numbers[i]["cosine"] = _summary(by_decoder[i].score, chance)
            columns[i]["cosine"] = by_decoder[i].score
        if by_firing and firings and together:
            chance = chance_of_firings(firings[i], firings[other], generator)
            numbers[i]["phi"] = _summary(by_firing[i].score, chance)
            columns[i] |= {"phi": by_firing[i].score, "fired": firings[i].counts, "together": together[i]}
        if by_decoder and by_firing:
            columns[i]["partner"] = by_firing[i].index
            same = (by_firing[i].index == matches[i].index) & (matches[i].index != NONE)
            numbers[i]["agree"] = int(same.sum())
    about = {
        "schema": chunks.SCHEMA_VERSION,
        "way": way,
        "rows": firings[0].n_rows if firings else 0,
        "minFirings": MIN_FIRINGS,
        "matchedAbove": MATCHED_ABOVE[way],
        "nearAbove": NEAR_ABOVE[way],
        "contained": CONTAINED,
        "edges": EDGES,
        "classNames": [CLASSES[code] for code in sorted(CLASSES)],
        "sides": numbers,
    }
    return Comparison(about, (columns[0], columns[1]))


def _summary(score: np.ndarray, chance: np.ndarray) -> dict[str, Any]:
    """Mean, shares and histogram of best scores, each beside what chance gives. NaN: not matched, not counted."""
    score, chance = score[np.isfinite(score)], chance[np.isfinite(chance)]
    counts, by_chance = (np.histogram(values.clip(0, 1), EDGES)[0] for values in (score, chance))
    return {
        "n": len(score),
        "mean": _mean(score),
        "chanceMean": _mean(chance),
        "above": [[limit, _mean(score > limit), _mean(chance > limit)] for limit in SHARES_ABOVE],
        "histogram": counts.tolist(),
        "chance": [round(float(n) * len(score) / max(1, len(chance)), 2) for n in by_chance],
    }


def _mean(values: np.ndarray) -> float | None:
    found = float(values.mean()) if len(values) else math.nan
    return round(found, 5) if math.isfinite(found) else None


def _by_decoder(a: SAEInputs, b: SAEInputs) -> bool:
    """Whether the decoders live in one space: trained on the same activations, so also of one d_in."""
    weights = all((inputs.sae_folder / WEIGHTS_FILE).exists() for inputs in (a, b))
    return weights and a.snapshot is not None and a.snapshot == b.snapshot and a.cfg["d_in"] == b.cfg["d_in"]


def _decoder(inputs: SAEInputs) -> np.ndarray:
    W_dec: np.ndarray = load_sae(inputs.sae_folder).W_dec.float().numpy()
    return W_dec


def _share_rows(a: SAEInputs, b: SAEInputs) -> bool:
    """Whether the sampled rows of both are the same places of the corpus."""
    if a.rows is None or b.rows is None:
        return False
    places = [pq.read_table(path, columns=["segment", "seq", "pos"]) for path in (a.rows, b.rows)]
    return places[0].num_rows > 0 and bool(places[0].equals(places[1]))


def _firings(inputs: SAEInputs) -> Firings:
    column = pq.read_table(inputs.rows, columns=["latents"])["latents"]
    lists = pa.concat_arrays(column.chunks)
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    latents = lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    return Firings(latents, np.concatenate([[0], lengths.cumsum()]), inputs.latents.num_rows)


def _same_recipe(a: SAEInputs, b: SAEInputs) -> bool:
    """Whether the two differ by their seed and by nothing else."""
    seeds = [inputs.spec.get("config", {}).get("seed") for inputs in (a, b)]
    rest = [inputs.spec | {"config": inputs.spec.get("config", {}) | {"seed": None}} for inputs in (a, b)]
    return seeds[0] != seeds[1] and rest[0] == rest[1]
