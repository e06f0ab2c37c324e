"""A small store made of random rows: tokens, parts, snapshots and an SAE, committed as the stages commit them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sae.architectures import build_sae
from sae.architectures.base import SAE
from sae.architectures.config import SAEConfig, TopKConfig
from sae.extract.config import GivenPartsSpec, InlineSource, PartsSpec, TokensSpec
from sae.store.artefacts import records
from sae.store.part.encoding import Encoding
from sae.store.part.writer import write_part
from sae.store.snapshots.snapshot import PART_FILE, SnapshotSpec, commit_snapshot, encode_vector
from sae.store.storage.filesystem import Storage
from sae.store.text.contexts import PADDING, Contexts, write_contexts, write_documents
from sae.train.config import SAESpec, TrainConfig
from sae.weights import save_sae
from tests.pretend_device import PretendTensor, pretend_device

if not torch.cuda.is_available():  # two kinds of devices beside the CPU are more than torch bears
    pretend_device()  # before tests differentiate: automatic differentiation counts devices once

HOOK_POINT = "gpt_neox.layers.0.mlp.act"
NOWHERE = "0" * 16
SPECIAL = 0
LABELS = ("other", "name", "keyword")


@dataclass
class World:
    """What was written, and the same in memory."""

    storage: Storage
    tokens: tuple[str, ...]
    snapshots: dict[str, str]
    sae_ref: str
    sae: SAE
    contexts: dict[tuple[int, str], Contexts]
    """(segment, split) -> its contexts."""
    rows: dict[tuple[int, str], dict[tuple[int, int], np.ndarray]]
    """(segment, split) -> (seq, pos) -> activation."""


CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
PRETEND = pytest.param("pretend", marks=pytest.mark.without_gpu)
"""Parameters of tests and fixtures: each runs where the other is skipped."""


@pytest.fixture(params=[PRETEND, CUDA])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device that is not the CPU: what is done there, and is seen to be, equals what the CPU does up to rounding."""
    if request.param == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield torch.device("cuda", 0)
        assert torch.cuda.max_memory_allocated() > 0
        return
    # A module that is moved keeps its parameters, as on a GPU: what is tied stays so.
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    n_computed = PretendTensor.n_computed
    yield pretend_device()
    assert PretendTensor.n_computed > n_computed + 50, "the work was done elsewhere"


@pytest.fixture
def make_world(tmp_path: Path) -> Callable[..., World]:
    """Build a store with text: `n_segments` segments of random contexts whose last one is half padding."""

    def make(
        n_segments: int = 1,
        n_train: int = 12,
        n_heldout: int = 6,
        n_tokens: int = 10,
        d_in: int = 6,
        sae_config: SAEConfig | None = None,
        contexts_per_part: int = 5,
        subject: str = f"subjects/{NOWHERE}",
        vocab_size: int = 20,
        root: str | None = None,
        exact: bool = False,
    ) -> World:
        """exact: rows and weights are such that float32 rounds nothing and no two latents of a row are equal."""
        storage = Storage(root or str(tmp_path / "store"))
        rng = np.random.default_rng(0)
        refs, contexts, rows, parts = [], {}, {}, {"train": [], "heldout": []}
        for segment in range(n_segments):
            spec = TokensSpec(
                segment=f"segments/{segment:016x}",
                tokenizer=f"tokenizers/{NOWHERE}",
                context_tokens=n_tokens,
                packing=True,
                syntax=True,
                seed=0,
            )
            refs.append(spec.ref)
            tables = _write_tokens(storage, spec, rng, n_train, n_heldout, n_tokens, vocab_size)
            for split, table in tables.items():
                contexts[segment, split] = table
                ref, acts = _write_parts(storage, spec, subject, split, table, rng, d_in, contexts_per_part, exact)
                parts[split].append(ref)
                rows[segment, split] = acts
        snapshots = {}
        for split, part_refs in parts.items():
            snapshot = SnapshotSpec(parts=tuple(part_refs), n_tokens=None)
            commit_snapshot(storage, snapshot)
            snapshots[split] = snapshot.ref
        sae_ref, sae = write_sae(storage, snapshots["train"], d_in, sae_config or TopKConfig(d_sae=8, k=2), exact)
        return World(storage, tuple(refs), snapshots, sae_ref, sae, contexts, rows)

    return make


