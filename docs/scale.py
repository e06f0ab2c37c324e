"""The arithmetic of docs/scale.md: what a store of a given size takes, and an SAE on many GPUs.

    python docs/scale.py                                          # the tables of scale.md
    python docs/scale.py --bytes 2e14 --part-gib 2 --workers 32   # your own store, in one column

Every number of a store that is not derived is a field of `Store` or `World`, with where it comes from; those of GPUs
are in `sae/train/cluster.py` and `sae/train/step_costs.py`. `sae-pipeline plan CONFIG` does the same for one
configuration, with probes in place of assumptions, and with `--gpus N` for its mesh.
"""

import argparse
import math
from dataclasses import dataclass, fields

from sae.architectures.config import TopKConfig
from sae.extract.part_group import MAX_UNITS
from sae.memory import readable
from sae.store.reading.mixing import expected_variance
from sae.store.reading.shuffle import RowGroups, ShuffleConfig
from sae.store.reading.windows import GROUPS_AT_ONCE
from sae.store.snapshots.part_sets import groups_of
from sae.store.storage.http_ranges import N_STREAMS
from sae.store.storage.ranges import PIECE_BYTES
from sae.store.storage.s3 import UPLOAD_BYTES
from sae.train.cluster import DEFAULT_RATES, Cluster, Trained
from sae.train.config import TrainConfig
from sae.train.layouts import choose, plan_layouts

GIB, MIB = 1 << 30, 1 << 20


@dataclass(frozen=True)
class Store:
    """What is wanted."""

    bytes: float
    d_in: int = 4096
    itemsize: int = 2
    part_gib: float = 1
    row_group_mib: float = 32
    workers: int = 8
    """Extractors, each a GPU with its own link to the bucket."""
    trainers: int = 1
    """Processes that read for training."""


@dataclass(frozen=True)
class World:
    """What is assumed."""

    tokens_per_second: float = 50_000
    """Of the model on one worker. An assumption: `sae-pipeline plan` measures yours."""
    train_rows_per_second: float = 100_000
    """Of one trainer: what its SAE takes. An assumption."""
    batch_rows: int = 4096
    context_rows: int = 512
    rho: float = 0.2
    """Correlation of two rows of a context. An assumption: `sae-pipeline plan` measures it."""
    latency: float = 0.1
    """Seconds to the first byte of a range. An assumption, as is what one stream carries."""
    stream_bytes: float = 85e6
    """Bytes per second of one stream."""
    page_seconds: float = 0.05
    """CPU seconds of a page of a listing: botocore parsing 1,000 names, measured."""
    index_seconds: float = 0.0025
    """CPU seconds to read an index: make bench ARGS=scale."""
    task_seconds: float = 0.05
    """Of the flow for one Prefect task, on a server on the same machine: 237 tasks took 15 to 90 ms each."""
    worker_hours_lost: float = 500
    """Mean hours between losses of a worker. An assumption; spot machines are lost more often."""
    request_failures: float = 1e-4
    """Share of requests that end in 5xx, a reset or a time-out and are tried again. An assumption."""
    part_failures: float = 1e-3
    """Share of attempts at a part that fail nevertheless, for whatever reason that passes. An assumption."""
    retries: int = 3
    """execution.retries: attempts at a task after the first."""
    put_dollars: float = 0.005
    """1,000 requests that write or list: S3 Standard, us-east-1, as published."""
    get_dollars: float = 0.0004
    """1,000 requests that read."""
    month_dollars: float = 0.023
    """A GB for a month; .021 above 500 TB. Traffic inside the region is free."""


