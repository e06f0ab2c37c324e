"""`make bench-peer-loading`: our loader beside what others feed an SAE's training from, on the same rows.

python -m tests.benchmarks.peer_loading PYTHON

PYTHON is the interpreter of the peers' environment. Every peer runs its own code in a process of its own, as its script
in peers/ says, and turns with ours. All deliver batches of 4096 rows of float32 from float16 in the page cache; buffers
hold the same number of contexts as our window. What their orders are worth is in mixing.py. Rows of a memory map that
is larger than memory would be read from the disk one by one: that is not measured.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from sae.store.reading.loader import Loader
from sae.store.reading.shuffle import ShuffleConfig
from sae.store.storage.filesystem import Storage
from tests.benchmarks.snapshots import random_rows, write_repeated

D_IN, PART_ROWS, N_PARTS, GROUP_ROWS = 512, 65_536, 4, 4096
"""256 MiB: parts of 64 MiB, row groups of 4 MiB."""
BATCH_ROWS, CONTEXT_ROWS, WINDOW_ROW_GROUPS, N_PAIRS = 4096, 128, 32, 3
SCRIPTS = {
    "sae-lens, cached activations": ("load_saelens.py",),
    "sae-lens, cached activations, small buffer": ("load_saelens.py", "64"),
    "dictionary-learning, ActivationBuffer": ("load_dictionary_learning.py",),
    "torch, memmap DataLoader, 0 workers": ("load_memmap.py", "0", "rows"),
    "torch, memmap DataLoader, 2 workers": ("load_memmap.py", "2", "rows"),
    "torch, memmap DataLoader by batch, 0 workers": ("load_memmap.py", "0", "batches"),
    "torch, memmap DataLoader by batch, 2 workers": ("load_memmap.py", "2", "batches"),
}


def main(python: str) -> None:
    """Time every peer in turn with ours and print a table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        act = random_rows(PART_ROWS, D_IN)
        storage = Storage(str(folder / "root"))
        snapshot = write_repeated(storage, act, n_parts=N_PARTS, row_group_rows=GROUP_ROWS)
        _write_rows(folder, act)
        shuffle = ShuffleConfig(window_row_groups=WINDOW_ROW_GROUPS)
        loader = Loader(storage, snapshot, BATCH_ROWS, seed=0, shuffle=shuffle)
        print(f"{torch.get_num_threads()} threads, {snapshot.n_rows:,} rows of {D_IN}, {N_PAIRS} pairs, medians")
        print(f"{'':<46}{'version':<14}{'ours rows/s':>14}{'theirs rows/s':>16}{'ratio':>8}  min-max")
        _ours(loader)
        for peer, script in SCRIPTS.items():
            pairs = [(_ours(loader), _theirs(python, script, folder)) for _ in range(N_PAIRS)]
            ours, theirs = (statistics.median(speeds) for speeds in zip(*[(a, b) for a, (b, _) in pairs], strict=True))
            ratios = [a / b for a, (b, _) in pairs]
            print(
                f"{peer:<46}{pairs[0][1][1]:<14}{ours:>14,.0f}{theirs:>16,.0f}{statistics.median(ratios):>8.1f}"
                f"  {min(ratios):.1f}-{max(ratios):.1f}",
                flush=True,
            )
        loader.close()


def _write_rows(folder: Path, act: np.ndarray) -> None:
    rows = np.lib.format.open_memmap(folder / "rows.npy", "w+", np.float16, (N_PARTS * PART_ROWS, D_IN))
    for part in range(N_PARTS):
        rows[part * PART_ROWS : (part + 1) * PART_ROWS] = act
    rows.flush()
    buffer_contexts = WINDOW_ROW_GROUPS * GROUP_ROWS // CONTEXT_ROWS
    settings = {"context_rows": CONTEXT_ROWS, "batch_rows": BATCH_ROWS, "buffer_contexts": buffer_contexts}
    (folder / "settings.json").write_text(json.dumps(settings))


def _ours(loader: Loader) -> float:
    started = time.perf_counter()
    n_rows = sum(len(next(loader)) for _ in range(loader.batches_per_epoch))
    return n_rows / (time.perf_counter() - started)


def _theirs(python: str, script: tuple[str, ...], folder: Path) -> tuple[float, str]:
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    environment.pop("PYTHONPATH", None)
    path = Path(__file__).parent / "peers" / script[0]
    command = [python, str(path), str(folder), *script[1:]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{path} failed in {python}:\n{done.stderr[-4000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return found["rows_per_second"], found["version"]


if __name__ == "__main__":
    main(sys.argv[1])