@pytest.fixture
def make_given_world(tmp_path: Path) -> Callable[..., World]:
    """Build a store of given activations without text: one training snapshot."""

    def make(
        values: np.ndarray,
        labels: tuple[str, ...] | None = None,
        sae_config: SAEConfig | None = None,
        directions: np.ndarray | None = None,
    ) -> World:
        storage = Storage(str(tmp_path / "given"))
        spec = GivenPartsSpec(
            source=InlineSource(values=tuple(map(tuple, values.tolist())), labels=labels),
            content="",
            split="train",
            heldout_fraction=0,
            dtype="float32",
            part_bytes=1 << 20,
            row_group_bytes=1 << 20,
            seed=0,
        )
        n_rows = len(values)
        order = np.random.default_rng(1).permutation(n_rows)
        zeros = np.zeros(n_rows, np.int32)
        act = values[order].astype(np.float32)
        _commit_part(storage, spec, 0, act, order.astype(np.int32), zeros, zeros - 1)
        _commit_plan(storage, spec, 1, n_rows, n_rows, directions)
        snapshot = SnapshotSpec(parts=(spec.ref,), n_tokens=None)
        commit_snapshot(storage, snapshot)
        sae_ref, sae = write_sae(storage, snapshot.ref, values.shape[1], sae_config or TopKConfig(d_sae=8, k=2))
        rows = {(0, "train"): {(i, 0): values[i].astype(np.float32) for i in range(n_rows)}}
        return World(storage, (), {"train": snapshot.ref}, sae_ref, sae, {}, rows)

    return make


@pytest.fixture(scope="session")
def one_layer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a one-layer GPT-NeoX of random weights (12 MLP neurons) with a byte-level tokenizer of 257 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0} | {character: i + 1 for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    folder = tmp_path_factory.mktemp("one-layer-model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    config = GPTNeoXConfig(
        vocab_size=len(vocabulary),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
        hidden_act="relu",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPTNeoXForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def pin_one_layer_model(one_layer_model: Path) -> Callable[[Storage], str]:
    """Commit `one_layer_model` as a subject; returns its address."""
    from sae.subject.config import HFModel, HFModelSpec
    from sae.subject.huggingface import pin_subject, resolve_pin

    def pin(storage: Storage) -> str:
        config = HFModel(name=str(one_layer_model))
        spec = HFModelSpec(config=config, pinned=resolve_pin(config))
        pin_subject(storage, spec)
        return spec.ref

    return pin


def write_sae(storage: Storage, snapshot: str, d_in: int, config: SAEConfig, exact: bool = False) -> tuple[str, SAE]:
    """Commit an SAE with random weights."""
    generator = torch.Generator().manual_seed(0)
    sae = build_sae(config, d_in)
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(sae.W_dec.shape, generator=generator), dim=1))
        sae.W_enc.copy_(sae.W_dec)
        sae.b_dec.copy_(0.1 * torch.randn(d_in, generator=generator))
        for threshold in sae.buffers():
            threshold.fill_(0.2)
        if exact:
            sae.W_dec.copy_(torch.randint(-3, 4, sae.W_dec.shape, generator=generator) / 2)
            sae.W_enc.copy_(sae.W_dec)
            sae.b_dec.copy_(torch.randint(-1, 2, (d_in,), generator=generator) / 8)
            sae.b_enc.copy_(torch.randperm(config.d_sae, generator=generator) / 2**12 - 0.25)
    spec = SAESpec(config=TrainConfig(sae=config, hook_point=HOOK_POINT), snapshot=snapshot, order_seed=0)
    with storage.staging() as folder:
        save_sae(sae, folder)
        records.commit(storage, spec, folder, {}, seconds=0)
    return spec.ref, sae


