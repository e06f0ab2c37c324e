"""`sae-pipeline store`: what a root holds, whether it is whole, what can go, mending it, and copies for other tools."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.store_address import open_root, parse_address, read_targets, records_of
from sae.errors import ConfigError

if TYPE_CHECKING:
    from sae.store.snapshots.snapshot import Snapshot
    from sae.store.storage.filesystem import Storage
    from sae.store.upkeep.info import ArtefactInfo, StoreInfo
    from sae.store.upkeep.verify import Problem, Target

DEFAULT_ROOT = "runs"
FAILURE = 1


def add_store_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `store` and its sub-commands to the command line."""
    store = commands.add_parser("store", help="the stored artefacts: info, verify, gc, repair, export")
    kinds = store.add_subparsers(dest="store_command", required=True, metavar="COMMAND")

    def add(name: str, text: str, more: str) -> argparse.ArgumentParser:
        command = kinds.add_parser(name, help=text, description=f"{text}. {more}")
        command.add_argument("--root", metavar="URI", help=f"where artefacts are kept (default: {DEFAULT_ROOT})")
        return command

    info = add(
        "info",
        "what a root holds: sizes, parts, what is made from what",
        "Listings and the artefacts' own records are read, no part and no file.",
    )
    info.add_argument(
        "ref", nargs="?", metavar="REF", help="one artefact, stage/fingerprint, with its lineage both ways"
    )
    info.add_argument("--json", action="store_true", help="print one JSON document")

    verify = add(
        "verify",
        "read every byte and compare it with the records",
        "Prints a line for every problem; the exit code is 1 when there is one.",
    )
    verify.add_argument("refs", nargs="*", metavar="REF", help="artefacts; a snapshot with all its parts")
    verify.add_argument("--all", action="store_true", help="everything in the root")

    gc = add(
        "gc",
        "list what no record names and nobody writes; delete it with --delete",
        "That is: files without a record, checkpoints of finished artefacts, staging folders of dead processes, torn "
        "S3 uploads. What a running writer has put and not yet recorded stays his.",
    )
    gc.add_argument("--delete", action="store_true", help="delete what would else be listed")
    gc.add_argument(
        "--grace",
        type=_hours,
        default=24.0,
        metavar="HOURS",
        help="keep what has changed in the last hours, by the storage's own clock (default: 24)",
    )
    gc.add_argument("--damaged-records", action="store_true", help="also damaged records that were set aside")

    repair = add(
        "repair",
        "verify what a config made, and compute again what is damaged",
        "The recorded bytes come back under their names, or nothing changes. The config's stages that hold damage are "
        "run, so what else they lack is made as well.",
    )
    repair.add_argument("config", metavar="RECIPE|FILE", help="the config it was made with")
    repair.add_argument("refs", nargs="*", metavar="REF", help="only these artefacts or parts")
    repair.add_argument(
        "--set", action="append", default=[], dest="settings", metavar="PATH=VALUE", help="as in `sae-pipeline run`"
    )
    repair.add_argument("--verbose", action="store_true", help="show Prefect's and third-party logs")

    export = add(
        "export",
        "activations as one file for other tools",
        "Rows come in the store's order; inside a part they are permuted. A file that is there is whole.",
    )
    export.add_argument("source", metavar="REF|RECIPE|FILE", help="a snapshot, activations/fingerprint, or a config")
    export.add_argument("destination", type=Path, metavar="DEST", help="a local file")
    export.add_argument("--format", choices=("npy", "safetensors", "parquet"), required=True)
    export.add_argument("--hook-point", metavar="NAME", help="of a config's; may be left out where there is one")
    export.add_argument("--split", choices=("train", "heldout"), default="train", help="of a config (default: train)")
    export.add_argument("--rows", type=_count, metavar="N", help="the first N rows of the store (default: all)")
    export.add_argument("--dtype", choices=("float16", "float32"), help="default: as stored; Parquet: float32")
    export.add_argument("--force", action="store_true", help="replace DEST")


