"""One subject, its rows and a few SAEs, written down in the formats that other libraries read.

Everything is seeded and made on the spot; nothing is downloaded.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from sae.architectures import SAE, TopKConfig
from sae.store.text.contexts import Contexts
from sae.subject.hooks import capture
from sae.train.config import TrainConfig
from sae.train.in_memory import train_in_memory
from sae.weights import WEIGHTS_FILE, fold_input_scale, save_sae

HOOK_POINT = "gpt_neox.layers.0.mlp"
SPECIAL = 0
"""The special token: first in every context, and inside some."""
VOCABULARY, D_IN, D_SAE, K = 257, 32, 64, 4
N_CONTEXTS, CONTEXT_TOKENS = 37, 24
UNEVEN = "16, 16 and 5"
BATCHES = {"37": (37,), UNEVEN: (16, 16, 5), "4 (last: 1)": (4,) * 9 + (1,), "1": (1,) * 37}
"""Contexts per batch."""
CONSTANT_ERROR, FACTOR, FAR = 0.5, 4.0, 300.0
SILENCED = 0.5
"""Taken from b_enc, so that fewer than k latents fire on many rows and L0 is no constant."""
PEAKY = 300.0
"""Factor on the unembedding with which some probabilities are zero in float32."""


@dataclass(frozen=True)
class Case:
    """An SAE and the rows it is measured on."""

    what: str
    model: Any
    sae: SAE
    x: Tensor
    """Rows of the tokens that are not special, context by context. [rows, d_in]"""


@dataclass(frozen=True)
class World:
    """What all the peers are given."""

    contexts: Contexts
    cases: dict[str, Case]

    def rows_per_batch(self, batching: str) -> list[int]:
        """How many of a case's rows each batch has."""
        rows = (self.contexts.tokens != SPECIAL).sum(axis=1)
        return [int(batch.sum()) for batch in np.split(rows, np.cumsum(BATCHES[batching])[:-1])]


def make_world() -> World:
    """A small subject trained on a Markov chain, an SAE of its first MLP's output, and variants of both."""
    generator = torch.Generator().manual_seed(0)
    chain = torch.softmax(4 * torch.randn(VOCABULARY - 1, VOCABULARY - 1, generator=generator), dim=1)
    subject = _train_subject(chain, generator)
    contexts = _draw(chain, N_CONTEXTS, generator)
    config = TrainConfig(sae=TopKConfig(d_sae=D_SAE, k=K), batch_rows=512, n_tokens=8 * 512)
    trained = train_in_memory(_rows(subject, _draw(chain, 400, generator)), config)
    trained.b_enc.sub_(SILENCED)
    variants = {
        "trained": ("rows whose mean is not zero, and an SAE of them", subject, trained),
        "constant error": (
            f"the same latents; {CONSTANT_ERROR} added to every dimension of every reconstruction",
            subject,
            _with_constant_error(trained, CONSTANT_ERROR),
        ),
        "scaled": (f"rows and SAE in a unit {FACTOR:g} times as small", *_scaled(subject, trained, FACTOR)),
        "far": (f"{FAR:g} added to every dimension of rows and b_dec", *_moved(subject, trained, FAR)),
    }
    cases = {name: Case(what, model, sae, _rows(model, contexts)) for name, (what, model, sae) in variants.items()}
    return World(contexts, cases)


def write_world(world: World, folder: Path) -> None:
    """One folder per case: `model/`, `saelens/`, `sparsify/`, `dictionary_learning/`; the rows and the plan beside."""
    tensors = {"tokens": torch.from_numpy(world.contexts.tokens.astype(np.int64))}
    for name, case in world.cases.items():
        tensors[f"x/{name}"] = case.x
        _write_model(case.model, folder / name / "model")
        _write_saelens(case.sae, folder / name / "saelens")
        _write_sparsify(case.sae, folder / name / "sparsify")
        _write_dictionary_learning(case.sae, folder / name / "dictionary_learning")
    save_file(tensors, folder / "data.safetensors")
    plan = {
        "cases": list(world.cases),
        "hook_point": HOOK_POINT,
        "special": SPECIAL,
        "k": K,
        "peaky": PEAKY,
        "contexts_per_batch": BATCHES,
        "rows_per_batch": {batching: world.rows_per_batch(batching) for batching in BATCHES},
    }
    (folder / "plan.json").write_text(json.dumps(plan, indent=1))


