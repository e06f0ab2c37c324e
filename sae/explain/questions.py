"""What is shown and asked about each latent, chosen before any model is: contexts to explain, contexts held back.

The artefact is the whole of the text that an explainer is sent, so it can be looked at beforehand, and every model
that is asked gets the same questions.
"""

import json
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae.errors import InputError
from sae.explain.config import QuestionsSpec
from sae.explain.prompts import marked_runs
from sae.explain.silence import DrawnWindow, draw_windows
from sae.philox import philox
from sae.progress import Progress, silent
from sae.store.artefacts import records
from sae.store.artefacts.records import Record
from sae.store.snapshots.snapshot import read_snapshot
from sae.store.storage.filesystem import Storage
from sae.store.text.rows import text_source
from sae.subject.load import load_tokenizer
from sae.subject.text import token_bytes
from sae.weights import load_sae

logger = logging.getLogger(__name__)

T = TypeVar("T")

QUARTERS = ("q3", "q2", "q1", "q0")
MIN_SHOWN, MIN_SCORED = 2, 4
"""Contexts on which a latent must fire to be explained, and to be tested on others."""

SCHEMA = pa.schema(
    {
        "latent": pa.int32(),
        "role": pa.string(),
        "number": pa.int32(),
        "kind": pa.string(),
        "truth": pa.bool_(),
        "tokens": pa.list_(pa.binary()),
        "marked": pa.list_(pa.bool_()),
        "activations": pa.list_(pa.float32()),
        "segment": pa.int32(),
        "seq": pa.int32(),
        "pos": pa.int32(),
    }
)
"""Of questions.parquet, sorted by latent, role and number.

role: `shown` to the explainer, or asked about in `detection` or `fuzzing`; number: its place there. kind: `top`, `q3`
to `q0` (quarters of the firings, strongest first), `miss` (near miss) or `silent`. truth: whether the latent fires in
the window (detection), whether the right tokens are marked (fuzzing); null for shown. Never sent: truth and place.
"""


class Window(NamedTuple):
    """Tokens of one context and what one latent does on them."""

    kind: str
    tokens: tuple[bytes, ...]
    activations: tuple[float, ...]
    segment: int
    seq: int
    pos: int

    @property
    def fires(self) -> list[bool]:
        """Of every token, whether the latent fires there."""
        return [activation > 0 for activation in self.activations]


class Drawn(NamedTuple):
    """A window and the latents that fire in it."""

    window: Window
    latents: frozenset[int]


class Chosen(NamedTuple):
    """One latent's windows; no two of them are of one context or have the same tokens."""

    shown: list[Window]
    firing: list[Window]
    """Held back."""
    silent: list[Window]


def write_questions(storage: Storage, spec: QuestionsSpec, *, progress: Progress = silent) -> Record:
    """Choose latents and their windows, and commit them (`questions.parquet`, `questions.json`).

    Raises: InputError when the SAE lacks a latent that was named, or none is live.
    """
    started = time.perf_counter()
    statistics = records.require_record(storage, spec.statistics)
    with records.local_files(storage, statistics, "latents.parquet", "examples.parquet") as folder:
        n_fired = pq.read_table(folder / "latents.parquet", columns=["latent", "n_fired"]).sort_by("latent")["n_fired"]
        latents = choose_latents(spec, n_fired.to_numpy())
        progress(0, len(latents), "latents", "contexts")
        examples = read_examples(folder / "examples.parquet", latents)
    drawn = _silent_windows(storage, spec)
    rows: list[dict[str, Any]] = []
    listed: list[dict[str, Any]] = []
    for done, latent in enumerate(latents, 1):
        chosen = choose_windows(spec, latent, examples.get(latent, {}), drawn)
        reason = _reason(int(n_fired[latent].as_py()), chosen)
        if reason is None:
            rows += _rows(spec, latent, chosen)
        listed.append({"latent": latent, "n_fired": int(n_fired[latent].as_py()), "not_asked_because": reason})
        progress(done, len(latents), "latents", "contexts")
    rows.sort(key=lambda row: (row["latent"], row["role"], row["number"]))
    summary = {
        "latents": listed,
        "chosen": "named" if spec.latents is not None else f"random among the live ones, seed {spec.seed}",
        "n_drawn_windows": len(drawn),
        "sent": "of each row the tokens, with marks (shown, fuzzing) or without (detection), and strengths (shown)",
    }
    n_asked = sum(entry["not_asked_because"] is None for entry in listed)
    metrics = {"n_latents": len(latents), "n_asked": n_asked, "n_windows": len(rows)}
    with storage.staging() as folder:
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / "questions.parquet", compression="zstd")
        (folder / "questions.json").write_text(json.dumps(summary, indent=1) + "\n")
        return records.commit(storage, spec, folder, metrics, seconds=time.perf_counter() - started)


