"""What a root holds, from listings and the artefacts' own records: no part's record and no file is read."""

import math
from collections.abc import Iterator
from typing import Any, Literal

from sae.config import FrozenConfig
from sae.errors import DamagedError, StoreError
from sae.progress import Progress, silent
from sae.store.artefacts.record import Record
from sae.store.artefacts.records import read_record
from sae.store.snapshots.snapshot import parts_wanted
from sae.store.storage.filesystem import Storage
from sae.store.upkeep.collect import Contents, iter_refs

State = Literal["finished", "unfinished", "damaged", "newer format"]


class ArtefactInfo(FrozenConfig):
    """One artefact as the root has it."""

    ref: str
    state: State
    """unfinished: it has no commit record, or not all the parts that snapshots of it take (all, where there is none).
    damaged: its record cannot be read."""
    n_bytes: int
    """Of everything in its folder, records and left-overs included."""
    n_parts: int | None = None
    """Finished parts; None for artefacts that have none."""
    n_parts_planned: int | None = None
    """How many all contexts of the split make; a snapshot may take fewer."""
    n_rows: int | None = None
    """Of a snapshot; parts of a set tell theirs in their own records."""
    d_in: int | None = None
    dtype: str | None = None
    hook_point: str | None = None
    split: str | None = None
    rms_norm: float | None = None
    """sqrt(E||x - mean||^2) of a snapshot's vectors."""
    created: str | None = None
    inputs: tuple[str, ...] = ()
    used_by: tuple[str, ...] = ()
    """Artefacts of this root that are made from it."""
    n_set_aside: int = 0
    """Damaged records that were set aside."""
    n_unrecorded_bytes: int = 0
    """Of content that no record names: a running writer's, or a killed one's."""


class StoreInfo(FrozenConfig):
    """A whole root."""

    root: str
    artefacts: tuple[ArtefactInfo, ...]
    n_staging: int
    """Staging folders whose owner has died."""
    n_torn_uploads: int


def read_info(storage: Storage, progress: Progress = silent) -> StoreInfo:
    """What a root holds: one listing and one record for each artefact.

    Raises: TransientError, StoreError as Storage.
    """
    refs = list(iter_refs(storage))
    found: dict[str, ArtefactInfo] = {}
    records: dict[str, Record] = {}
    used_by: dict[str, list[str]] = {}
    for done, ref in enumerate(refs):
        found[ref], record = _read_artefact(storage, ref)
        if record is not None:
            records[ref] = record
        for source in dict.fromkeys(found[ref].inputs):
            used_by.setdefault(source, []).append(ref)
        progress(done + 1, len(refs), "artefacts")
    wanted = _wanted_parts(records)
    artefacts = []
    for ref, artefact in found.items():
        more: dict[str, Any] = {"used_by": tuple(used_by.get(ref, ())), **_source_facts(artefact, found)}
        n_wanted = wanted.get(ref, artefact.n_parts_planned)
        if artefact.state == "finished" and n_wanted is not None and (artefact.n_parts or 0) < n_wanted:
            more["state"] = "unfinished"
        artefacts.append(artefact.model_copy(update=more))
    return StoreInfo(
        root=storage.root,
        artefacts=tuple(artefacts),
        n_staging=sum(1 for _ in storage.abandoned_staging()),
        n_torn_uploads=sum(1 for _ in storage.torn_uploads()),
    )


def iter_descendants(info: StoreInfo, ref: str) -> Iterator[tuple[int, str]]:
    """Everything that is made from an artefact, depth first: (depth, address). Each once."""
    used_by = {artefact.ref: artefact.used_by for artefact in info.artefacts}
    seen: set[str] = set()

    def visit(ref: str, depth: int) -> Iterator[tuple[int, str]]:
        for user in used_by.get(ref, ()):
            if user not in seen:
                seen.add(user)
                yield depth, user
                yield from visit(user, depth + 1)

    yield from visit(ref, 1)


def _wanted_parts(records: dict[str, Record]) -> dict[str, int]:
    """Part set -> how many of its parts the finished snapshots take; a set that none takes is left out."""
    wanted: dict[str, int] = {}
    for ref, record in records.items():
        sources = [records[source] for source in record.inputs.values() if source in records]
        if ref.startswith("activations/") and len(sources) == len(record.inputs):
            counts = parts_wanted(sources, record.spec["n_tokens"])
            for source, count in zip(sources, counts, strict=True):
                wanted[source.ref] = max(count, wanted.get(source.ref, 0))
    return wanted


def _read_artefact(storage: Storage, ref: str) -> tuple[ArtefactInfo, Record | None]:
    there = Contents(storage, ref)
    numbers = there.records - {None}
    record: Record | None = None
    state: State = "unfinished"
    try:
        record = read_record(storage, ref)
        state = "unfinished" if record is None else "finished"
    except DamagedError:
        state = "damaged"
    except StoreError:
        state = "newer format"
    facts = _facts(record) if record is not None else {}
    artefact = ArtefactInfo(
        ref=ref,
        state=state,
        n_bytes=there.n_bytes,
        n_parts=len(numbers) if numbers or "n_parts_planned" in facts else None,
        n_set_aside=len(there.set_aside),
        n_unrecorded_bytes=sum(total.n_bytes for part, total in there.contents.values() if part not in there.records),
        **facts,
    )
    return artefact, record


def _facts(record: Record) -> dict[str, Any]:
    """What a record tells beside its address."""
    spec, metrics = record.spec, record.metrics
    facts: dict[str, Any] = {
        "created": record.produced.created,
        "inputs": tuple(record.inputs.values()),
        "d_in": metrics.get("d_in"),
    }
    stage = record.ref.partition("/")[0]
    if stage == "parts":
        facts |= {name: spec.get(name) for name in ("hook_point", "split", "dtype")}
        facts["n_parts_planned"] = metrics["n_parts"]
    if stage == "activations":
        facts |= {"n_rows": metrics["n_rows"], "dtype": metrics["dtype"]}
        facts["rms_norm"] = math.sqrt(metrics["mean_sq_norm"])
    return facts


def _source_facts(artefact: ArtefactInfo, found: dict[str, ArtefactInfo]) -> dict[str, Any]:
    """Hook point and split of a snapshot: those of its part sets."""
    if not artefact.ref.startswith("activations/"):
        return {}
    sources = [found[ref] for ref in artefact.inputs if ref in found]
    return {"hook_point": sources[0].hook_point, "split": sources[0].split} if sources else {}
