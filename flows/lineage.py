"""Where an artefact comes from, up to corpus, model and code version."""

from dataclasses import replace
from typing import Any

from sae.plan import Place, Plan
from sae.store.artefacts.records import Record, read_record
from sae.store.storage.filesystem import Storage

TITLES = {
    "segments": "corpus segment",
    "tokenizers": "tokenizer",
    "tokens": "tokens",
    "subjects": "subject model",
    "parts": "activation parts",
    "activations": "activations",
    "saes": "SAE",
    "evaluations": "evaluation",
    "statistics": "feature statistics",
    "questions": "questions about latents",
    "labels": "labels by a model",
    "reports": "report",
}


MAIN_STAGES = ("segments", "tokens", "subjects", "activations", "saes")
"""What "What ran" lists at the top of a report; the lineage below it lists everything."""


def lineage_of(storage: Storage, plan: Plan) -> list[dict[str, Any]]:
    """What the report says about how it was made: one entry per artefact, inputs first.

    Times, machines and commits are left out: the same inputs give the same report.
    """
    own = {spec.ref for spec in replace(plan, control=None).specs()}
    places = {spec.ref: place for each in (plan, plan.control) if each for place, spec in each.snapshots.items()}
    entries: dict[str, dict[str, Any]] = {}
    for spec in plan.specs():
        record = read_record(storage, spec.ref)
        if record is None or spec.stage == "reports":
            continue
        facts = {key: value for key, value in record.metrics.items() if _is_plain(value)}
        entries.setdefault(
            spec.ref,
            {
                "role": TITLES[spec.stage] if spec.ref in own else f"control: {TITLES[spec.stage]}",
                "ref": spec.ref,
                "title": _snapshot_title(record, places[spec.ref]) if spec.ref in places else describe(record),
                "facts": facts | {"code_version": record.code_version},
                "main": spec.ref in own and spec.stage in MAIN_STAGES,
            },
        )
    return list(entries.values())


def _snapshot_title(record: Record, place: Place) -> str:
    metrics = record.metrics
    rows = f"{metrics['n_rows']:,} x {metrics['d_in']} {metrics['dtype']} in {metrics['n_parts']} parts"
    return f"{place[0]}, {'held out' if place[1] == 'heldout' else 'training'}: {rows}"


def ancestors(storage: Storage, record: Record) -> list[tuple[int, str, str, Record | None]]:
    """Every input of an artefact, depth first: (depth, role, address, its record or None). Each once."""
    seen: set[str] = set()
    found: list[tuple[int, str, str, Record | None]] = []

    def visit(record: Record, depth: int) -> None:
        for role, ref in record.inputs.items():
            if ref in seen:
                continue
            seen.add(ref)
            parent = read_record(storage, ref)
            found.append((depth, role, ref, parent))
            if parent is not None:
                visit(parent, depth + 1)

    visit(record, 1)
    return found


def describe(record: Record) -> str:
    """One line that says what an artefact is, from its spec."""
    spec = record.spec
    stage = record.ref.partition("/")[0]
    config = spec.get("config", {})
    match stage:
        case "segments":
            corpus = "Python standard library" if spec["kind"] == "stdlib" else f"{spec['kind']} documents"
            metrics = record.metrics
            size = f"{metrics['n_documents']:,} documents, {metrics['n_bytes'] / 1e6:.1f} MB"
            return f"{corpus}: {size}, digest {spec['documents'][:12]}"
        case "subjects" if config.get("kind") == "huggingface":
            return f"{config['name']} at {spec['pinned']}"
        case "subjects":
            trained = f"trained for {config['n_steps']} steps" if config["n_steps"] else "untrained"
            return f"embedded {config['n_layers']}-layer model, {config['d_mlp']} MLP neurons, {trained}"
        case "tokens":
            train, heldout = (record.metrics[split]["n_tokens"] for split in ("train", "heldout"))
            return f"{train:,} training and {heldout:,} held-out tokens in contexts of {spec['context_tokens']}"
        case "parts" | "activations" if "hook_point" in spec:
            return f"{spec['hook_point']}, {spec['split']}, {spec['dtype']}"
        case "parts" if isinstance(spec.get("source"), str):
            return f"the rows of {spec['source']}, mixed over all parts"
        case "saes":
            sae = config["sae"]
            sparsity = f"k={sae['k']}" if "k" in sae else f"l1={sae['l1_coefficient']}"
            return f"{sae['architecture']} SAE, d_sae={sae['d_sae']}, {sparsity}, at {config['hook_point']}"
        case "tokenizers":
            return f"byte-level BPE, {spec['vocab_size']:,} tokens"
        case "evaluations":
            return f"FVU {record.metrics['fvu']:.4f} on {record.metrics['n_rows']:,} {record.metrics['split']} rows"
        case "questions":
            return f"{record.metrics['n_asked']} of {record.metrics['n_latents']} latents can be asked about"
        case "labels":
            model = spec["explainer"].get("model") or spec["explainer"]["config"]["name"]
            return f"{record.metrics['n_explained']} of {record.metrics['n_latents']} latents explained by {model}"
        case "reports":
            return str(config["title"])
        case _:
            return TITLES.get(stage, stage)


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float | bool) or (isinstance(value, str) and len(value) <= 80)