def figures(store: Store, world: World) -> list[tuple[str, str]]:
    """What the store takes, line by line."""
    row_bytes = store.d_in * store.itemsize
    rows = store.bytes / (row_bytes + 12)
    part_rows = int(store.part_gib * GIB // row_bytes)
    group_rows = int(store.row_group_mib * MIB // row_bytes)
    per_part = math.ceil(part_rows / group_rows)
    n_parts = math.ceil(rows / part_rows)
    n_groups = n_parts * per_part
    groups = groups_of(n_parts)
    n_indexes = len(groups) if len(groups[0]) > 1 else 0
    # A task extracts a group; in a set of single parts a run of them, and every worker gets four runs or more.
    per_task = len(groups[0]) if n_indexes else min(MAX_UNITS, max(1, n_parts // (4 * store.workers)))
    n_tasks = math.ceil(n_parts / per_task)

    uploads = math.ceil(store.part_gib * GIB / UPLOAD_BYTES) + 2  # begin, pieces, end
    puts = n_parts * (uploads + 1) + n_indexes
    seconds = rows / world.tokens_per_second / store.workers
    lost = seconds / 3600 * store.workers / world.worker_hours_lost
    part_seconds = part_rows / world.tokens_per_second
    exhausted = n_tasks * _at_least(world.retries + 1, per_task * world.part_failures)

    pages = math.ceil((2 * n_parts + n_indexes) / 1000)
    records = n_indexes or n_parts
    group_bytes = group_rows * row_bytes
    train_rows = world.train_rows_per_second * store.trainers
    read_bytes = train_rows * row_bytes
    # A loader has several row groups in flight, and divides them so that all its streams are busy.
    piece_bytes = max(GROUPS_AT_ONCE * group_bytes / N_STREAMS, PIECE_BYTES)
    n_gets = n_groups * math.ceil(group_bytes / piece_bytes)
    # n streams carry n * s / (latency + s / r) bytes a second in ranges of s bytes.
    streams = world.train_rows_per_second * row_bytes * (world.latency / piece_bytes + 1 / world.stream_bytes)
    sizes = ShuffleConfig().sizes(RowGroups.of([[group_rows] * per_part]), row_bytes)
    variance = expected_variance(
        sizes,
        n_parts=n_parts,
        part_rows=part_rows,
        row_group_rows=group_rows,
        batch_rows=world.batch_rows,
        context_rows=world.context_rows,
        rho=world.rho,
    )
    month = store.bytes / 1e9 * (world.month_dollars if store.bytes < 5e14 else 0.021)
    return [
        ("vectors", f"{rows:.3g}"),
        ("parts, row groups", f"{n_parts:,} of {store.part_gib:g} GiB, {n_groups:.3g} of {store.row_group_mib:g} MiB"),
        ("storage a month", f"${month:,.0f}"),
        ("**extraction**", ""),
        ("workers, time", f"{store.workers}, {_duration(seconds)}"),
        ("a worker writes", f"{world.tokens_per_second * (row_bytes + 12) / 1e6:,.0f} MB/s"),
        ("requests that write", f"{puts:.3g}, ${puts / 1000 * world.put_dollars:,.2f}"),
        (
            "Prefect tasks",
            f"{n_tasks:,} of {_counted(per_task, 'part')}, {_duration(n_tasks * world.task_seconds)}",
        ),
        ("time of a task", _duration(part_seconds * per_task)),
        ("**failures**", ""),
        ("requests tried again", f"{(puts + n_gets) * world.request_failures:,.0f}"),
        ("workers lost, work lost", f"{lost:.2g}, {_duration(lost * part_seconds / 2)}"),
        ("tasks that use up their retries", f"{exhausted:.1g}"),
        ("**resume and snapshot**", ""),
        ("listing", f"{_counted(pages, 'page')}, {_duration(pages * (world.latency + world.page_seconds))}"),
        (
            "records or indexes read",
            f"{records:,}, {_duration(records * max(world.index_seconds, world.latency / 32))}",
        ),
        (
            "snapshot on disk, in memory",
            f"{n_groups * 16.8 / 1e6:,.0f} MB, {(n_groups * 36 + n_parts * 44) / 1e6:,.0f} MB",
        ),
        ("**training, one epoch**", ""),
        ("trainers, reading", f"{store.trainers}, {read_bytes / 1e9:.2f} GB/s, {_duration(rows / train_rows)}"),
        ("ranges in flight of each", f"{math.ceil(streams)}"),
        ("requests that read", f"{n_gets:.3g}, ${n_gets / 1000 * world.get_dollars:,.2f}"),
        ("variance of batch means over iid", f"{variance:.3f}"),
        ("row groups in memory, parts mixed", f"{sizes.window_row_groups}, {sizes.block_parts}"),
    ]


def _at_least(k: int, mean: float) -> float:
    """The probability of k or more events of so many on average (Poisson), without cancellation."""
    return sum(math.exp(-mean + i * math.log(mean) - math.lgamma(i + 1)) for i in range(k, k + 60))


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n > 1)}"


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


SMALL = Store(bytes=1e13)
LARGE = Store(bytes=1e16, part_gib=10, row_group_mib=256, workers=256, trainers=32)


def table(stores: dict[str, Store], world: World) -> str:
    """One column per store, in Markdown."""
    columns = [figures(store, world) for store in stores.values()]
    lines = [f"| | {' | '.join(stores)} |", f"|---|{'---|' * len(stores)}"]
    lines += [f"| {rows[0][0]} | {' | '.join(value for _, value in rows)} |" for rows in zip(*columns, strict=True)]
    return "\n".join(lines)


@dataclass(frozen=True)
class Training:
    """SAEs of one kind, and GPUs for them: nodes of eight with 80 GiB each."""

    d_in: int
    d_sae: int
    batch_rows: int
    n_gpus: int
    n_saes: int = 1
    k: int = 64


TRAININGS = (
    Training(4096, 1 << 17, 1 << 15, 1),
    Training(4096, 1 << 17, 1 << 15, 8),
    Training(4096, 1 << 17, 1 << 15, 8, n_saes=8),
    Training(4096, 1 << 17, 1 << 15, 64),
    Training(4096, 1 << 17, 1 << 15, 64, n_saes=8),
    Training(4096, 1 << 17, 1 << 18, 64),
    Training(4096, 1 << 20, 1 << 15, 8),
    Training(4096, 1 << 20, 1 << 15, 64),
    Training(16384, 1 << 20, 1 << 15, 64),
    Training(4096, 1 << 24, 1 << 15, 64),
    Training(8192, 1 << 24, 1 << 15, 256),
    Training(8192, 1 << 24, 1 << 15, 1024),
    Training(16384, 1 << 24, 1 << 15, 256),
    Training(16384, 1 << 24, 1 << 15, 1024),
)


def mesh_table(trainings: tuple[Training, ...]) -> str:
    """The layout that `sae-pipeline plan --gpus` chooses for each, and the next best, in Markdown."""
    columns = ("SAEs: d_in, d_sae, rows a step", "GPUs", "layout", "memory", "sums, gradients", "step, told", "rows/s")
    lines = ["| " + " | ".join((*columns, "efficiency", "next best |")), f"|{'---|' * 9}"]
    lines += [f"| {' | '.join(_mesh_row(each))} |" for each in trainings]
    return "\n".join(lines)


def _mesh_row(wanted: Training) -> tuple[str, ...]:
    config = TrainConfig(
        sae=TopKConfig(d_sae=wanted.d_sae, k=wanted.k), batch_rows=wanted.batch_rows, selection="bfloat16"
    )
    saes = [
        Trained(f"saes.{seed}", TrainConfig.model_validate(config.model_dump() | {"seed": seed}), wanted.d_in)
        for seed in range(wanted.n_saes)
    ]
    cluster = Cluster(n_gpus=wanted.n_gpus, gpus_per_node=min(8, wanted.n_gpus), gpu_bytes=80 * GIB)
    layouts = plan_layouts(saes, cluster, DEFAULT_RATES)
    chosen = choose(layouts, saes, cluster)
    others = [each for each in layouts if each.rank_bytes <= cluster.usable_bytes and each != chosen]
    sums, gradients = (readable(chosen.received.get(method, 0)) for method in ("sum_latents", "sum_rows"))
    return (
        f"{_counted(wanted.n_saes, 'SAE')}: {wanted.d_in:,}, {_thousands(wanted.d_sae)}, "
        f"{_thousands(wanted.batch_rows)}",
        f"{wanted.n_gpus:,}",
        chosen.name,
        readable(chosen.rank_bytes),
        f"{sums}, {gradients}",
        f"{chosen.step_seconds * 1e3:.3g}, {chosen.told_seconds * 1e3:.2g} ms",
        f"{chosen.rows_per_second:.2g}",
        f"{chosen.efficiency:.0%}",
        f"{others[0].name}: {others[0].efficiency:.0%}" if others else "",
    )


def _thousands(n: int) -> str:
    return f"{n >> 20} M" if n >= 1 << 20 else f"{n >> 10} k"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="What a store of a given size takes.")
    for kind in (Store, World):
        for field in fields(kind):
            name = f"--{field.name.replace('_', '-')}"
            parser.add_argument(name, type=float if field.type in (float, "float") else int, default=None)
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    world = World(**{field.name: given[field.name] for field in fields(World) if field.name in given})
    if "bytes" in given:
        store = Store(**{field.name: given[field.name] for field in fields(Store) if field.name in given})
        print(table({f"{store.bytes:g} bytes": store}, world))
    else:
        print(table({"10 TB": SMALL, "10 PB": LARGE}, world))
        print(f"\n{mesh_table(TRAININGS)}")


if __name__ == "__main__":
    main()
