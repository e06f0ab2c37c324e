"""Bad days, counted: every fault made many times, and what was found after each.

`python -m tests.benchmarks bad_days`, or with tries and a seed `python -m tests.benchmarks.bad_days 100 7`.
"""

import contextlib
import logging
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from tests.bad_days.children import children
from tests.bad_days.place import NotHereError, Place
from tests.bad_days.table import FAULTS, Fault, made
from tests.conftest import s3_endpoint

TRIES, SEED = 10, 0


def bad_days(folder: Path, tries: int = TRIES, seed: int = SEED) -> Iterator[str]:
    """One line per fault: fault, tries, how often what was found.

    Raises: AssertionError when anything was lost, silently wrong, or not resumed to equal bytes.
    """
    yield f"{'fault':<72} {'tries':>5}  outcome"
    with _place(folder) as place:
        for fault in FAULTS:
            yield _line(fault, place, tries, seed)


def _line(fault: Fault, place: Place, tries: int, seed: int) -> str:
    try:
        outcomes = made(fault, place, tries, seed)
    except NotHereError as reason:
        return f"{fault.name:<72} {0:>5}  not made: {reason}"
    counted = "; ".join(f"{count} of {len(outcomes)}: {what}" for what, count in Counter(outcomes).most_common())
    return f"{fault.name:<72} {len(outcomes):>5}  {counted}"


@contextlib.contextmanager
def _place(folder: Path) -> Iterator[Place]:
    """An S3 server, its credentials in the environment, and two hosts of children, while the block runs."""
    with s3_endpoint() as url:
        credentials = {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
        region = {"AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        with mock.patch.dict(os.environ, credentials | region), children() as one, children() as other:
            logging.disable(logging.WARNING)  # every repair is one
            try:
                yield Place(folder, one, other, url)
            finally:
                logging.disable(logging.NOTSET)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as here:
        for line in bad_days(Path(here), *map(int, sys.argv[1:])):
            print(line, flush=True)
