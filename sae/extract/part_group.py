"""A group of consecutive parts, one after the other: what one task extracts."""

from collections.abc import Sequence

from sae.extract.config import PartsSpec
from sae.extract.part import extract_part
from sae.progress import Progress, silent
from sae.store.filesystem import Storage
from sae.store.part_sets import write_index
from sae.store.records import is_intact, require_record
from sae.subject.load import load_subject


def extract_group(
    storage: Storage,
    specs: Sequence[PartsSpec],
    parts: tuple[int, int],
    *,
    recompute: bool = False,
    progress: Progress = silent,
) -> None:
    """Write those of the parts [first, stop) of several hook points that are not there; each is committed by itself.

    Whether a part is there is asked when its turn comes: other processes may be at work on the same parts.

    Args:
        specs: as extract_part takes them.
        recompute: write all of them, the same bytes again.

    Raises: as extract_part.
    """
    subject = None
    for part in range(*parts):
        missing = [spec for spec in specs if recompute or not is_intact(storage, spec.ref, part)]
        if missing:
            subject = subject or load_subject(storage, missing[0].subject)
            extract_part(storage, missing, part, subject=subject, progress=progress)
    for spec in specs:
        n_parts = int(require_record(storage, spec.ref).metrics["n_parts"])
        write_index(storage, spec.ref, n_parts, range(*parts))
