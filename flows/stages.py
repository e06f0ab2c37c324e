"""The stages by name: which flow runs them, what a refresh of each computes again, who can restore an artefact."""

from typing import Literal, get_args

Stage = Literal["subject", "tokens", "activations", "sae", "evaluation", "statistics", "report"]
STAGES: tuple[Stage, ...] = get_args(Stage)

FLOW_STAGES: dict[str, tuple[Stage, ...]] = {
    "extract": ("subject", "tokens", "activations"),
    "train": ("sae",),
    "report": ("evaluation", "statistics", "report"),
}

FLOW_FOLDERS: dict[str, tuple[str, ...]] = {
    "extract": ("segments", "tokenizers", "subjects", "tokens", "parts", "activations"),
    "train": ("saes",),
    "report": ("evaluations", "statistics", "reports"),
}
"""The folders of the artefacts that each flow makes, and so can make again."""

FOLLOWS: dict[Stage, tuple[Stage, ...]] = {
    "subject": STAGES,
    "tokens": STAGES,
    "activations": ("activations", "sae", "evaluation", "statistics", "report"),
    "sae": ("sae", "evaluation", "statistics", "report"),
    "evaluation": ("evaluation", "report"),
    "statistics": ("statistics", "report"),
    "report": ("report",),
}
"""A stage and what is built on it."""
