"""The embedded subject: a byte-level BPE tokenizer and a small GPT-NeoX model trained on the corpus itself."""

import contextlib
import itertools
import logging
import shutil
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sae.errors import InputError, StopRequested, TrainingError
from sae.philox import philox
from sae.progress import Progress, silent
from sae.store.artefacts.checkpoints import (
    Checkpoints,
    Position,
    new_attempt,
    remove_checkpoints,
)
from sae.store.artefacts.modules import module_tensors, restore_module
from sae.store.artefacts.records import Record, commit, local_files, require_record
from sae.store.storage.filesystem import Storage
from sae.store.text.contexts import PADDING, Contexts, read_contexts
from sae.subject.baselines import ngram_losses
from sae.subject.config import EmbeddedLM, EmbeddedLMSpec, TokenizerSpec
from sae.subject.source import quiet

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
ADAM_BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
GRADIENT_CLIP = 1.0
IGNORED = -100
"""Target of positions without a next token."""


def train_tokenizer(
    storage: Storage, spec: TokenizerSpec, documents: Iterable[str], *, progress: Progress = silent
) -> Record:
    """Train a byte-level BPE tokenizer and save it as AutoTokenizer reads it.

    Args:
        documents: the texts of the training documents of the spec's segments, in order.

    Raises: InputError when there is too little text for the vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    started = time.perf_counter()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_reported(documents, progress), trainer)
    n_tokens = tokenizer.get_vocab_size()
    if n_tokens != spec.vocab_size:
        raise InputError(
            f"the corpus has text for a vocabulary of {n_tokens} tokens, {spec.vocab_size} were asked for. "
            f"Set subject.vocab_size to {n_tokens} or less, or add text to corpus.segments."
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )
    with storage.staging() as folder:
        fast.save_pretrained(folder)
        return commit(storage, spec, folder, {"vocab_size": n_tokens}, seconds=time.perf_counter() - started)


def train_embedded_lm(
    storage: Storage,
    spec: EmbeddedLMSpec,
    *,
    checkpoint_every_steps: int = 200,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> Record:
    """Train the language model and save it with its tokenizer as the Auto classes read them.

    The record's metrics hold the losses on held-out text, in nats per token, and what counting tokens achieves on the
    same positions (`sae.subject.baselines`). An interrupted training goes on from its newest checkpoint and ends with
    the same bytes.

    Args:
        checkpoint_every_steps: 0 writes none.
        device: where it is trained; its random weights are the same everywhere.
        progress: called after every step; may raise StopRequested, and a checkpoint of that step is written.

    Raises:
        InputError: the corpus has no training context.
        TrainingError: the loss is not finite.
        StopRequested: as told by `progress`.
    """
    started = time.perf_counter()
    train = read_contexts(storage, spec.tokens, "train")
    heldout = read_contexts(storage, spec.tokens, "heldout")
    if len(train) == 0:
        raise InputError(f"{spec.tokens}: no training context. Add text to corpus.segments or lower heldout_fraction.")
    vocab_size = int(require_record(storage, spec.tokens).metrics["vocab_size"])
    model = new_model(spec.config, vocab_size, context_tokens=train.tokens.shape[1], seed=spec.seed)
    model.to(device)
    checkpoints = Checkpoints(storage, spec.ref, Position, new_attempt())
    train_model(model, spec, train, checkpoints, checkpoint_every_steps, progress)
    n_tokens = spec.config.n_steps * spec.config.batch_contexts * train.tokens.shape[1]
    metrics: dict[str, Any] = {
        "class": type(model).__name__,
        "d_model": spec.config.d_model,
        "n_layers": spec.config.n_layers,
        "vocab_size": vocab_size,
        "causal": True,
        "n_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "n_tokens": n_tokens,
        "n_epochs": round(n_tokens / train.tokens.size, 3),
        "heldout_loss": mean_loss(model, heldout),
    }
    baselines = ngram_losses(train, heldout, vocab_size)
    metrics |= {"unigram_loss": baselines.unigram, "bigram_loss": baselines.bigram, "bigram_rule": baselines.rule}
    with storage.staging() as folder:
        with quiet():
            model.cpu().save_pretrained(folder)
        with local_files(storage, require_record(storage, spec.tokenizer)) as tokenizer:
            shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
        record = commit(storage, spec, folder, metrics, seconds=time.perf_counter() - started, device=device)
    remove_checkpoints(storage, spec.ref)
    return record


def new_model(config: EmbeddedLM, vocab_size: int, context_tokens: int, seed: int) -> Any:
    """A GPT-NeoX model (the class that Pythia uses) with random weights: ReLU, rotary, tied embeddings."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=vocab_size,
                hidden_size=config.d_model,
                num_hidden_layers=config.n_layers,
                num_attention_heads=config.n_heads,
                intermediate_size=config.d_mlp,
                hidden_act="relu",
                # Attention before the MLP: in parallel, a one-layer model's MLP would see nothing but its own token.
                use_parallel_residual=False,
                max_position_embeddings=context_tokens,
                tie_word_embeddings=True,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    return model.eval()


