"""Whatever shape a model has and however its weights are stored, a stored row is what the model itself computes."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sae.errors import InputError
from sae.extract.config import FilesSource, PartsSpec, TokensSpec
from sae.extract.corpus import commit_segment, resolve_segment
from sae.extract.part import extract_part, plan_parts
from sae.extract.tokens import tokenize_segment
from sae.store.artefacts.records import local_files
from sae.store.storage.filesystem import Storage
from sae.store.text.contexts import read_contexts
from sae.subject.config import HFModel, HFModelSpec
from sae.subject.huggingface import pin_subject, resolve_pin
from sae.subject.load import load_subject
from tests.flows.models import HOOK_POINTS, save_model

Rows = dict[tuple[int, int], np.ndarray]
"""(context, position) -> activation."""


def parts_of(storage: Storage, model: Path, corpus: Path, hook_points: tuple[str, ...], dtype: str) -> list[PartsSpec]:
    """Everything that extraction starts from."""
    config = HFModel(name=str(model), dtype=dtype)
    subject = HFModelSpec(config=config, pinned=resolve_pin(config))
    pin_subject(storage, subject)
    source = FilesSource(kind="text", urls=(f"{corpus}/*.py",))
    segment = resolve_segment(source, 0.0)
    commit_segment(storage, segment, source)
    tokens = TokensSpec(
        segment=segment.ref, tokenizer=subject.ref, context_tokens=16, packing=True, syntax=False, seed=0
    )
    tokenize_segment(storage, tokens, source)
    common = {"tokens": tokens.ref, "subject": subject.ref, "split": "train", "dtype": "float16", "batch_contexts": 4}
    common |= {"part_bytes": 1 << 30, "row_group_bytes": 1 << 12, "keep_special": False, "seed": 0}
    return [PartsSpec(hook_point=name, **common) for name in hook_points]


def extracted(
    storage: Storage, model: Path, corpus: Path, hook_points: tuple[str, ...], dtype: str = "float32"
) -> dict[str, Rows]:
    """The stored rows of each hook point."""
    found = {}
    for spec in parts_of(storage, model, corpus, hook_points, dtype):
        assert plan_parts(storage, spec).metrics["n_parts"] == 1
        (record,) = extract_part(storage, [spec], 0)
        with local_files(storage, record) as folder:
            table = pq.read_table(folder / "part.parquet")
        places = zip(table["seq"].to_pylist(), table["pos"].to_pylist(), strict=True)
        found[spec.hook_point] = dict(zip(places, np.array(table["act"].to_pylist(), np.float32), strict=True))
    return found


def by_hand(storage: Storage, spec: PartsSpec, model: Path, hook_points: tuple[str, ...]) -> dict[str, Rows]:
    """The same from transformers alone, one context at a time: residual streams are its `hidden_states`."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    auto = AutoModelForMaskedLM if hook_points[0].startswith("bert") else AutoModelForCausalLM
    reference = auto.from_pretrained(model, dtype=torch.float32).eval()
    before, after, mlp_out, mlp_hidden = hook_points
    seen: dict[str, Any] = {}
    reference.get_submodule(mlp_out).register_forward_hook(lambda _, args, out: seen.update({mlp_out: out}))
    path, _, side = mlp_hidden.partition(":")
    reference.get_submodule(path).register_forward_hook(
        lambda _, args, out: seen.update({mlp_hidden: args[0] if side else out})
    )
    contexts = read_contexts(storage, spec.tokens, "train")
    found: dict[str, Rows] = {name: {} for name in hook_points}
    for seq, tokens in zip(contexts.seq.tolist(), contexts.tokens, strict=True):
        with torch.no_grad():
            states = reference(torch.from_numpy(tokens.astype(np.int64))[None], output_hidden_states=True).hidden_states
        seen |= {before: states[1], after: states[1]}  # what goes into layer 1, and what layer 0 leaves
        for name in hook_points:
            found[name] |= {(seq, pos): act.numpy() for pos, act in enumerate(seen[name][0])}
    return found


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "llama", "qwen2", "qwen3", "bert"])
def test_hook_points_of_every_kind_yield_what_the_model_computes(
    family: str, storage: Storage, tmp_path: Path, corpus_folder: Path
) -> None:
    save_model(family, tmp_path / "model")
    names = HOOK_POINTS[family]
    rows = extracted(storage, tmp_path / "model", corpus_folder, names)
    spec = parts_of(storage, tmp_path / "model", corpus_folder, names, "float32")[0]
    expected = by_hand(storage, spec, tmp_path / "model", names)
    for name in names:
        assert len(rows[name]) > 400
        for place, act in rows[name].items():
            np.testing.assert_allclose(act, expected[name][place], rtol=4e-3, atol=4e-3, err_msg=f"{name} {place}")
    assert [len(next(iter(rows[name].values()))) for name in names] == [16, 16, 16, 24]


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_embeddings_are_loaded_as_they_are(
    tied: bool, storage: Storage, tmp_path: Path, corpus_folder: Path
) -> None:
    save_model("llama", tmp_path / "model", tie_word_embeddings=tied)
    (spec,) = parts_of(storage, tmp_path / "model", corpus_folder, ("model.layers.0",), "float32")
    model = load_subject(storage, spec.subject).model
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert torch.equal(embeddings, head) == tied
    (rows,) = extracted(storage, tmp_path / "model", corpus_folder, ("model.layers.0",)).values()
    assert len(rows) > 400


