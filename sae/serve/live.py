"""What can be computed beside a report: its SAEs, each with the model and the hook point it was trained on."""

import logging
from dataclasses import dataclass
from typing import Any

from sae.architectures.base import SAE
from sae.errors import InputError, PipelineError
from sae.report.display import plain
from sae.report.inputs import unique_keys
from sae.store.artefacts.record import Record
from sae.store.artefacts.records import local_files, require_record
from sae.store.storage.filesystem import Storage
from sae.store.text.left_out import LeftOut, read_left_out
from sae.subject.hooks import hook_width
from sae.subject.load import Subject, load_subject
from sae.weights import load_sae

logger = logging.getLogger(__name__)

MAX_TEXT_TOKENS = 1024
"""Bounds memory and time of one request; the corpus's context length is the limit where it is shorter."""
NO_MODEL = "its activations were given, so there is no model to run"


@dataclass(frozen=True, eq=False)
class LiveSAE:
    """One SAE, ready to encode text and to steer. float32 on the CPU."""

    sae: SAE
    subject: Subject
    model_name: str
    hook_point: str
    separator: int | None
    """The token at the start of every document of the corpus, and so of every text here."""
    left_out: LeftOut
    """Activations that the SAE was not trained on: they are neither encoded nor steered."""
    max_tokens: int
    """Of a text, the separator included, and of what is generated from it."""


@dataclass(frozen=True)
class Live:
    """The SAEs of a report by their key in the page's addresses, or why one cannot be computed with."""

    saes: dict[str, LiveSAE]
    why_not: dict[str, str]


def load_live(storage: Storage, report: Record) -> Live:
    """Load every SAE of a report and what it was trained on. What cannot be loaded is said, and never an error."""
    saes: dict[str, LiveSAE] = {}
    why_not: dict[str, str] = {}
    subjects: dict[str, Subject] = {}
    entries = report.spec["saes"]
    for key, entry in zip(unique_keys([entry["name"] for entry in entries]), entries, strict=True):
        try:
            spec = require_record(storage, entry["statistics"]).spec
            if spec.get("subject") is None:
                why_not[key] = NO_MODEL
            else:
                saes[key] = _load(storage, entry["sae"], spec, subjects)
        except PipelineError as err:
            logger.warning("no live part for %s: %s", key, err)
            why_not[key] = plain(str(err))
    return Live(saes, why_not)


def _load(storage: Storage, sae_ref: str, spec: dict[str, Any], subjects: dict[str, Subject]) -> LiveSAE:
    """Raises: StoreError, InputError or TransientError when something is missing, damaged, or does not fit."""
    with local_files(storage, require_record(storage, sae_ref)) as folder:
        sae = load_sae(folder).float()
    ref = str(spec["subject"])
    if ref not in subjects:
        subjects[ref] = load_subject(storage, ref)
        subjects[ref].model.float()
    subject, hook_point = subjects[ref], str(spec["hook_point"])
    if (width := hook_width(subject.model, hook_point)) != sae.d_in:
        raise InputError(f"{sae_ref}: takes activations of width {sae.d_in}, {hook_point} yields {width}")
    tokens = require_record(storage, spec["tokens"][0])
    snapshot = require_record(storage, spec["snapshots"]["train"])
    return LiveSAE(
        sae=sae,
        subject=subject,
        model_name=_model_name(require_record(storage, ref)),
        hook_point=hook_point,
        separator=tokens.metrics.get("separator_id"),
        left_out=read_left_out(storage, snapshot.spec["parts"][0]),
        max_tokens=min(int(tokens.spec["context_tokens"]), MAX_TEXT_TOKENS),
    )


def _model_name(record: Record) -> str:
    config = record.spec["config"]
    if config["kind"] == "huggingface":
        return plain(str(config["name"]))
    return f"embedded {config['n_layers']}-layer model"
