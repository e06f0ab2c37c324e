"""Our recipe re-tuned: held-out FVU and dead latents over its settings, widths and budgets.

python -m tests.benchmarks.recipes [--tokens N,...] [--sets ...] [--d-sae N,...] [--grid FIELD=VALUE,...] [--seeds 3]
[--rows FOLDER] [--results FILE]

Fields are those of TrainConfig, and `sae.` those of TopKConfig; `lr` is that of 2,048 latents, other widths get theirs
by the default's rule. What was measured is kept in FILE, a line each, and not measured again.
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

from tests.benchmarks.peer_quality import spread
from tests.benchmarks.quality import SETS, Kept, load_set, qualities_of_ours


def _ints(text: str) -> list[int]:
    return [int(value) for value in text.split(",")]


def _field(text: str) -> tuple[str, list[Any]]:
    name, _, values = text.partition("=")
    return name, [json.loads(value) for value in values.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=_ints, default=[524_288])
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--d-sae", type=_ints, default=[2048])
    parser.add_argument("--grid", type=_field, action="append", default=[], metavar="FIELD=VALUE,...")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=Path, default=Path(".bench/sets"))
    parser.add_argument("--results", type=Path, default=Path(".bench/quality.jsonl"))
    options = parser.parse_args()
    kept = Kept(options.results)
    fields = [name for name, _ in options.grid]
    for n_tokens, name in itertools.product(options.tokens, options.sets.split(",")):
        data = load_set(name, n_tokens, options.rows)
        print(f"\n{name}, {n_tokens:,} tokens", flush=True)
        for d_sae, *values in itertools.product(options.d_sae, *[values for _, values in options.grid]):
            settings = dict(zip(fields, values, strict=True))
            line = " ".join([f"  {d_sae:,} latents", *(f"{field}={value:g}" for field, value in settings.items())])
            if "lr" in settings:
                settings["lr"] *= (2048 / d_sae) ** 0.5
            qualities = list(qualities_of_ours(data, n_tokens, d_sae, options.seeds, settings, kept))
            dead_share = statistics.mean(quality.dead for quality in qualities)
            print(f"{line:<70} {spread(qualities)}  dead {dead_share:.1%}", end="")
            recovered = [quality.recovered for quality in qualities if quality.recovered is not None]
            print(f"  recovered {statistics.mean(recovered):.1%}" if recovered else "", flush=True)


if __name__ == "__main__":
    main()
