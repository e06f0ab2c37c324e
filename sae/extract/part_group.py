"""Runs of consecutive parts of several hook points: what one task extracts."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from sae.extract.config import PartsSpec
from sae.extract.part import extract_parts
from sae.progress import Progress, silent
from sae.store.artefacts.records import require_record
from sae.store.snapshots.part_sets import groups_of, write_index
from sae.store.storage.filesystem import Storage

MAX_UNITS = 16
"""Units in a run: by then a task's start costs nothing, and what is lost with it is little."""


class WantedParts(NamedTuple):
    """The first parts of a part set, as many as are wanted."""

    contexts_per_part: int
    n_parts: int
    """Of the whole set."""
    wanted: int


class SharedParts(NamedTuple):
    """Part sets whose parts are on the same contexts, unit by unit."""

    sets: list[int]
    """Which of the sets given."""
    units: list[list[range]]
    """For every stretch of contexts the parts that each set has of them; none of a set that is at its end."""

    def runs(self, n_runs: int) -> Iterator[list[list[range]]]:
        """Units side by side, in so many runs or more, for one task each."""
        whole_groups = any(len(parts) > 1 for parts in self.units[0][:1])
        size = 1 if whole_groups else min(MAX_UNITS, max(1, len(self.units) // n_runs))
        for start in range(0, len(self.units), size):
            yield self.units[start : start + size]


def share_contexts(sets: Sequence[WantedParts]) -> list[SharedParts]:
    """Bring together the part sets whose parts, or groups of parts, lie within each other's.

    Parts are a power of two of batches of contexts, so all do, unless sets are so large that parts come in groups.
    """
    spans = [each.contexts_per_part * len(groups_of(each.n_parts)[0]) if each.wanted else 0 for each in sets]
    together: list[list[int]] = []
    for index in sorted(range(len(sets)), key=lambda index: -spans[index]):
        if spans[index]:
            fits = (others for others in together if spans[others[0]] % spans[index] == 0)
            if (others := next(fits, None)) is not None:
                others.append(index)
            else:
                together.append([index])
    found = []
    for indices in together:
        span = spans[indices[0]]
        n_contexts = max(sets[index].wanted * sets[index].contexts_per_part for index in indices)
        units = [
            [
                range(
                    min(start // sets[index].contexts_per_part, sets[index].wanted),
                    min((start + span) // sets[index].contexts_per_part, sets[index].wanted),
                )
                for index in indices
            ]
            for start in range(0, n_contexts, span)
        ]
        found.append(SharedParts(indices, units))
    return found


def extract_group(
    storage: Storage,
    specs: Sequence[PartsSpec],
    parts: Sequence[tuple[int, int]],
    *,
    recompute: bool = False,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> None:
    """Write those of the parts that are not there, as extract_parts does, and the indexes of whole groups.

    Args:
        specs: as extract_parts takes them.
        parts: of each spec the parts [first, stop).
        recompute: write all of them, the same bytes again.
        device: where the model runs.

    Raises: as extract_parts.
    """
    ranges = [range(*each) for each in parts]
    extract_parts(storage, specs, ranges, recompute=recompute, device=device, progress=progress)
    for spec, numbers in zip(specs, ranges, strict=True):
        n_parts = int(require_record(storage, spec.ref).metrics["n_parts"])
        write_index(storage, spec.ref, n_parts, numbers)