def train_model(
    model: Any,
    spec: EmbeddedLMSpec,
    train: Contexts,
    checkpoints: Checkpoints[Position],
    checkpoint_every_steps: int,
    progress: Progress,
) -> None:
    """AdamW with weight decay on the matrices, gradient norm clipped at 1; in place, from the newest checkpoint on.

    A checkpoint is model, moments and step: rows and learning rate follow from the step, and nothing is drawn (the
    model has no dropout).

    Raises: TrainingError when the loss is not finite; StopRequested from `progress`, once a checkpoint is written.
    """
    config = spec.config
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=ADAM_BETAS, fused=True)
    resumed = checkpoints.load(lambda tensors, position: restore_module(model, optimizer, tensors, position.step))
    start = resumed.step if resumed is not None else 0
    model.train()
    batches = batch_indices(len(train), config.batch_contexts, spec.seed, start)
    for step in range(start + 1, config.n_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * lr_factor(step - 1, config)
        optimizer.zero_grad(set_to_none=True)
        with _repeatable_attention(model.device):
            loss = next_token_losses(model, *_inputs(train, next(batches), model.device)).mean()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_CLIP)
        optimizer.step()
        value = float(loss.detach())
        if not np.isfinite(value):
            raise TrainingError(f"the subject's loss is {value} at step {step}. Lower subject.lr ({config.lr}).")
        here = Position(step=step)
        if checkpoint_every_steps and step % checkpoint_every_steps == 0:
            checkpoints.save(module_tensors(model, optimizer), here)
        try:
            progress(step, config.n_steps, "steps", f"loss {value:.2f}")
        except StopRequested as err:
            kept = "without a checkpoint, as none were asked for"
            if checkpoint_every_steps:
                checkpoints.save(module_tensors(model, optimizer), here)
                kept = "the same call goes on from there"
            message = f"{err}: training the subject stopped at step {step} of {config.n_steps}, {kept}"
            raise StopRequested(message) from err
    model.eval()


def lr_factor(step: int, config: EmbeddedLM) -> float:
    """Share of the peak learning rate at a step: linear warm-up, constant, then linear to zero from `decay_from`."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decay_start = config.decay_from * config.n_steps
    if step < decay_start:
        return warmup
    return warmup * (config.n_steps - step) / (config.n_steps - decay_start)


def batch_indices(n_contexts: int, batch_contexts: int, seed: int, start: int = 0) -> Iterator[np.ndarray]:
    """Indices of the contexts of every batch, for ever: each epoch is a permutation, batches run on across epochs.

    Args:
        start: the number of the first batch to yield; those before it are not walked through.
    """
    first, skipped = divmod(start * batch_contexts, n_contexts)
    rest = np.empty(0, np.int64)
    for epoch in itertools.count(first):
        order = philox("subject", seed, epoch).permutation(n_contexts)
        rest = np.concatenate([rest, order[skipped:] if epoch == first else order])
        while len(rest) >= batch_contexts:
            yield rest[:batch_contexts]
            rest = rest[batch_contexts:]


def next_token_losses(model: Any, tokens: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats at every position that has a target. [n_targets]

    Args:
        tokens: [batch, T] int64
        targets: the next token, IGNORED where there is none. [batch, T] int64
    """
    logits = model(tokens, use_cache=False).logits
    has_target = targets != IGNORED
    return F.cross_entropy(logits[has_target].float(), targets[has_target], reduction="none")


@torch.no_grad()
def mean_loss(model: Any, contexts: Contexts, batch_contexts: int = 64) -> float | None:
    """Mean cross-entropy in nats over all positions that have a next token; None without any."""
    total, count = 0.0, 0
    for start in range(0, len(contexts), batch_contexts):
        rows = np.arange(start, min(start + batch_contexts, len(contexts)))
        losses = next_token_losses(model, *_inputs(contexts, rows, model.device)).double()
        total += float(losses.sum())
        count += losses.numel()
    return total / count if count else None


def _repeatable_attention(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """On a GPU, derivatives of attention's faster kernels differ from run to run."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else contextlib.nullcontext()


def _inputs(contexts: Contexts, rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and next tokens of some contexts."""
    tokens = contexts.tokens[rows].astype(np.int64)
    targets = np.full_like(tokens, IGNORED)
    targets[:, :-1] = np.where(contexts.docs[rows][:, 1:] == PADDING, IGNORED, tokens[:, 1:])
    return torch.from_numpy(tokens).to(device), torch.from_numpy(targets).to(device)


def _reported(documents: Iterable[str], progress: Progress) -> Iterator[str]:
    for count, document in enumerate(documents, 1):
        yield document
        if count % 100 == 0:
            progress(count, count, "documents")
