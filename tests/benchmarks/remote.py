"""Ranges from S3 through a slow network, and what they cost the client.

The endpoint is `object_server.py`, not the one of the tests: it sends files from the page cache, so that the client is
what is measured, and its kernel keeps the latency and the rate of every stream. The first rows compare with the formula
n * s / (L + s / r) for n streams that read ranges of s bytes, until the client's or the server's CPU is the limit; the
next compare CPU seconds of this process, for the same ranges of the same objects as fast as they come; the last read
through the tests' network while it misbehaves.
"""

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.fs
import xxhash

from sae.store.storage import s3
from sae.store.storage.filesystem import Storage
from sae.store.storage.http_ranges import HttpRanges
from sae.store.storage.ranges import Range
from tests.benchmarks.object_server import object_server
from tests.benchmarks.timing import Row
from tests.sae.store.network import READING, Network, lottery, network

LATENCY, STREAM_RATE = 0.03, 80_000_000
N_STREAMS = (1, 2, 4, 8, 16, 32)
RANGE_BYTES, RANGES_PER_STREAM = 8 << 20, 4
FAST_RANGE_BYTES, FAST_STREAMS = 32 << 20, 16
FAULTY_RANGE_BYTES, N_FAULTY_RANGES = 1 << 18, 256
N_OBJECTS, OBJECT_BYTES = 4, 128 << 20
N_PAIRS = 3


def remote(folder: Path) -> Iterator[Row]:
    """Throughput of n streams over what n streams can carry; CPU seconds per GB beside s3fs and pyarrow."""
    (folder / "bucket").mkdir()
    rng = np.random.default_rng(0)
    for index in range(N_OBJECTS):
        (folder / "bucket" / str(index)).write_bytes(rng.bytes(OBJECT_BYTES))
    with object_server(folder, LATENCY, STREAM_RATE) as url, _environment(url):
        for n_streams in N_STREAMS:
            yield _streams(folder, n_streams)
    with object_server(folder) as url, _environment(url):
        yield from _costs(url)
    with object_server(folder) as url, network(url) as hop, _environment(hop.url):
        yield from _faults(folder, hop)


def _streams(folder: Path, n_streams: int) -> Row:
    reader = HttpRanges(Storage("s3://bucket"), n_streams)
    ranges = _ranges(n_streams * RANGES_PER_STREAM, RANGE_BYTES)
    reader.read(ranges[:n_streams])  # connections
    rates = []
    for _ in range(N_PAIRS):
        started = time.perf_counter()
        assert all(reader.read(ranges))
        rates.append(len(ranges) * RANGE_BYTES / (time.perf_counter() - started))
    reader.close()
    _check(folder, ranges)
    limit = n_streams * RANGE_BYTES / (LATENCY + RANGE_BYTES / STREAM_RATE)
    return Row(
        f"S3 through 30 ms and 80 MB/s: {n_streams} streams / formula",
        f"{statistics.median(rates) / 1e6:,.0f} MB/s",
        f"{limit / 1e6:,.0f} MB/s",
        tuple(rate / limit for rate in rates),
    )


def _costs(url: str) -> Iterator[Row]:
    storage = Storage("s3://bucket")
    reader = HttpRanges(storage, FAST_STREAMS)
    ranges = _ranges(FAST_STREAMS, FAST_RANGE_BYTES)
    arrow = pyarrow.fs.S3FileSystem(
        access_key="key", secret_key="secret", region="us-east-1", scheme="http", endpoint_override=url.split("//")[1]
    )
    files = {path: arrow.open_input_file(f"bucket/{path}") for path in {wanted.path for wanted in ranges}}

    def by_s3fs(wanted: Range) -> int:
        end = wanted.offset + FAST_RANGE_BYTES
        return len(storage.fs.cat_file(f"bucket/{wanted.path}", start=wanted.offset, end=end))

    def by_pyarrow(wanted: Range) -> int:
        return len(files[wanted.path].read_at(FAST_RANGE_BYTES, wanted.offset))

    others = {"s3fs": by_s3fs, "pyarrow": by_pyarrow}
    with ThreadPoolExecutor(FAST_STREAMS) as threads:
        for name, call in others.items():
            assert set(threads.map(call, ranges)) == {FAST_RANGE_BYTES}
            reader.read(ranges)
            ours, theirs = [], []
            for _ in range(N_PAIRS):
                ours.append(_measured(lambda: reader.read(ranges)))
                theirs.append(_measured(lambda call=call: list(threads.map(call, ranges))))
            n_gb = len(ranges) * FAST_RANGE_BYTES / 1e9
            for what, unit, column in (("CPU", "CPU s/GB", 0), ("time", "s/GB", 1)):
                yield Row(
                    f"S3, ranges of 32 MiB, {what} / {name}",
                    f"{statistics.median(one[column] for one in ours) / n_gb:.2f} {unit}",
                    f"{statistics.median(one[column] for one in theirs) / n_gb:.2f} {unit}",
                    tuple(b[column] / a[column] for a, b in zip(ours, theirs, strict=True)),
                )
    reader.close()


def _faults(folder: Path, hop: Network) -> Iterator[Row]:
    """What faults on a tenth of the requests cost; the bytes are compared with those written."""
    reader = HttpRanges(Storage("s3://bucket"))
    ranges = _ranges(N_FAULTY_RANGES, FAULTY_RANGE_BYTES)
    for kind in (*(kind for kind in READING if kind != "flip"), "silent"):
        seconds = []
        for fault in ("", kind):
            hop.fault = lottery(0, 0.1, [fault])
            hop.faults.clear()
            seconds.append(_measured(lambda: reader.read(ranges))[1])
            _check(folder, ranges)
            for _, _, buffer in ranges:
                buffer[:] = bytes(len(buffer))
        calm, stormy = seconds
        n_mb = N_FAULTY_RANGES * FAULTY_RANGE_BYTES / 1e6
        yield Row(
            f"S3, {kind} on {hop.faults[kind]} of {hop.faults.total()} requests / on none",
            f"{n_mb / stormy:,.0f} MB/s",
            f"{n_mb / calm:,.0f} MB/s",
            (calm / stormy,),
        )
    reader.close()


def _check(folder: Path, ranges: list[Range]) -> None:
    for path, offset, buffer in ranges:
        stored = np.fromfile(folder / "bucket" / path, np.uint8, len(buffer), offset=offset)
        assert xxhash.xxh3_64_intdigest(buffer) == xxhash.xxh3_64_intdigest(stored)


def _ranges(n_ranges: int, n_bytes: int) -> list[Range]:
    """Ranges all over the objects, each with a buffer."""
    per_object = OBJECT_BYTES // n_bytes
    places = [(index % N_OBJECTS, index // N_OBJECTS % per_object * n_bytes) for index in range(n_ranges)]
    return [Range(str(number), offset, memoryview(bytearray(n_bytes))) for number, offset in places]


def _measured(call: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds of this process, and seconds."""
    cpu, started = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - cpu, time.perf_counter() - started


@contextlib.contextmanager
def _environment(url: str) -> Iterator[None]:
    """The environment of somebody who uses this endpoint; whose, it does not ask."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(
        AWS_ENDPOINT_URL=url, AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="secret", AWS_REGION="us-east-1"
    )
    s3.FileSystem.clear_instance_cache()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        s3.FileSystem.clear_instance_cache()
