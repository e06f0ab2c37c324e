"""`make bench`: speeds as ratios of two things measured in turn in this process; medians, with their spread.

python -m tests.benchmarks [store] [extraction] [loading] [mixing] [remix] [remote] [training] [sweep] [statistics]
[report] [overhead] [scale] [bad_days] [gang] [gpu]
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tests.benchmarks.bad_days import bad_days
from tests.benchmarks.extraction import extraction
from tests.benchmarks.gang import gang
from tests.benchmarks.gpu import gpu
from tests.benchmarks.loading import loading
from tests.benchmarks.mixing import mixing
from tests.benchmarks.overhead import overhead
from tests.benchmarks.remix import remix
from tests.benchmarks.remote import remote
from tests.benchmarks.report import report
from tests.benchmarks.scale import scale
from tests.benchmarks.statistics import statistics
from tests.benchmarks.store_io import store_io
from tests.benchmarks.sweep import sweep
from tests.benchmarks.timing import Cost, Row
from tests.benchmarks.training import training

BENCHMARKS: dict[str, Callable[[Path], Iterator[Row] | Iterator[Cost] | Iterator[str] | Iterator[Row | str]]] = {
    "store": store_io,
    "extraction": extraction,
    "loading": loading,
    "mixing": mixing,
    "remix": remix,
    "remote": remote,
    "training": training,
    "sweep": sweep,
    "statistics": statistics,
    "report": report,
    "overhead": overhead,
    "scale": scale,
    "bad_days": bad_days,
    "gang": gang,
    "gpu": gpu,
}


def main(names: list[str]) -> None:
    """Run the named benchmarks, all by default, and print one table."""
    unknown = set(names) - set(BENCHMARKS)
    if unknown:
        sys.exit(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'what':<62} {'ours':>16} {'reference':>16} {'ratio':>7}  {'min-max':<11} of")
    for name in names or BENCHMARKS:
        with tempfile.TemporaryDirectory() as folder:
            for row in BENCHMARKS[name](Path(folder)):
                print(row, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
