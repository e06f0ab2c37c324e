"""What can be known to be wrong with a subject before anything is trained or its weights are read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sae.errors import ConfigError, InputError
from sae.memory import check_fits
from sae.subject.config import EmbeddedLM, EmbeddedLMSpec, SubjectSpec
from sae.subject.embedded import new_model
from sae.subject.hooks import capture, check_hook_points
from sae.subject.load import auto_class, check_context, check_tokenizer, load_source_tokenizer
from sae.subject.source import ModelSource, check_weights, explained, first_line, pinned_source

MAX_EMBEDDED_LAYERS = 200
TRAINING_BYTES = 16
"""Of a parameter in training: value, gradient and Adam's two moments in float32."""


class SubjectSizes(NamedTuple):
    """What a model tells about its activations without its weights."""

    widths: dict[str, int | None]
    """Hook point -> width of its activations; None where only a run of the model can tell."""


def check_subject(
    spec: SubjectSpec, hook_points: Sequence[str], context_tokens: int, *, syntax: bool = False
) -> SubjectSizes:
    """Build the model without its weights, look for the hook points, and load its tokenizer.

    Args:
        syntax: tokens will get syntax labels, which need a fast tokenizer.

    Raises:
        InputError: no such module (the nearest is named), no activations there, contexts longer than the model takes,
            a tokenizer that is missing or of another model, or sizes that make no model.
        ConfigError: the model does not fit into memory.
    """
    if isinstance(spec, EmbeddedLMSpec):
        return _sizes(_embedded(spec.config, context_tokens), hook_points)
    if spec.config.trust_remote_code:
        return SubjectSizes(dict.fromkeys(hook_points))  # that code is not run before the user's tasks are
    source = pinned_source(spec)
    if spec.pinned.startswith("files:"):
        check_weights(Path(source.name))
    model = _skeleton(source)
    check_hook_points(model, hook_points)
    check_context(model.config, context_tokens, spec.config.name)
    with explained(source):
        tokenizer = load_source_tokenizer(source)
    check_tokenizer(tokenizer, spec.config.name, syntax=syntax)
    n_embeddings = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > n_embeddings:
        raise InputError(
            f"{spec.config.name}: its tokenizer has {len(tokenizer)} tokens, its model embeddings for {n_embeddings}. "
            f"They do not belong together."
        )
    n_bytes = sum(p.numel() for p in model.parameters()) * getattr(torch, spec.config.dtype).itemsize
    check_fits(n_bytes, f"{spec.config.name} in {spec.config.dtype}", "Choose a smaller model.")
    return _sizes(model, hook_points)


def _skeleton(source: ModelSource) -> Any:
    """The model without memory for its weights."""
    from transformers import AutoConfig

    with explained(source):
        config = AutoConfig.from_pretrained(source.name, **source.where)
        try:
            with torch.device("meta"):
                # Other implementations look into their masks, which tensors without memory cannot answer.
                return auto_class(config).from_config(config, attn_implementation="eager").eval()
        except (RuntimeError, ZeroDivisionError) as err:
            raise InputError(f"{source.name}: its config makes no model ({first_line(err)})") from err


def _embedded(config: EmbeddedLM, context_tokens: int) -> Any:
    if config.d_model % config.n_heads or (config.d_model // config.n_heads) % 2:
        raise InputError(
            f"subject: d_model = {config.d_model} does not divide into {config.n_heads} heads of an even size. "
            f"Choose n_heads so that d_model / n_heads is an even number."
        )
    if config.n_layers > MAX_EMBEDDED_LAYERS:
        raise ConfigError(f"subject.n_layers: {config.n_layers} is more than {MAX_EMBEDDED_LAYERS}")
    n_parameters = config.d_model * (config.vocab_size + config.n_layers * (4 * config.d_model + 2 * config.d_mlp))
    n_logits = config.batch_contexts * context_tokens * config.vocab_size
    check_fits(
        TRAINING_BYTES * n_parameters + 2 * 4 * n_logits,
        f"subject: a model of {n_parameters:,} parameters trained on {config.batch_contexts} x {context_tokens} tokens",
        "Lower subject.d_model, vocab_size or batch_contexts, or corpus.context_tokens.",
    )
    with torch.device("meta"):
        model = new_model(config, config.vocab_size, context_tokens, seed=0)
    model.set_attn_implementation("eager")
    return model


def _sizes(model: Any, hook_points: Sequence[str]) -> SubjectSizes:
    check_hook_points(model, hook_points)
    return SubjectSizes({name: _width(model, name) for name in hook_points})


def _width(model: Any, name: str) -> int | None:
    """The width of a hook point's activations, from a forward pass that computes nothing.

    Raises: InputError when they are not [batch, T, width].
    """
    tokens = torch.zeros((2, 3), dtype=torch.int64, device="meta")
    # Causal models make a mask from this one; encoders would look into it and go without.
    for mask in (torch.ones_like(tokens), None):
        try:
            with torch.no_grad(), capture(model, [name]) as read:
                return int(read(tokens, mask)[name].shape[-1])
        except (RuntimeError, NotImplementedError, TypeError, ValueError):
            continue  # this model decides something by values, which are not there
    return None