def _write_tokens(
    storage: Storage,
    spec: TokensSpec,
    rng: np.random.Generator,
    n_train: int,
    n_heldout: int,
    n_tokens: int,
    vocab_size: int,
) -> dict[str, Contexts]:
    tables, start, n_docs = {}, 0, 0
    names, splits, sizes = [], [], []
    for split, n in (("train", n_train), ("heldout", n_heldout)):
        docs = n_docs + np.sort(rng.integers(0, max(n // 2, 1), n * n_tokens)).reshape(n, n_tokens)
        docs[-1, n_tokens // 2 :] = PADDING
        tokens = rng.integers(1, vocab_size, (n, n_tokens))
        tokens[:, 0] = SPECIAL
        tables[split] = Contexts(
            seq=np.arange(start, start + n, dtype=np.int32),
            tokens=tokens.astype(np.int32),
            docs=docs.astype(np.int32),
            labels=rng.integers(0, len(LABELS), (n, n_tokens)).astype(np.uint8),
        )
        start += n
        for doc in range(n_docs, n_docs + max(n // 2, 1)):
            names.append(f"{spec.segment[-1]}/{split}/{doc}.py")
            splits.append(split)
            sizes.append(int((docs == doc).sum()))
        n_docs = len(names)
    metrics = {
        "n_documents": n_docs,
        "train": {"n_contexts": n_train},
        "heldout": {"n_contexts": n_heldout},
        "special_ids": [SPECIAL],
        "pad_id": None,
        "vocab_size": vocab_size,
        "label_names": list(LABELS),
    }
    with storage.staging() as folder:
        for split, table in tables.items():
            write_contexts(folder / f"{split}.parquet", table)
        write_documents(folder / "documents.parquet", names, splits, sizes)
        records.commit(storage, spec, folder, metrics, seconds=0)
    return tables


def _write_parts(
    storage: Storage,
    tokens: TokensSpec,
    subject: str,
    split: str,
    table: Contexts,
    rng: np.random.Generator,
    d_in: int,
    contexts_per_part: int,
    exact: bool,
) -> tuple[str, dict[tuple[int, int], np.ndarray]]:
    """Rows of all tokens that are neither padding nor special, permuted within the part."""
    spec = PartsSpec(
        tokens=tokens.ref,
        subject=subject,
        split=split,
        hook_point=HOOK_POINT,
        dtype="float16",
        part_bytes=1,
        row_group_bytes=1,
        batch_contexts=4,
        keep_special=False,
        seed=0,
    )
    rows = {}
    # Drawn for the whole split, so that another division into parts has the same rows.
    acts = rng.standard_normal((*table.tokens.shape, d_in)).astype(np.float16)
    if exact:
        acts = np.round(acts * 8) / 8
    orders = np.random.default_rng(1)
    n_parts = -(-len(table) // contexts_per_part)
    for part in range(n_parts):
        chosen = slice(part * contexts_per_part, (part + 1) * contexts_per_part)
        kept = (table.docs[chosen] != PADDING) & (table.tokens[chosen] != SPECIAL)
        order = orders.permutation(int(kept.sum()))
        index, pos = (axis[order] for axis in np.nonzero(kept))
        seq = table.seq[chosen][index]
        act = acts[chosen][index, pos]
        rows |= {(int(s), int(p)): a.astype(np.float32) for s, p, a in zip(seq, pos, act, strict=True)}
        _commit_part(storage, spec, part, act, seq, pos.astype(np.int32), table.tokens[chosen][index, pos])
    _commit_plan(storage, spec, n_parts, contexts_per_part, contexts_per_part * table.tokens.shape[1])
    return spec.ref, rows


def _commit_part(storage, spec, part, act, seq, pos, token) -> None:
    with storage.staging() as folder:
        layout = write_part(
            folder / PART_FILE, act, seq, pos, token, row_group_rows=16, encoding=Encoding(dtype=str(act.dtype))
        )
        exact = act.astype(np.float64)
        metrics = {
            "layout": layout.model_dump(mode="json"),
            "sum": encode_vector(exact.sum(axis=0)),
            "sum_sq": float((exact**2).sum()),
        }
        records.commit(storage, spec, folder, metrics, seconds=0, part=part)


def _commit_plan(storage, spec, n_parts: int, contexts_per_part: int, tokens_per_part: int, directions=None) -> None:
    metrics = {"n_parts": n_parts, "contexts_per_part": contexts_per_part, "tokens_per_part": tokens_per_part}
    if isinstance(spec, PartsSpec):
        metrics["dropped_ids"] = [SPECIAL]
    with storage.staging() as folder:
        if directions is not None:
            save_file({"directions": torch.from_numpy(directions)}, folder / "directions.safetensors")
        records.commit(storage, spec, folder, metrics, seconds=0)
