"""`make bench-peer-metrics`: our measures beside other libraries' own code, on the same SAE and rows.

python -m tests.benchmarks.peer_metrics PYTHON

PYTHON is the interpreter of the peers' environment. Every figure of ours is held against a float64 computation by
definition; where a peer's differs, the formula that gives it is named and checked. Exits with 1 when one of ours is
wrong or a difference stays unexplained.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from tests.benchmarks import peer_lines
from tests.benchmarks.peer_lines import IGNORED, ROWS, Downstream, Line, Measured
from tests.benchmarks.peer_world import BATCHES, SPECIAL, UNEVEN, World, make_world, write_world

SCRIPTS = {
    "sae-lens": "run_saelens.py",
    "sae-bench": "run_saebench.py",
    "eai-sparsify": "run_sparsify.py",
    "dictionary-learning": "run_dictionary_learning.py",
}
DOWNSTREAM_CASES = ("trained", "constant error")
Found = dict[str, dict[str, Any]]
"""Peer -> what its script reports."""


def main(python: str) -> None:
    """Run every peer on the same folder and print the tables."""
    disable_progress_bar()
    torch.set_num_threads(1)  # the same bits, and so the same figures, wherever it runs
    world = make_world()
    with tempfile.TemporaryDirectory() as name:
        write_world(world, Path(name))
        found = {peer: _run(python, script, Path(name), peer) for peer, script in SCRIPTS.items()}
    print(", ".join(f"{peer} {result['version']}" for peer, result in found.items()))
    print(f"Contexts per batch: {UNEVEN}. naive: by definition, float64. Special token: {SPECIAL}.")
    _print_lines("Rows", _row_lines(world, found, "trained", UNEVEN))
    for ignored in IGNORED:
        _print_lines(f"Next-token loss and KL, {ignored}", _downstream_lines(world, found, "trained", ignored))
    _print_lines("A confident subject", _confident_lines(world, found))
    _print_grid("FVU by contexts per batch", {batching: ("trained", batching) for batching in BATCHES}, world, found)
    _print_grid("FVU by case", {case: (case, UNEVEN) for case in world.cases}, world, found)
    for name, case in world.cases.items():
        print(f"  {name}: {case.what}")
    sparsify = found["eai-sparsify"]["cases"]["trained"]
    print(
        f"\nsparsify with {sparsify['micro_batches']} micro-batches: Trainer.fit's arithmetic over SparseCoder.forward "
        f"gives {sparsify['micro_batches_fvu']:.6f}, the batch's FVU over the number of micro-batches."
    )
    lines = list(_all_lines(world, found))
    faults = [f"{peer}, {line.measure}: {line.fault}: {line}" for peer, line in lines if line.fault]
    print(f"\n{len(lines)} comparisons ({len(world.cases)} cases, {len(BATCHES)} batchings): {len(faults)} faults")
    sys.exit("\n".join(faults) or 0)


def _run(python: str, script: str, folder: Path, peer: str) -> dict[str, Any]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    path = Path(__file__).parent / "peers" / script
    done = subprocess.run([python, str(path), str(folder)], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{path} failed in {python}:\n{done.stderr[-4000:]}")
    return json.loads((folder / f"{peer}.json").read_text())


def _row_lines(world: World, found: Found, case: str, batching: str) -> Iterator[tuple[str, Line]]:
    measured = Measured(world, world.cases[case], batching)
    for peer, lines in ROWS.items():
        for line in lines(found[peer]["cases"][case]["rows"][batching], measured):
            yield peer, line


def _downstream_lines(world: World, found: Found, case: str, ignored: str) -> Iterator[tuple[str, Line]]:
    downstream = Downstream(world, world.cases[case], IGNORED[ignored])
    for peer in ("sae-lens", "sae-bench"):
        for line in peer_lines.saelens_downstream(
            found[peer]["cases"][case]["downstream"][ignored][UNEVEN], downstream
        ):
            yield peer, line
    theirs = found["dictionary-learning"]["cases"][case]["downstream"].get(ignored)
    if theirs is not None:
        lines = peer_lines.dictionary_learning_downstream(theirs[UNEVEN], downstream, list(BATCHES[UNEVEN]))
        for line in lines:
            yield "dictionary-learning", line


def _confident_lines(world: World, found: Found) -> Iterator[tuple[str, Line]]:
    reported = {peer: result["cases"]["trained"] for peer, result in found.items()}
    return peer_lines.confident_lines(reported, world, world.cases["trained"])


def _all_lines(world: World, found: Found) -> Iterator[tuple[str, Line]]:
    for case in world.cases:
        for batching in BATCHES:
            if batching != "1" or case == "trained":
                yield from _row_lines(world, found, case, batching)
    for case in DOWNSTREAM_CASES:
        for ignored in IGNORED:
            yield from _downstream_lines(world, found, case, ignored)
    yield from _confident_lines(world, found)


def _print_lines(title: str, lines: Iterator[tuple[str, Line]]) -> None:
    names = f"{'peer':<20}{'measure / as the peer calls it':<66}"
    print(f"\n{title}\n{names}{'ours':>11}{'theirs':>11}{'naive':>11}  equal  why not")
    for peer, line in lines:
        figures = "".join(f"{value:>11.6f}" for value in (line.ours, line.theirs, line.naive))
        verdict = "yes" if line.equal else "no"
        print(f"{peer:<20}{line.measure:<66}{figures}  {verdict:<5}  {'' if line.equal else line.why}")


def _print_grid(title: str, columns: dict[str, tuple[str, str]], world: World, found: Found) -> None:
    """Every FVU, ours once and each peer's, over batchings or cases."""
    print(f"\n{title}\n{'':<62}" + "".join(f"{name:>16}" for name in columns))
    rows: dict[str, list[float]] = {}
    for case, batching in columns.values():
        measured = Measured(world, world.cases[case], batching)
        for figure in (measured.fvu, measured.of_batches, measured.centred):
            rows.setdefault(f"ours: {figure.measure}", []).append(figure.ours)
        for peer, line in _row_lines(world, found, case, batching):
            if line.measure.startswith("FVU / "):
                rows.setdefault(f"{peer}: {line.measure.removeprefix('FVU / ')}", []).append(line.theirs)
    for name, values in rows.items():
        print(f"{name:<62}" + "".join(f"{value:>16.6f}" for value in values))


if __name__ == "__main__":
    main(sys.argv[1])
