"""The statistics of one SAE: one partial result per part of its snapshots, merged in a tree into the tables."""

import json
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.architectures.base import SAE
from sae.progress import Progress, silent
from sae.statistics import tables
from sae.statistics.accumulate import HISTOGRAM_EDGES, PLACES_PER_TOKEN, LatentSums, Sizes
from sae.statistics.choose import choose_examples
from sae.statistics.config import StatisticsConfig, StatisticsSpec
from sae.statistics.cooccurrence import Association, Pairs, count_pairs
from sae.statistics.decoder import Ranked, logit_effects, nearest_decoders, nearest_neurons
from sae.statistics.firings import SPLITS, Firings, StatisticsPart, iter_blocks, list_parts
from sae.statistics.near_misses import find_near_misses
from sae.statistics.passages import passages_table
from sae.statistics.places import texts_at
from sae.statistics.quantiles import BOUND, MIN_FIRINGS, quartile_edges
from sae.statistics.row_sample import coactivation
from sae.statistics.tree import merge_levels, roots
from sae.statistics.windows import collect_windows
from sae.store.artefacts import records
from sae.store.artefacts.records import Record
from sae.store.storage.filesystem import Storage
from sae.store.text.contexts import read_document_names
from sae.subject.hooks import direct_logit_matrix
from sae.subject.load import Subject, load_subject
from sae.subject.text import token_bytes
from sae.weights import load_sae

PARTIAL_FILE = "partial.safetensors"
Nearest = Callable[[SAE, int, Progress], Ranked]
"""`nearest_decoders` of an SAE."""


def count_parts(storage: Storage, spec: StatisticsSpec) -> int:
    """How many parts of the snapshots are counted: parts 0 to n - 1 of the artefact, held-out ones first."""
    return len(list_parts(storage, spec))