def choose_latents(spec: QuestionsSpec, n_fired: np.ndarray) -> list[int]:
    """The latents that were named, or random live ones, sorted. n_fired: [d_sae]. Raises: as write_questions."""
    if spec.latents is not None:
        for latent in spec.latents:
            if latent >= len(n_fired):
                raise InputError(f"labels.latents: there is no latent {latent}, {spec.sae} has {len(n_fired)}")
        return sorted(spec.latents)
    live = np.flatnonzero(n_fired > 0)
    if len(live) == 0:
        raise InputError(f"labels: no latent of {spec.sae} ever fires, so there is nothing to explain")
    return sorted(philox("labelled latents", spec.seed).permutation(live)[: spec.n_latents].tolist())


def read_examples(path: Path, latents: list[int]) -> dict[int, dict[str, list[Window]]]:
    """Latent -> group -> its windows in order of their rank, of examples.parquet."""
    columns = ["latent", "group", "rank", "token_bytes", "activations", "segment", "seq", "pos"]
    table = pq.read_table(path, columns=columns, filters=[("latent", "in", latents)])
    found: dict[int, dict[str, list[Window]]] = {}
    for row in table.sort_by([("latent", "ascending"), ("group", "ascending"), ("rank", "ascending")]).to_pylist():
        window = Window(
            row["group"],
            tuple(row["token_bytes"]),
            tuple(row["activations"]),
            row["segment"],
            row["seq"],
            row["pos"],
        )
        found.setdefault(row["latent"], {}).setdefault(row["group"], []).append(window)
    return found


