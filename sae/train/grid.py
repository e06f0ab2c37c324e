"""A sweep written as a grid: one entry of `saes` that stands for many.

    [[saes]]
    batch_rows = 8192
    sae = { architecture = "topk", d_sae = 4096, k = 32 }
    grid = { sae = { d_sae = [1024, 4096], k = [16, 32, 64] }, seed = [0, 1] }

A grid is a way of writing: it is expanded before anything else looks at the config, and names are those of its SAEs.
"""

import copy
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, Field

from sae.train.config import TrainConfig

MAX_SAES = 1024
"""Of one grid. More is a slip, and would be made out before anything could refuse it."""
Path = tuple[str, ...]


class TrainGrid(TrainConfig):
    """An SAE, or one for every combination of the values in its grid."""

    grid: dict[str, Any] = Field(default_factory=dict)
    """The config's own settings, each with a list of values instead of one; the last one varies fastest."""


def expand_grids(saes: Any) -> Any:
    """The entries of `saes` with every grid written out. What is no list of tables is left for others to refuse.

    Raises: ValueError that says which grid is wrong.
    """
    if not isinstance(saes, list | tuple):
        return saes
    return [each for index, entry in enumerate(saes) for each in _expanded(entry, f"saes.{index}.grid")]


def _expanded(entry: Any, where: str) -> list[Any]:
    if isinstance(entry, TrainGrid):
        entry = entry.model_dump()
    if not isinstance(entry, Mapping) or "grid" not in entry:
        return [entry]
    base = {name: value for name, value in _plain(entry).items() if name != "grid"}
    grid = entry["grid"]
    if not isinstance(grid, Mapping):
        raise ValueError(f"{where}: a table of settings, each with a list of values, not {grid!r}")
    axes = list(_axes(grid, (), where))
    n_saes = math.prod(len(values) for _, values in axes)
    if n_saes > MAX_SAES:
        raise ValueError(f"{where}: {n_saes:,} SAEs, of which one grid may have {MAX_SAES:,}. Shorten a list")
    found = []
    for values in itertools.product(*(values for _, values in axes)):
        config = copy.deepcopy(base)
        for (path, _), value in zip(axes, values, strict=True):
            _set(config, path, value, where)
        found.append(config)
    return found


def _axes(grid: Mapping[str, Any], path: Path, where: str) -> Iterator[tuple[Path, list[Any]]]:
    for name, value in grid.items():
        inner = (*path, name)
        if isinstance(value, Mapping):
            yield from _axes(value, inner, where)
        elif isinstance(value, list | tuple) and value:
            yield inner, list(value)
        else:
            raise ValueError(f"{where}.{'.'.join(inner)}: a list of values, at least one, not {value!r}")


def _set(config: dict[str, Any], path: Path, value: Any, where: str) -> None:
    *parents, last = path
    for name in parents:
        config = config.setdefault(name, {})
        if not isinstance(config, dict):
            raise ValueError(f"{where}.{'.'.join(path)}: {name!r} is a plain value and has no settings")
    config[last] = value


def _plain(value: Any) -> Any:
    """Nested configs as the dicts that they are made from."""
    if isinstance(value, BaseModel):
        return value.model_dump()
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return value
