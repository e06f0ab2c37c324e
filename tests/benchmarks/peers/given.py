"""What `peer_world.write_world` wrote, as the scripts of this folder read it in the peers' own environment."""

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


@dataclass(frozen=True)
class Given:
    """One case: folders with the subject and the SAE, the tokens, and the rows of those that are not special."""

    folder: Path
    hook_point: str
    special: int
    peaky: float
    k: int
    tokens: torch.Tensor
    """int64 [contexts, T]"""
    x: torch.Tensor
    """[rows, d_in]"""
    contexts_per_batch: dict[str, list[int]]
    rows_per_batch: dict[str, list[int]]


class Batches:
    """Stands where a peer expects its store of tokens: the given batches, in turn."""

    def __init__(self, tokens: torch.Tensor, sizes: list[int]) -> None:
        self.batches = iter(tokens.split(sizes))

    def get_batch_tokens(self, _size: int) -> torch.Tensor:
        return next(self.batches)


def report(package: str, measure: Callable[[Given], dict[str, Any]]) -> None:
    """Measure every case in the folder of argv[1]; write `<package>.json` there."""
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    plan = json.loads((folder / "plan.json").read_text())
    data = load_file(folder / "data.safetensors")
    cases = {}
    for case in plan["cases"]:
        cases[case] = measure(
            Given(
                folder / case,
                plan["hook_point"],
                plan["special"],
                plan["peaky"],
                plan["k"],
                data["tokens"],
                data[f"x/{case}"],
                plan["contexts_per_batch"],
                plan["rows_per_batch"],
            )
        )
    result = {"version": version(package), "cases": cases}
    (folder / f"{package}.json").write_text(json.dumps(result))
