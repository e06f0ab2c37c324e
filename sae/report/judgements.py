"""Verdicts that people gave in judge mode: read the exported files, print counts with intervals."""

import json
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from sae.config import FrozenConfig
from sae.errors import InputError
from sae.report.display import plain
from sae.report.numbers import interval, percent, wilson

Verdict = Literal["clear", "partly", "unclear"]
VERDICTS: tuple[Verdict, ...] = ("clear", "partly", "unclear")


class Judgement(FrozenConfig):
    """One verdict."""

    latent: int = Field(ge=0)
    verdict: Verdict


class Judgements(FrozenConfig):
    """A file that judge mode exported."""

    format: Literal[1]
    report: str
    title: str
    sae: str
    units: str
    """What was judged: latents of the SAE, or a control such as neurons."""
    n: int
    """How many were drawn; not all need to be judged."""
    seed: int
    verdicts: tuple[Judgement, ...]

    def share(self, verdict: Verdict) -> tuple[int, tuple[float, float]]:
        """How often a verdict was given, and the 95 % interval of its share."""
        found = sum(judgement.verdict == verdict for judgement in self.verdicts)
        return found, wilson(found, len(self.verdicts))


def read_judgements(path: Path) -> Judgements:
    """Read an exported file. Raises: InputError when it is none."""
    try:
        judgements = Judgements.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as err:
        raise InputError(f"{path}: cannot be read ({err.strerror})") from err
    except (ValueError, ValidationError) as err:
        problem = str(err).splitlines()[0] if not isinstance(err, ValidationError) else err.errors()[0]["msg"]
        raise InputError(f"{path}: no file that judge mode of a report exported: {problem}") from err
    latents = [judgement.latent for judgement in judgements.verdicts]
    if len(set(latents)) != len(latents):
        raise InputError(f"{path}: holds two verdicts on one latent")
    return judgements


def judgement_table(files: list[Judgements]) -> list[str]:
    """Lines of a table: per file, every verdict's count, share and 95 % interval."""
    rows = [["report", "of", "judged", *VERDICTS]]
    for file in files:
        judged = len(file.verdicts)
        cells = [plain(file.title, 40), f"{plain(file.sae, 40)}, {plain(file.units, 20)}", f"{judged} of {file.n}"]
        for verdict in VERDICTS:
            found, bounds = file.share(verdict)
            cells.append(f"{found} ({percent(found / judged)}, {interval(bounds)})" if judged else "0")
        rows.append(cells)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