def run_store(options: argparse.Namespace) -> int:
    """Run a sub-command. Returns: the exit code: 0, or 1 when what was looked for is wrong.

    Raises: ConfigError for what does not exist or cannot be meant; StoreError, TransientError as the library.
    """
    command = {"info": _info, "verify": _verify, "gc": _gc, "repair": _repair, "export": _export}
    return command[options.store_command](options)


def _info(options: argparse.Namespace) -> int:
    from flows.store_tables import artefact_lines, info_lines
    from sae.store.upkeep.info import read_info
    from tasks.progress import show_progress

    root, targets = read_targets(options.root, [options.ref] if options.ref else [])
    storage = open_root(root or DEFAULT_ROOT)
    with show_progress("listing") as progress:
        info = read_info(storage, progress)
    if not targets:
        print(json.dumps(info.model_dump(mode="json")) if options.json else "\n".join(info_lines(info)))
        return 0
    artefact = _find(info, targets[0].ref)
    if options.json:
        print(json.dumps(_as_json(storage, info, artefact)))
    else:
        print("\n".join(artefact_lines(storage, info, artefact)))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from sae.store.upkeep.verify import all_targets

    if bool(options.refs) == options.all:
        raise ConfigError("store verify: name artefacts, or say --all to read everything in the root")
    root, named = read_targets(options.root, options.refs)
    storage = open_root(root or DEFAULT_ROOT)
    targets = all_targets(storage) if options.all else records_of(storage, named)
    if not _print_problems(storage, targets):
        return 0
    print("`sae-pipeline store repair CONFIG`, with the config it was made with, computes it again", file=sys.stderr)
    return FAILURE


def _gc(options: argparse.Namespace) -> int:
    from sae.memory import readable
    from sae.store.upkeep.collect import delete_all, find_garbage
    from tasks.progress import show_progress

    storage = open_root(options.root or DEFAULT_ROOT)
    n_gone = n_kept = n_bytes = 0
    with show_progress("gc") as progress:
        found = find_garbage(storage, options.grace * 3600, damaged_records=options.damaged_records, progress=progress)
        deleted = delete_all(storage, found) if options.delete else ((each, True) for each in found)
        for each, is_gone in deleted:
            size = "size unknown" if each.upload else f"{each.n_files} files, {readable(each.n_bytes)}"
            line = f"{each.kind}: {storage.uri(each.path)} ({size}, untouched for {each.age_seconds / 3600:.1f} h)"
            if is_gone:
                n_gone, n_bytes = n_gone + 1, n_bytes + each.n_bytes
                print(f"{'deleted ' if options.delete else ''}{line}")
            else:
                n_kept += 1
                print(f"kept, somebody is writing it: {line}")
    if not options.delete and n_gone:
        print(f"{n_gone} things, {readable(n_bytes)}; nothing was deleted. `store gc --delete` deletes them.")
    elif n_gone or n_kept:
        print(f"deleted {n_gone} things, {readable(n_bytes)}" + (f"; kept {n_kept}" if n_kept else ""))
    else:
        print(f"nothing to delete in {storage.root}")
    return 0


def _repair(options: argparse.Namespace) -> int:
    from flows.settings import load_config
    from flows.store_repair import plan_targets, repair
    from sae.plan import make_plan
    from sae.store.upkeep.verify import Target

    root, named = read_targets(options.root, options.refs)
    config = load_config(options.config, options.settings, root)
    storage = open_root(config.execution.root)
    plan = make_plan(config)
    planned = {spec.ref for spec in plan.specs()}
    for target in named:
        if target.ref not in planned:
            raise ConfigError(f"{target}: {options.config} does not make it. Name the config that it was made with.")
    targets = records_of(storage, named) if named else plan_targets(storage, plan)
    targets = [target for target in targets if target.ref in planned]
    if not targets:
        raise ConfigError(f"root {storage.root!r} has no artefact of {options.config}. Check --root and the config.")
    problems = _print_problems(storage, targets)
    if not problems:
        return 0
    damaged = [Target(*key) for key in dict.fromkeys((each.target.ref, each.target.part) for each in problems)]
    print(f"computing {', '.join(map(str, damaged))} again", file=sys.stderr)
    repair(config, damaged)
    left = _print_problems(storage, damaged)
    print(f"repaired {len(damaged) - len({each.target for each in left})} of {len(damaged)}")
    return FAILURE if left else 0


