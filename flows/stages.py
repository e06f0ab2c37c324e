"""The stages by name: which flow runs them, what a refresh of each computes again, who can restore an artefact."""

from typing import Literal, get_args

Stage = Literal["subject", "tokens", "activations", "sae", "evaluation", "statistics", "labels", "report"]
STAGES: tuple[Stage, ...] = get_args(Stage)

FLOW_STAGES: dict[str, tuple[Stage, ...]] = {
    "extract": ("subject", "tokens", "activations"),
    "train": ("sae",),
    "report": ("evaluation", "statistics", "labels", "report"),
}

FLOW_FOLDERS: dict[str, tuple[str, ...]] = {
    "extract": ("segments", "tokenizers", "subjects", "tokens", "parts", "activations"),
    "train": ("saes",),
    "report": ("evaluations", "statistics", "questions", "labels", "reports"),
}
"""The folders of the artefacts that each flow makes, and so can make again."""

FOLDER_STAGES: dict[str, Stage] = {
    "segments": "tokens",
    "tokenizers": "subject",
    "subjects": "subject",
    "tokens": "tokens",
    "parts": "activations",
    "activations": "activations",
    "saes": "sae",
    "evaluations": "evaluation",
    "statistics": "statistics",
    "questions": "labels",
    "labels": "labels",
    "reports": "report",
}
"""Which stage's tasks make the artefacts of a folder."""

_COMPUTED: tuple[Stage, ...] = tuple(stage for stage in STAGES if stage != "labels")

FOLLOWS: dict[Stage, tuple[Stage, ...]] = {
    "subject": _COMPUTED,
    "tokens": _COMPUTED,
    "activations": ("activations", "sae", "evaluation", "statistics", "report"),
    "sae": ("sae", "evaluation", "statistics", "report"),
    "evaluation": ("evaluation", "report"),
    "statistics": ("statistics", "report"),
    "labels": ("labels", "report"),
    "report": ("report",),
}
"""A stage and what is built on it. Labels are built on statistics, but a model is asked again only when that is what
was asked for: it wants to be paid, and may answer otherwise."""

CONTROL = "untrained control: "
"""Before what a run tells of the control's artefacts."""