def statistics_of_part(
    storage: Storage,
    spec: StatisticsSpec,
    part: int,
    *,
    sae: SAE | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> Record:
    """Accumulate one part of the snapshots and commit it as the same part of the statistics artefact.

    Args:
        part: 0 to count_parts - 1: the parts of the held-out snapshot, then those of the training snapshot.
        sae: that of the spec, in float32; None: it is read.
        device: where rows are encoded.
    """
    started = time.perf_counter()
    parts = list_parts(storage, spec)
    source = parts[part]
    sae = sae or _load_sae(storage, spec, device)
    sums = LatentSums(_sizes(storage, spec, parts))
    done = 0
    for block in iter_blocks(storage, sae, source, source.contexts(storage)):
        sums.add(source.split, block)
        done += len(block.rows)
        progress(done, source.n_rows, "rows")
    return _commit_partial(storage, spec, part, sums, {"split": source.split}, started, device)


def merge_parts(storage: Storage, spec: StatisticsSpec, part: int, *, progress: Progress = silent) -> Record:
    """Merge some partial results into a further one: a node of the tree of `sae.statistics.tree`.

    Args:
        part: of the node.

    Raises: StoreError when a partial result is not finished.
    """
    started = time.perf_counter()
    parts = list_parts(storage, spec)
    (node,) = [node for level in merge_levels(len(parts)) for node in level if node.part == part]
    sums = LatentSums(_sizes(storage, spec, parts))
    _merge_files(storage, spec, sums, node.children, progress)
    merged = {"merges": [node.children.start, node.children.stop]}
    return _commit_partial(storage, spec, part, sums, merged, started, "cpu")


def merge_statistics(
    storage: Storage,
    spec: StatisticsSpec,
    *,
    sae: SAE | None = None,
    nearest: Nearest | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> Record:
    """Merge what the tree leaves, read the examples' contexts and write the tables.

    Args:
        sae: that of the spec, in float32; None: it is read.
        nearest: who looks for neighbours; None: this process.
        device: where rows are encoded, and decoder rows compared.

    Raises: StoreError when a partial result is not finished.
    """
    started = time.perf_counter()
    parts = list_parts(storage, spec)
    sae = sae or _load_sae(storage, spec, device)
    sums = LatentSums(_sizes(storage, spec, parts))
    _merge_files(storage, spec, sums, roots(len(parts)), progress)

    config, has_text = spec.config, bool(spec.tokens)
    sample = sums.sample.read()[0]
    edges = quartile_edges(sums.histogram, sums.max, sample)
    associations = _associations(storage, parts, sums, sample, config.n_associated)
    places = sums.places.read()[0]
    misses = find_near_misses(
        storage, sae, parts, _top_token(associations["token"].pairs, sae.d_sae), places, config.n_per_group,
        progress=progress,
    )  # fmt: skip
    examples = choose_examples(sums.top.read()[0], sample, misses, edges, config.n_per_group)
    width = config.context_tokens if has_text else 1
    windows = collect_windows(storage, sae, parts, examples.firings, width, progress=progress)

    subject = load_subject(storage, spec.subject) if spec.subject else None
    to_logits, logits_text = _direct_path(subject, spec.hook_point)
    token_names = _token_names(subject) if subject else None
    document_names = [read_document_names(storage, ref) for ref in spec.tokens]
    sampled = sums.rows.read()
    latents = tables.latents_table(
        sums,
        edges,
        tables.DecoderFacts(
            nearest(sae, config.n_neighbours, progress)
            if nearest
            else nearest_decoders(sae.W_dec, config.n_neighbours, progress),
            nearest_neurons(sae.W_dec, config.n_neurons),
            None if to_logits is None else logit_effects(sae.W_dec, to_logits, config.n_logits, progress),
        ),
        associations,
        coactivation(sampled, sae.d_sae, config.n_coactive, progress),
        tables.Names(token_names, _label_names(storage, spec), sums.position_edges),
        dense_above=config.dense_above,
        duplicate_above=config.duplicate_above,
    )
    row_names = None if has_text else _row_names(storage, parts)
    shown = tables.examples_table(examples, windows, document_names, row_names, token_names)
    summary = _summary(spec, sums) | {
        "logits": None if to_logits is None else logits_text,
        "no_logits_because": logits_text if to_logits is None else None,
    }
    metrics = {
        "n_rows": summary["n_rows"],
        "d_sae": sae.d_sae,
        "n_dead": sum(latents["dead"].to_pylist()),
        "n_dense": sum(latents["dense"].to_pylist()),
        "n_duplicates": sae.d_sae - latents["duplicate_of"].null_count,
        "n_with_rule": sae.d_sae - latents["rule_kind"].null_count,
        "n_examples": shown.num_rows,
    }
    with storage.staging() as folder:
        tables.write_table(latents, folder / "latents.parquet")
        tables.write_table(shown, folder / "examples.parquet")
        tables.write_table(tables.rows_table(sampled), folder / "rows.parquet")
        if has_text:
            passages = passages_table(storage, sae, parts, config.n_passages, document_names, token_names)
            tables.write_table(passages, folder / "passages.parquet")
        (folder / "statistics.json").write_text(json.dumps(summary, indent=1) + "\n")
        seconds = time.perf_counter() - started
        return records.commit(storage, spec, folder, metrics, seconds=seconds, device=device)


def _sizes(storage: Storage, spec: StatisticsSpec, parts: list[StatisticsPart]) -> Sizes:
    n_rows = sum(part.n_rows for part in parts)
    tokens = [records.require_record(storage, ref) for ref in spec.tokens]
    return Sizes(
        d_sae=int(records.require_record(storage, spec.sae).spec["config"]["sae"]["d_sae"]),
        n_top=spec.config.n_top,
        n_samples=spec.config.n_samples,
        seed=spec.seed,
        row_share=spec.config.n_sampled_rows / max(n_rows, 1),
        vocab_size=max((int(record.metrics["vocab_size"]) for record in tokens), default=0),
        n_labels=len(_label_names(storage, spec)),
        context_tokens=max((int(record.spec["context_tokens"]) for record in tokens), default=0),
    )


def _label_names(storage: Storage, spec: StatisticsSpec) -> list[str]:
    """Names of the syntax labels: the same for all segments that have any."""
    named = (records.require_record(storage, ref).metrics.get("label_names") for ref in spec.tokens)
    return next((list(names) for names in named if names), [])


def _merge_files(
    storage: Storage, spec: StatisticsSpec, sums: LatentSums, parts: Iterable[int], progress: Progress
) -> None:
    numbers = list(parts)
    for done, number in enumerate(numbers):
        record = records.require_record(storage, spec.ref, number)
        with records.local_files(storage, record) as files:
            sums.merge_file(files / PARTIAL_FILE)
        progress(done + 1, len(numbers), "parts", "merged")


def _commit_partial(
    storage: Storage,
    spec: StatisticsSpec,
    part: int,
    sums: LatentSums,
    metrics: dict[str, Any],
    started: float,
    device: torch.device | str,
) -> Record:
    counted = {"n_rows": int(sums.n_rows.sum()), "n_firings": int(sums.n_fired.sum())}
    with storage.staging() as folder:
        sums.save(folder / PARTIAL_FILE)
        seconds = time.perf_counter() - started
        return records.commit(storage, spec, folder, metrics | counted, seconds=seconds, part=part, device=device)


def _load_sae(storage: Storage, spec: StatisticsSpec, device: torch.device | str) -> SAE:
    with records.local_files(storage, records.require_record(storage, spec.sae)) as folder:
        return load_sae(folder).float().to(device)


def _associations(
    storage: Storage, parts: list[StatisticsPart], sums: LatentSums, sample: Firings, n: int
) -> dict[str, Association]:
    """What stands where each latent fires: from all firings, or from the sample where pairs are too many to count."""
    n_fired, n_rows = sums.n_fired.sum(axis=0), int(sums.n_rows.sum())
    n_sampled = np.bincount(sample.latent, minlength=sums.d_sae)
    texts = None
    found = {}
    for name, counts in sums.on.items():
        if counts.exact:
            found[name] = counts.associate(counts.top(n), n_fired, n_fired, n_rows)
            continue
        texts = texts or texts_at(storage, parts, sample)
        codes = texts.token if name == "token" else texts.previous
        pairs = count_pairs(sample.latent, codes, counts.n_codes, n)
        found[name] = counts.associate(pairs, n_sampled, n_fired, n_rows)
    return found


def _top_token(pairs: Pairs, d_sae: int) -> np.ndarray:
    """The token on which each latent fires most, -1 for none. [d_sae]"""
    top = np.full(d_sae, -1, np.int64)
    latents, first = np.unique(pairs.latent, return_index=True)
    top[latents] = pairs.code[first]
    return top


def _direct_path(subject: Subject | None, hook_point: str) -> tuple[Tensor | None, str]:
    """Matrix from the SAE's input to logits [d_in, vocab], and what it is; or None and why there is none."""
    if subject is None:
        return None, "given activations come without a model"
    matrix = direct_logit_matrix(subject.model, hook_point)
    if matrix is None:
        return None, f"no linear path from {hook_point} to the logits is known for this model"
    return matrix, (
        f"direct path: decoder row times the linear map from {hook_point} to the logits, about the mean over the "
        f"vocabulary; later layers that read the latent are not counted"
    )


def _token_names(subject: Subject) -> tables.TokenNames:
    return lambda ids: token_bytes(subject.tokenizer, ids.tolist())


def _row_names(storage: Storage, parts: list[StatisticsPart]) -> Callable[[np.ndarray], list[bytes]]:
    """What stands in the place of tokens for given activations: the row's label, else its number."""
    entry = parts[0].snapshot.parts[0]
    source = records.require_record(storage, entry.ref, entry.part).spec.get("source", {})
    labels = source.get("labels")

    def names(rows: np.ndarray) -> list[bytes]:
        return [(labels[row] if labels else f"row {row}").encode() for row in rows.tolist()]

    return names


def _summary(spec: StatisticsSpec, sums: LatentSums) -> dict[str, object]:
    n_rows = dict(zip(SPLITS, sums.n_rows.tolist(), strict=True))
    tokens, positions = sums.on["token"], sums.on["position"]
    return {
        "n_rows": sum(n_rows.values()),
        "n_rows_train": n_rows["train"],
        "n_rows_heldout": n_rows["heldout"],
        "d_sae": sums.d_sae,
        "histogram_edges": HISTOGRAM_EDGES.tolist(),
        "group_population": _groups_text(spec.config),
        "near_miss_population": (
            f"up to {spec.config.n_per_group} of {PLACES_PER_TOKEN} random rows that carry the token on which the "
            f"latent fires most: those on which it is silent."
        ),
        "association": (
            "counted over all firings"
            if tokens.exact
            else f"tokens: estimated from a uniform sample of {spec.config.n_samples} firings of each latent; syntax "
            f"and positions: counted over all firings"
        ),
        "quantiles": f"exact up to {spec.config.n_samples} firings, else within {BOUND:.1%} of their value",
        "position_edges": sums.position_edges.tolist(),
        "position_rows": positions.rows.tolist(),
        "n_sampled_rows": len(sums.rows.read().rows.context),
        "seed": spec.seed,
        "has_text": bool(spec.tokens),
        "has_syntax": sums.sizes.n_labels > 0,
        "vocab_size": sums.sizes.vocab_size or None,
        "n_vocab_seen": int((tokens.rows > 0).sum()),
        "dense_above": spec.config.dense_above,
        "duplicate_above": spec.config.duplicate_above,
        "min_firings_for_quantiles": MIN_FIRINGS,
    }


def _groups_text(config: StatisticsConfig) -> str:
    return (
        f"top: the strongest firing of each of the {config.n_top} documents where the latent is strongest, over all "
        f"training and held-out rows. q3, q2, q1, q0: {config.n_per_group} firings of each quarter (a quarter of the "
        f"latent's firings each, strongest first), drawn from a uniform sample of {config.n_samples} firings. Fewer "
        f"than {MIN_FIRINGS} firings: no quarters. random: {config.n_per_group} firings drawn from the same sample."
    )
