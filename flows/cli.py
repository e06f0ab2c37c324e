"""`sae-pipeline`: parse, validate, call a flow, print."""

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Nothing here may import torch: its threads read their settings from the environment when it is loaded.
from flows.plan import add_plan_command, run_plan
from flows.stages import FLOW_STAGES, STAGES
from flows.store import add_store_commands, run_store
from sae.errors import ConfigError, InputError, PipelineError
from tasks.process import WorkerCrash

if TYPE_CHECKING:
    from sae.plan import PipelineConfig, Plan

logger = logging.getLogger("flows.cli")

FLOWS = {
    "run": "all stages: extract, train, report",
    "extract": "corpus and model to activations",
    "train": "activations to SAEs",
    "report": "SAEs to evaluation, statistics and report",
}
USER_ERROR, FAILURE, RETRY = 2, 1, 75
"""75 is EX_TEMPFAIL of sysexits.h: what failed may pass, or the process was asked to stop; the same command goes on."""


class Terminated(KeyboardInterrupt):
    """SIGTERM."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns: 0; 1 when work failed, stored data is damaged or a plan does not fit; 2 when the configuration or an input
        is wrong; 75 when the same command may succeed later (a network that fails, SIGTERM); 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    _set_environment(verbose=getattr(options, "verbose", False))
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        if options.command == "recipes":
            _print_recipes()
        elif options.command == "show":
            from flows.show import show

            print(show(options.uri, check=options.verify))
        elif options.command == "plan":
            return run_plan(options)
        elif options.command == "store":
            return run_store(options)
        elif options.command == "page":
            from flows.page import page

            print(page(options.uri, options.out, options.latents, options.sae))
        elif options.command == "serve":
            from flows.serve import serve

            serve(options.uri, options.host, options.port)
        elif getattr(options, "judgements", None):
            _print_judgements(options.judgements)
        else:
            _run(options)
    except WorkerCrash as err:
        # The trace of the worker says where; the rest of this one is Prefect's.
        print(f"sae-pipeline: {err}", file=sys.stderr)
        return FAILURE
    except PipelineError as err:
        print(f"sae-pipeline: {' '.join(str(err).splitlines())}", file=sys.stderr)  # file names may hold newlines
        if isinstance(err, ConfigError | InputError):
            return USER_ERROR
        return RETRY if err.retryable else FAILURE
    except KeyboardInterrupt as err:
        print("sae-pipeline: stopped; the same command goes on where it stopped", file=sys.stderr)
        return RETRY if isinstance(err, Terminated) else 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sae-pipeline", description="From a language model's activations to interpretable features."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in FLOWS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "config", nargs="?", default="default", metavar="RECIPE|FILE", help="a recipe, or a .toml or .json file"
        )
        command.add_argument("--root", metavar="URI", help="where artefacts are kept (default: runs)")
        command.add_argument(
            "--set",
            action="append",
            default=[],
            dest="settings",
            metavar="PATH=VALUE",
            help="change one setting, e.g. saes.0.sae.k=32; may be repeated",
        )
        command.add_argument("--only", choices=STAGES, help="run this stage alone, on what the store has")
        command.add_argument("--refresh", choices=STAGES, help="compute this stage and what follows again")
        command.add_argument("--json", action="store_true", help="end stdout with one line of JSON")
        if name == "report":
            command.add_argument(
                "--judgements",
                action="append",
                metavar="FILE",
                help="only print the table of verdicts that a report's judge mode exported; may be repeated",
            )
        command.add_argument("--verbose", action="store_true", help="show Prefect's and third-party logs")
    commands.add_parser("recipes", help="the named configurations")
    show = commands.add_parser("show", help="what an artefact is, from what, when; sizes and metrics")
    show.add_argument("uri", metavar="URI")
    show.add_argument("--verify", action="store_true", help="compare every file with its recorded hash")
    add_plan_command(commands)
    add_store_commands(commands)
    page = commands.add_parser("page", help="a few latents of a report as one HTML file, to be mailed")
    page.add_argument("uri", metavar="URI", help="a report's folder or index.html, or a root: its newest report")
    page.add_argument("out", metavar="OUT.html", help="the file to write")
    page.add_argument("--latents", metavar="ID,ID,...", help="at most 200 (default: 30 random live ones of every SAE)")
    page.add_argument("--sae", metavar="NAME", help="whose latents (default: the first SAE's)")
    serve = commands.add_parser("serve", help="a report as a web site, with its model: encode text, steer latents")
    serve.add_argument("uri", metavar="URI", help="a report's folder or index.html, or a root: its newest report")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    serve.add_argument("--port", type=int, default=8765, help="0: any free one (default: 8765)")
    return parser


def _print_recipes() -> None:
    from flows.recipes import RECIPES

    for name, recipe in RECIPES.items():
        print(f"{name:<14} {(recipe.__doc__ or '').splitlines()[0]}")


def _print_judgements(files: Sequence[str]) -> None:
    from sae.report.judgements import judgement_table, read_judgements

    print("\n".join(judgement_table([read_judgements(Path(file)) for file in files])))


def _run(options: argparse.Namespace) -> None:
    from flows.server import call_flow
    from flows.settings import load_config
    from sae.plan import make_plan
    from sae.preflight import check_devices, check_plan
    from sae.store.storage.filesystem import Storage
    from tasks.progress import show_progress
    from tasks.ray_cluster import check_runner

    for option in ("only", "refresh"):
        stage, own = getattr(options, option), FLOW_STAGES.get(options.command, STAGES)
        if stage is not None and stage not in own:
            raise ConfigError(f"--{option} {stage}: the {options.command} flow has the stages {', '.join(own)}")
    config = load_config(options.config, options.settings, options.root)
    started = time.perf_counter()
    # Everything that can be wrong with the input is found here, before a server starts.
    check_devices(config.execution)
    Storage(config.execution.root).check_writable()
    with show_progress("corpus") as progress:
        plan = make_plan(config, progress)
    check_plan(plan)
    check_runner(config.execution)
    outcomes = call_flow(options.command, config, only=options.only, refresh=options.refresh)
    _print_summary(config, plan, outcomes, time.perf_counter() - started, as_json=options.json)


def _terminate(number: int, frame: Any) -> None:
    raise Terminated


def _print_summary(
    config: "PipelineConfig", plan: "Plan", outcomes: list[dict[str, Any]], seconds: float, *, as_json: bool
) -> None:
    from flows.headline import headline_lines, headlines
    from sae.store.artefacts.records import read_record
    from sae.store.storage.filesystem import Storage

    storage = Storage(config.execution.root)
    metrics = headlines(storage, plan)
    report = read_record(storage, plan.report.ref) if plan.report else None
    report_uri = storage.uri(report.path("index.html")) if report else None
    computed = sum(outcome["outcome"] == "computed" for outcome in outcomes)
    cached = len(outcomes) - computed
    print(
        f"{computed} task{'s' * (computed != 1)} computed, {cached} found in the store, {seconds:.0f} s",
        file=sys.stderr,
    )
    for line in headline_lines(metrics):
        print(line, file=sys.stderr)
    if as_json:
        refs = dict.fromkeys(outcome["ref"] for outcome in outcomes)
        result = {
            "artefacts": {ref: storage.uri(ref) for ref in refs},
            "metrics": metrics,
            "tasks": outcomes,
            "report": report_uri,
            "seconds": round(seconds, 3),
        }
        print(json.dumps(result))
    elif report_uri:
        print(f"report: {report_uri}")


def _set_environment(verbose: bool) -> None:
    """Defaults for Prefect and the libraries below it; what the user has set stays."""
    defaults = {
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    if not verbose:
        defaults |= {
            "PREFECT_LOGGING_LEVEL": "CRITICAL",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for name in ("flows", "tasks", "sae"):
        logging.getLogger(name).setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