def choose_windows(spec: QuestionsSpec, latent: int, groups: dict[str, list[Window]], drawn: list[Drawn]) -> Chosen:
    """Hold back some firings of every quarter; show the strongest others and some of every quarter; add silence.

    A near miss counts as silent only where the latent is silent in its whole window.

    Args:
        groups: the latent's examples by group.
        drawn: windows of which it is known which latents fire in them.
    """
    config, generator = spec.contexts, philox("label contexts", spec.seed, latent)
    taken = _Taken()
    firing: list[Window] = []
    rest: dict[str, list[Window]] = {}
    for quarter in QUARTERS:
        windows = taken.fresh(_shuffled(groups.get(quarter, []), generator))
        # Where firings are few, both sides get some.
        n_held = min(
            config.n_scored_per_quarter, max(len(windows) - config.n_shown_per_quarter, (len(windows) + 1) // 2)
        )
        firing += taken.take(windows, n_held)
        rest[quarter] = windows[n_held:]
    shown = taken.take(groups.get("top", []), config.n_top)
    for quarter in QUARTERS:
        shown += taken.take(rest[quarter], config.n_shown_per_quarter)
    misses = [window for window in groups.get("miss", []) if not any(window.fires)]
    quiet = taken.take(misses, config.n_misses)
    others = [each.window for each in drawn if latent not in each.latents]
    n_silent = config.n_misses + config.n_silent - len(quiet)
    quiet += taken.take(_shuffled(others, generator), n_silent)
    return Chosen(shown, firing, quiet)


class _Taken:
    """Windows that are in use: no other of their context or with their tokens may be."""

    def __init__(self) -> None:
        self._places: set[tuple[int, int]] = set()
        self._texts: set[tuple[bytes, ...]] = set()

    def fresh(self, windows: Iterable[Window]) -> list[Window]:
        """Those that are not in use, each context and text once."""
        other = _Taken()
        other._places, other._texts = set(self._places), set(self._texts)
        return other.take(windows, None)

    def take(self, windows: Iterable[Window], n: int | None) -> list[Window]:
        """The first `n` (None: all) that are not in use; they are from now on."""
        found: list[Window] = []
        for window in windows:
            if len(found) == n:
                break
            place = (window.segment, window.seq)
            if place not in self._places and window.tokens not in self._texts:
                self._places.add(place)
                self._texts.add(window.tokens)
                found.append(window)
        return found


def mark_others(fires: list[bool], generator: np.random.Generator) -> list[bool] | None:
    """As many tokens marked, in pieces as long, where the latent is silent; None when there is no room for them.

    Pieces of the same lengths, so that the marks' shape does not tell which are right.
    """
    free = [not fired for fired in fires]
    marked = [False] * len(fires)
    for start, stop in sorted(marked_runs(fires), key=lambda run: run[0] - run[1]):
        length = stop - start
        places = [i for i in range(len(free) - length + 1) if all(free[i : i + length])]
        if not places:
            return None
        place = int(generator.choice(places))
        for i in range(place, place + length):
            marked[i] = True
        # Pieces that touch would be one.
        for i in range(max(0, place - 1), min(len(free), place + length + 1)):
            free[i] = False
    return marked


def _silent_windows(storage: Storage, spec: QuestionsSpec) -> list[Drawn]:
    snapshot = read_snapshot(storage, spec.snapshot)
    with records.local_files(storage, records.require_record(storage, spec.sae)) as folder:
        sae = load_sae(folder).float()
    windows = draw_windows(storage, sae, snapshot, spec.window_tokens, spec.seed)
    tokenizer = load_tokenizer(storage, records.require_record(storage, spec.tokens[0]).spec["tokenizer"])
    segments: dict[str, int] = {}
    for ref in sorted(snapshot.refs):
        source = text_source(storage, ref)
        assert source
        segments[ref] = spec.tokens.index(source.tokens)
    return [_drawn(window, segments[snapshot.parts[window.part].ref], tokenizer) for window in windows]


def _drawn(window: DrawnWindow, segment: int, tokenizer: Any) -> Drawn:
    tokens = tuple(token_bytes(tokenizer, window.token_ids))
    return Drawn(Window("silent", tokens, (0.0,) * len(tokens), segment, window.seq, window.pos), window.latents)


def _reason(n_fired: int, chosen: Chosen) -> str | None:
    """Why nothing is asked about a latent, if so."""
    if n_fired == 0:
        return "it never fires"
    if len(chosen.shown) < MIN_SHOWN or len(chosen.firing) < MIN_SCORED:
        return f"it fires {n_fired} times, in too few different contexts to show {MIN_SHOWN} and hold {MIN_SCORED} back"
    return None


def _rows(spec: QuestionsSpec, latent: int, chosen: Chosen) -> list[dict[str, Any]]:
    generator = philox("label order", spec.seed, latent)
    detection = [(window, any(window.fires), [False] * len(window.tokens)) for window in chosen.firing + chosen.silent]
    rows = [_row(latent, "shown", i, window, None, window.fires) for i, window in enumerate(chosen.shown)]
    rows += [_row(latent, "detection", i, *each) for i, each in enumerate(_shuffled(detection, generator))]
    return rows + [_row(latent, "fuzzing", i, *each) for i, each in enumerate(_fuzzed(chosen.firing, generator))]


def _fuzzed(firing: list[Window], generator: np.random.Generator) -> list[tuple[Window, bool, list[bool]]]:
    """Every other firing window of each quarter with other tokens marked, in random order."""
    found: list[tuple[Window, bool, list[bool]]] = []
    wrong = bool(generator.integers(2))
    for window in firing:
        others = mark_others(window.fires, generator) if wrong else None
        found.append((window, others is None, others or window.fires))
        # Where no others could be marked, the next window is tried, so that both kinds stay as many.
        wrong = not wrong or others is None
    return _shuffled(found, generator)


def _row(latent: int, role: str, number: int, window: Window, truth: bool | None, marked: list[bool]) -> dict[str, Any]:
    return {
        "latent": latent,
        "role": role,
        "number": number,
        "kind": window.kind,
        "truth": truth,
        "tokens": list(window.tokens),
        "marked": marked,
        "activations": list(window.activations),
        "segment": window.segment,
        "seq": window.seq,
        "pos": window.pos,
    }


def _shuffled(items: list[T], generator: np.random.Generator) -> list[T]:
    return [items[i] for i in generator.permutation(len(items))]
