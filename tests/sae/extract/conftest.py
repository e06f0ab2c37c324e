"""A small corpus of Python files, and every artefact up to an untrained one-layer subject."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sae.extract.config import FilesSource, PartsSpec, SegmentSpec, TokensSpec
from sae.extract.corpus import commit_segment, resolve_segment, training_texts
from sae.extract.tokens import tokenize_segment
from sae.store.storage.filesystem import Storage
from sae.subject.config import EmbeddedLM, EmbeddedLMSpec, TokenizerSpec
from sae.subject.embedded import train_embedded_lm, train_tokenizer

HOOK_POINT = "gpt_neox.layers.0.mlp.act"
CONTEXT = 16


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class World:
    """What the extraction of activations starts from."""

    storage: Storage
    source: FilesSource
    segment: SegmentSpec
    tokenizer: TokenizerSpec
    tokens: TokensSpec
    subject: EmbeddedLMSpec

    def parts(self, **options: object) -> PartsSpec:
        """A spec of parts, small enough that there are several."""
        defaults = {
            "tokens": self.tokens.ref,
            "subject": self.subject.ref,
            "split": "train",
            "hook_point": HOOK_POINT,
            "dtype": "float16",
            "part_bytes": 8 * CONTEXT * 32 * 2,
            "row_group_bytes": 50 * 32 * 2,
            "batch_contexts": 4,
            "keep_special": False,
            "max_norm_multiple": None,
            "seed": 0,
        }
        return PartsSpec.model_validate(defaults | options)


MakeWorld = Callable[..., World]


@pytest.fixture
def corpus_folder(tmp_path: Path) -> Path:
    """Forty small Python files."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(40):
        (folder / f"file_{i:02}.py").write_text(
            f'"""Module {i}."""\n\n\ndef function_{i}(self, value={i}):\n    # add\n    return value + self.x[{i}]\n'
        )
    return folder


@pytest.fixture
def make_world(storage: Storage, corpus_folder: Path) -> MakeWorld:
    """Build all inputs of extract_part; options are those of TokensSpec and `heldout_fraction`."""

    def make(heldout_fraction: float = 0.2, root: Storage = storage, **options: object) -> World:
        source = FilesSource(kind="text", urls=(f"{corpus_folder}/*.py",))
        segment = resolve_segment(source, heldout_fraction)
        commit_segment(root, segment, source)
        tokenizer = TokenizerSpec(vocab_size=300, segments=(segment.ref,))
        train_tokenizer(root, tokenizer, training_texts(root, segment.ref, source))
        defaults = {"context_tokens": CONTEXT, "packing": True, "syntax": True, "seed": 0}
        tokens = TokensSpec.model_validate({"segment": segment.ref, "tokenizer": tokenizer.ref} | defaults | options)
        tokenize_segment(root, tokens, source)
        config = EmbeddedLM(n_steps=0, vocab_size=300, d_model=16, n_heads=2, d_mlp=32)
        subject = EmbeddedLMSpec(config=config, tokenizer=tokenizer.ref, tokens=tokens.ref, seed=0)
        train_embedded_lm(root, subject)
        return World(root, source, segment, tokenizer, tokens, subject)

    return make