def _draw(chain: Tensor, n: int, generator: torch.Generator) -> Contexts:
    """Contexts of the Markov chain; every third has a special token in the middle. chain: [v, v]"""
    columns = [torch.randint(len(chain), (n,), generator=generator)]
    for _ in range(CONTEXT_TOKENS - 2):
        columns.append(torch.multinomial(chain[columns[-1]], 1, generator=generator)[:, 0])
    tokens = F.pad(torch.stack(columns, dim=1) + 1, (1, 0), value=SPECIAL).numpy().astype(np.int32)
    tokens[::3, CONTEXT_TOKENS // 2] = SPECIAL
    return Contexts(np.arange(n, dtype=np.int32), tokens, np.zeros_like(tokens), None)


def _train_subject(chain: Tensor, generator: torch.Generator) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=VOCABULARY,
                hidden_size=D_IN,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                max_position_embeddings=CONTEXT_TOKENS,
                use_parallel_residual=False,
                bos_token_id=SPECIAL,
                eos_token_id=SPECIAL,
            )
        )
    with torch.no_grad():
        model.get_submodule(HOOK_POINT).dense_4h_to_h.bias.normal_(0, 3, generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        tokens = torch.from_numpy(_draw(chain, 32, generator).tokens.astype(np.int64))
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False).eval()


@torch.no_grad()
def _rows(model: Any, contexts: Contexts) -> Tensor:
    tokens = torch.from_numpy(contexts.tokens.astype(np.int64))
    with capture(model, [HOOK_POINT]) as read:
        return read(tokens)[HOOK_POINT][tokens != SPECIAL].clone()


@torch.no_grad()
def _with_constant_error(sae: SAE, error: float) -> SAE:
    """Move b_dec, and b_enc so that the latents stay."""
    wrong = copy.deepcopy(sae)
    wrong.b_dec.add_(error)
    wrong.b_enc.add_(error * wrong.W_enc.sum(dim=1))
    return wrong


@torch.no_grad()
def _scaled(model: Any, sae: SAE, factor: float) -> tuple[Any, SAE]:
    """Rows and reconstructions times `factor`, with the same latents."""
    model, sae = copy.deepcopy(model), copy.deepcopy(sae)
    projection = model.get_submodule(HOOK_POINT).dense_4h_to_h
    projection.weight.mul_(factor)
    projection.bias.mul_(factor)
    fold_input_scale(sae, 1 / factor)
    return model, sae


@torch.no_grad()
def _moved(model: Any, sae: SAE, offset: float) -> tuple[Any, SAE]:
    """Rows and reconstructions plus `offset`, with the same latents."""
    model, sae = copy.deepcopy(model), copy.deepcopy(sae)
    model.get_submodule(HOOK_POINT).dense_4h_to_h.bias.add_(offset)
    sae.b_dec.add_(offset)
    return model, sae


def _write_model(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": SPECIAL} | {character: i + 1 for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def _write_saelens(sae: SAE, folder: Path) -> None:
    """Our folder is SAELens's but for the name of the weights."""
    folder.mkdir(parents=True)
    save_sae(sae, folder, {"model_name": "subject", "hook_name": HOOK_POINT, "hook_head_index": None})
    (folder / WEIGHTS_FILE).rename(folder / "sae_weights.safetensors")


def _write_sparsify(sae: SAE, folder: Path) -> None:
    folder.mkdir(parents=True)
    tensors = {"encoder.weight": sae.W_enc, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / "sae.safetensors")
    config = {"activation": "topk", "num_latents": D_SAE, "k": K, "normalize_decoder": False, "d_in": D_IN}
    (folder / "cfg.json").write_text(json.dumps(config))


def _write_dictionary_learning(sae: SAE, folder: Path) -> None:
    """The state dict of AutoEncoderTopK, without the pickle that its own file is."""
    folder.mkdir(parents=True)
    tensors = {
        "encoder.weight": sae.W_enc,
        "encoder.bias": sae.b_enc,
        "decoder.weight": sae.W_dec.T,
        "b_dec": sae.b_dec,
        "k": torch.tensor(K, dtype=torch.int32),
        "threshold": torch.tensor(-1.0),
    }
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / "ae.safetensors")
