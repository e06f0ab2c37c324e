"""A tiny language model and corpus on disk, and extraction from them as the stages do it."""

from pathlib import Path

import pytest
import torch

from sae.errors import InputError
from sae.extract.config import FilesSource, PartsSpec, TokensSpec
from sae.extract.corpus import commit_segment, resolve_segment
from sae.extract.part import extract_part, plan_parts
from sae.extract.tokens import tokenize_segment
from sae.store.artefacts.records import is_intact, require_record
from sae.store.reading.loader import Loader
from sae.store.reading.shuffle import ShuffleConfig
from sae.store.snapshots.snapshot import SnapshotSpec, commit_snapshot, read_snapshot
from sae.store.storage.filesystem import Storage
from sae.store.text.contexts import read_contexts
from sae.subject.config import HFModel, HFModelSpec
from sae.subject.huggingface import pin_subject, resolve_pin
from tests.bad_days.place import Place
from tests.bad_days.small_store import collect, named, problems
from tests.flows.models import save_model

HOOK_POINT = "transformer.h.0:input"


def prepare(folder: Path, broken_token: int | None = None) -> None:
    """Save model and corpus below a folder. `broken_token`: one whose embedding is NaN."""
    save_model("gpt2", folder / "model")
    if broken_token is not None:
        from transformers import GPT2LMHeadModel

        model = GPT2LMHeadModel.from_pretrained(folder / "model")
        with torch.no_grad():
            model.transformer.wte.weight[broken_token] = float("nan")
        model.save_pretrained(folder / "model")
    (folder / "corpus").mkdir()
    for i in range(12):
        text = f"def function_{i}(self, value={i}):\n    return value + self.x[{i}]\n"
        (folder / "corpus" / f"{i:02}.py").write_text(text)


def prepare_root(storage: Storage, folder: Path) -> PartsSpec:
    """Pin the model and tokenize the corpus, as far as that is not done."""
    config = HFModel(name=str(folder / "model"), dtype="float32")
    subject = HFModelSpec(config=config, pinned=resolve_pin(config))
    if not is_intact(storage, subject.ref):
        pin_subject(storage, subject)
    source = FilesSource(kind="text", urls=(f"{folder}/corpus/*.py",))
    segment = resolve_segment(source, 0.0)
    if not is_intact(storage, segment.ref):
        commit_segment(storage, segment, source)
    tokens = TokensSpec(
        segment=segment.ref, tokenizer=subject.ref, context_tokens=16, packing=True, syntax=False, seed=0
    )
    if not is_intact(storage, tokens.ref):
        tokenize_segment(storage, tokens, source)
    spec = PartsSpec(
        tokens=tokens.ref,
        subject=subject.ref,
        split="train",
        hook_point=HOOK_POINT,
        dtype="float16",
        part_bytes=1 << 12,
        row_group_bytes=1 << 10,
        batch_contexts=4,
        keep_special=False,
        seed=0,
    )
    if not is_intact(storage, spec.ref):
        plan_parts(storage, spec)
    return spec


def extract(storage: Storage, folder: Path) -> None:
    """All parts, their snapshot, and an epoch of reading."""
    spec = prepare_root(storage, folder)
    for part in range(require_record(storage, spec.ref).metrics["n_parts"]):
        if not is_intact(storage, spec.ref, part):
            extract_part(storage, [spec], part)
    snapshot = SnapshotSpec(parts=(spec.ref,), n_tokens=None)
    if not is_intact(storage, snapshot.ref):
        commit_snapshot(storage, snapshot)
    shuffle = ShuffleConfig(n_streams=2, window_row_groups=4)
    loader = Loader(storage, read_snapshot(storage, snapshot.ref), 32, 0, shuffle=shuffle)
    try:
        for _ in range(loader.batches_per_epoch):
            next(loader)
    finally:
        loader.close()


def nan(place: Place, tries: int) -> list[str]:
    """A model on disk with NaN in the embedding of one token; a part whose contexts have it is never committed."""
    outcomes = []
    healthy, healthy_folder = place.fresh(False), place.fresh_folder()
    prepare(healthy_folder)
    tokens = read_contexts(healthy, prepare_root(healthy, healthy_folder).tokens, "train").tokens
    for number in range(tries):
        storage, folder = place.fresh(False), place.fresh_folder()
        token = int(tokens[(7 * number) % len(tokens), 5])
        prepare(folder, broken_token=token)
        spec = prepare_root(storage, folder)
        contexts = read_contexts(storage, spec.tokens, "train")
        before = named(storage)
        with pytest.raises(InputError) as caught:
            extract(storage, folder)
        text = str(caught.value)
        assert not InputError.retryable
        assert HOOK_POINT in text
        assert "activations are NaN or infinite" in text
        context, pos = (int(text.split(f"{word} ")[1].split(":")[0].split(",")[0]) for word in ("context", "position"))
        assert contexts.tokens[contexts.seq.tolist().index(context), pos] == token, text
        part = int(text.split("part ")[1].split(",")[0])
        assert not is_intact(storage, spec.ref, part)
        finished = named(storage) - before
        assert all(int(Path(path).stem[5:10]) < part for path in finished if path.count("/") == 2)
        assert problems(storage) == []
        assert collect(storage) == []
        outcomes.append("named hook point, context, position; not committed, nothing left")
    return outcomes
