"""What `sae-pipeline store info` prints."""

from flows.lineage import describe
from flows.show import show
from sae.errors import DamagedError
from sae.memory import readable
from sae.store.artefacts.records import read_record
from sae.store.storage.filesystem import Storage
from sae.store.upkeep.info import ArtefactInfo, StoreInfo, iter_descendants

HEADER = ("address", "state", "rows", "parts", "size", "rms norm", "what", "used by")


def info_lines(info: StoreInfo) -> list[str]:
    """A root as a table, and what to do about what is not as it should be."""
    n_bytes = sum(artefact.n_bytes for artefact in info.artefacts)
    rows = [HEADER, *map(_row, info.artefacts)]
    return [f"{info.root}: {len(info.artefacts)} artefacts, {readable(n_bytes)}", "", *_columns(rows), *_remarks(info)]


def artefact_lines(storage: Storage, info: StoreInfo, artefact: ArtefactInfo) -> list[str]:
    """One artefact: what it is, what it is made from, and what is made from it."""
    if artefact.state in ("damaged", "newer format") or artefact.created is None:
        lines = [f"{artefact.ref}: {artefact.state}, {readable(artefact.n_bytes)}"]
        if artefact.n_parts is not None:
            lines.append(f"  parts  {_parts(artefact)}")
    else:
        lines = show(storage.uri(artefact.ref), check=False).splitlines()
        facts = f"{artefact.state}, {readable(artefact.n_bytes)} in the root"
        lines.insert(1, facts if artefact.n_parts is None else f"{facts}, parts: {_parts(artefact)}")
    lines += ["", "used by"]
    for depth, ref in iter_descendants(info, artefact.ref):
        lines.append(f"{'  ' * depth}{ref}  {_describe(storage, ref)}")
    if not artefact.used_by:
        lines.append("  nothing in this root")
    alone = info.model_copy(update={"artefacts": (artefact,), "n_staging": 0, "n_torn_uploads": 0})
    return lines + _remarks(alone)


def _row(artefact: ArtefactInfo) -> tuple[str, ...]:
    rows = "" if artefact.n_rows is None else f"{artefact.n_rows:,}"
    width = "" if artefact.d_in is None else f"{artefact.d_in} {artefact.dtype or ''}".strip()
    place = " ".join(filter(None, (artefact.hook_point, artefact.split)))
    return (
        artefact.ref,
        artefact.state,
        rows,
        _parts(artefact),
        readable(artefact.n_bytes),
        "" if artefact.rms_norm is None else f"{artefact.rms_norm:.4g}",
        ", ".join(filter(None, (place, width))),
        str(len(artefact.used_by) or ""),
    )


def _parts(artefact: ArtefactInfo) -> str:
    if artefact.n_parts is None:
        return ""
    planned = artefact.n_parts_planned
    return f"{artefact.n_parts:,}" if planned in (None, artefact.n_parts) else f"{artefact.n_parts:,} of {planned:,}"


def _remarks(info: StoreInfo) -> list[str]:
    unfinished = [a for a in info.artefacts if a.state == "unfinished"]
    damaged = [a for a in info.artefacts if a.state == "damaged"]
    newer = [a for a in info.artefacts if a.state == "newer format"]
    aside = sum(a.n_set_aside for a in info.artefacts)
    unrecorded = sum(a.n_unrecorded_bytes for a in info.artefacts)
    remarks = []
    if unfinished:
        remarks.append(f"unfinished: {len(unfinished)} artefacts; the run that makes them goes on where it stopped")
    if damaged:
        remarks.append(f"damaged records: {len(damaged)} artefacts; `sae-pipeline store repair CONFIG` mends them")
    if newer:
        remarks.append(f"of a newer format: {len(newer)} artefacts; a newer sae-pipeline reads them")
    if aside:
        remarks.append(f"damaged records set aside: {aside}; `sae-pipeline store gc --damaged-records` lists them")
    if unrecorded:
        remarks.append(
            f"files that no record names: {readable(unrecorded)}; `sae-pipeline store gc` lists the old ones"
        )
    if info.n_staging or info.n_torn_uploads:
        remarks.append(
            f"left over: {info.n_staging} staging folders, {info.n_torn_uploads} torn uploads; `sae-pipeline store gc`"
        )
    return ["", *remarks] if remarks else []


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows as lines: sizes to the right, words to the left, empty columns left out."""
    used = [i for i in range(len(HEADER)) if any(row[i] for row in rows[1:])] or [0]
    widths = {i: max(len(row[i]) for row in rows) for i in used}
    right = {i for i in used if HEADER[i] in ("rows", "parts", "size", "rms norm", "used by")}
    lines = []
    for row in rows:
        cells = [row[i].rjust(widths[i]) if i in right else row[i].ljust(widths[i]) for i in used]
        lines.append("  ".join(cells).rstrip())
    return lines


def _describe(storage: Storage, ref: str) -> str:
    try:
        record = read_record(storage, ref)
    except DamagedError:
        return "(damaged record)"
    return describe(record) if record is not None else "(unfinished)"