def _export(options: argparse.Namespace) -> int:
    from sae.store.snapshots.snapshot import read_snapshot
    from sae.store.upkeep.export import export_snapshot
    from tasks.progress import show_progress

    if "://" in str(options.destination) or ":/" in str(options.destination):
        raise ConfigError(f"{options.destination}: an export is a local file")
    storage, ref = _snapshot_of(options)
    snapshot: Snapshot = read_snapshot(storage, ref)
    with show_progress("export") as progress:
        n_rows = export_snapshot(
            storage,
            snapshot,
            options.destination.absolute(),
            options.format,
            dtype=options.dtype,
            n_rows=options.rows,
            force=options.force,
            progress=progress,
        )
    print(f"{options.destination}: {n_rows:,} x {snapshot.d_in} of {storage.uri(ref)}")
    return 0


def _snapshot_of(options: argparse.Namespace) -> "tuple[Storage, str]":
    """The snapshot that `export` names. Raises: ConfigError when it names none that is there."""
    from sae.store.artefacts.records import read_record

    if parse_address(options.source) is not None:
        if options.hook_point:
            raise ConfigError(f"{options.source}: a snapshot has one hook point; --hook-point is for configs")
        root, (target,) = read_targets(options.root, [options.source])
        ref, storage = target.ref, open_root(root or DEFAULT_ROOT)
    else:
        from flows.settings import load_config
        from sae.plan import make_plan

        config = load_config(options.source, [], options.root)
        names = config.hook_points
        if options.hook_point not in (None, *names) or (options.hook_point is None and len(names) > 1):
            raise ConfigError(f"--hook-point: say which of {', '.join(names)}")
        place = (options.hook_point or names[0], options.split)
        snapshots = make_plan(config).snapshots
        if place not in snapshots:
            raise ConfigError(f"--split {options.split}: {options.source} holds nothing out")
        ref, storage = snapshots[place].ref, open_root(config.execution.root)
    if not ref.startswith("activations/"):
        raise ConfigError(f"{ref}: only snapshots of activations can be exported (activations/fingerprint)")
    if read_record(storage, ref) is None:
        raise ConfigError(f"{storage.uri(ref)}: not there, or not finished. `sae-pipeline store info` lists what is.")
    return storage, ref


def _print_problems(storage: "Storage", targets: "list[Target]") -> "list[Problem]":
    """Verify, print a line for every problem and a last one for all. Returns: the problems."""
    from sae.memory import readable
    from sae.store.upkeep.verify import verify_targets
    from tasks.progress import show_progress

    problems: list[Problem] = []
    n_files = n_bytes = 0
    with show_progress("verify") as progress:
        for checked in verify_targets(storage, targets, progress=progress):
            n_files, n_bytes = n_files + checked.n_files, n_bytes + checked.n_bytes
            problems += checked.problems
            for problem in checked.problems:
                print(" ".join(f"{problem.target}: {problem.text}".split()), flush=True)
    found = f"{len(problems)} problems" if problems else "all as recorded"
    print(f"{len(targets)} records, {n_files} files, {readable(n_bytes)}: {found}")
    return problems


def _find(info: "StoreInfo", ref: str) -> "ArtefactInfo":
    for artefact in info.artefacts:
        if artefact.ref == ref:
            return artefact
    raise ConfigError(f"{ref}: not in {info.root}. `sae-pipeline store info` lists what is.")


def _as_json(storage: "Storage", info: "StoreInfo", artefact: "ArtefactInfo") -> dict[str, Any]:
    from flows.lineage import ancestors
    from sae.store.artefacts.records import read_record
    from sae.store.upkeep.info import iter_descendants

    record = read_record(storage, artefact.ref) if artefact.created else None
    return artefact.model_dump(mode="json") | {
        "record": record.model_dump(mode="json") if record else None,
        "ancestors": [ref for _, _, ref, _ in ancestors(storage, record)] if record else [],
        "descendants": [ref for _, ref in iter_descendants(info, artefact.ref)],
    }


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = -1.0
    if not 0 <= hours < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of hours (0 or more)")
    return hours


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of rows (1 or more)")
    return int(text)