def test_sharded_weights_give_the_same_activations(storage: Storage, tmp_path: Path, corpus_folder: Path) -> None:
    save_model("llama", tmp_path / "whole")
    save_model("llama", tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) == 1
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    whole, sharded = (
        extracted(storage, tmp_path / name, corpus_folder, HOOK_POINTS["llama"][:2]) for name in ("whole", "sharded")
    )
    for name, rows in whole.items():
        assert rows.keys() == sharded[name].keys()
        assert all(np.array_equal(act, sharded[name][place]) for place, act in rows.items())


def test_bfloat16_weights_run_in_either_precision(storage: Storage, tmp_path: Path, corpus_folder: Path) -> None:
    save_model("qwen2", tmp_path / "model", dtype="bfloat16")
    name = HOOK_POINTS["qwen2"][0]
    wide = extracted(storage, tmp_path / "model", corpus_folder, (name,), "float32")[name]
    narrow = extracted(storage, tmp_path / "model", corpus_folder, (name,), "bfloat16")[name]
    assert wide.keys() == narrow.keys()
    places = sorted(wide)
    a, b = (np.stack([rows[place] for place in places]) for rows in (wide, narrow))
    assert not np.array_equal(a, b)
    assert np.abs(a - b).max() < 0.1 * np.abs(a).max()
    # Stored values are bfloat16 values: nothing is lost by storing them as float16.
    assert np.array_equal(torch.from_numpy(b).bfloat16().float().numpy(), b)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_named_and_not_tried_again(
    value: float, storage: Storage, tmp_path: Path, corpus_folder: Path
) -> None:
    save_model("gpt2", tmp_path / "model")
    (spec,) = parts_of(storage, tmp_path / "model", corpus_folder, ("transformer.h.0:input",), "float32")
    plan_parts(storage, spec)
    subject = load_subject(storage, spec.subject)
    contexts = read_contexts(storage, spec.tokens, "train")
    # One token's embedding is broken: the error must point to a place where it stands.
    token = int(contexts.tokens[2, 5])
    subject.model.transformer.wte.weight[token] = value
    with pytest.raises(InputError) as caught:
        extract_part(storage, [spec], 0, subject=subject)
    found = caught.value
    assert not found.retryable
    match = re.search(r"part 0, .*context (\d+), position (\d+): 16 of 16 activations are NaN or infinite", str(found))
    assert match, found
    row = contexts.seq.tolist().index(int(match[1]))
    assert contexts.tokens[row, int(match[2])] == token
    assert not storage.exists(f"{spec.ref}/part-00000.json")
