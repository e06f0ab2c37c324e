"""From an artefact's address to a model that can be run: embedded or Hugging Face, weights in safetensors only."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sae.errors import InputError
from sae.store.artefacts.records import local_files, require_record
from sae.store.storage.filesystem import Storage
from sae.subject.config import HFModel, HFModelSpec
from sae.subject.source import ModelSource, explained, pinned_source

EMBEDDED = HFModel(name="embedded")
"""How the embedded model is loaded: float32, no code of its own."""


_LOADING = threading.Lock()
"""transformers changes global state (default dtype, initialisers) while it builds a model; parts load in threads."""


@dataclass(frozen=True)
class Subject:
    """A model being studied, ready to run: evaluation mode, no gradients."""

    model: Any
    """A transformers.PreTrainedModel."""
    tokenizer: Any
    """A transformers.PreTrainedTokenizerBase."""
    special_ids: tuple[int, ...]
    causal: bool
    """Whether the model predicts the next token, so that a cross-entropy can be measured."""


def load_subject(storage: Storage, ref: str, device: str | torch.device = "cpu") -> Subject:
    """Load the model and tokenizer of a `subjects/...` artefact.

    Raises:
        StoreError: the artefact is missing or damaged.
        InputError: a pinned model cannot be loaded, has changed, or lacks weights.
        TransientError: the hub cannot be reached and the model is not in the local cache.
    """
    with _source(storage, ref) as source:
        return _load(source, device)


def load_pinned(spec: HFModelSpec, device: str | torch.device = "cpu") -> Subject:
    """Load a pinned model that is no artefact. Raises: InputError and TransientError as load_subject."""
    return _load(pinned_source(spec), device)


def load_tokenizer(storage: Storage, ref: str) -> Any:
    """The tokenizer of a `tokenizers/...` or `subjects/...` artefact. Raises: as load_subject."""
    with _source(storage, ref) as source, _LOADING, explained(source):
        return load_source_tokenizer(source)


def load_source_tokenizer(source: ModelSource) -> Any:
    """The tokenizer of a model on the hub or in a folder. Raises: whatever transformers does; see `explained`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source.name, **source.where)


def check_tokenizer(tokenizer: Any, name: str, *, syntax: bool) -> None:
    """Raises: InputError when it has no vocabulary, or cannot place its tokens in the text and `syntax` needs that."""
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # transformers makes an empty one where it finds no files.
        raise InputError(
            f"{name}: no tokenizer there: its vocabulary has {len(tokenizer)} tokens. Save the tokenizer beside the "
            f"model with `tokenizer.save_pretrained(folder)`."
        )
    if syntax and not tokenizer.is_fast:
        raise InputError(
            f"{name}: {type(tokenizer).__name__} cannot tell where in the text its tokens lie, which syntax labels "
            f"need. Choose a model with a fast tokenizer (tokenizer.json)."
        )


def check_context(config: Any, context_tokens: int, name: str) -> None:
    """Raises: InputError when a model of this transformers config does not take contexts of that length."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and context_tokens > longest:
        raise InputError(
            f"{name}: takes contexts of up to {longest} tokens, corpus.context_tokens is {context_tokens}. Lower it."
        )


def special_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids of the tokens that stand for no text (separators, padding, masks). An unknown token stands for some."""
    kept = {tokenizer.unk_token_id} - {
        getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "pad", "sep", "cls", "mask")
    }
    return tuple(sorted(set(tokenizer.all_special_ids) - kept))


def is_causal(config: Any) -> bool:
    """Whether a model of this transformers config has a next-token head.

    Raises: InputError for an encoder-decoder model.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{config.model_type} is an encoder-decoder model; activations can be read from causal models (GPT, Llama) "
            f"and from encoders (BERT)."
        )
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or ())


def auto_class(config: Any) -> Any:
    """The Auto class that has every weight of the checkpoint and makes up none."""
    import transformers

    if is_causal(config):
        return transformers.AutoModelForCausalLM
    names = config.architectures or ()
    if any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in names):
        return transformers.AutoModelForMaskedLM
    return transformers.AutoModel


@contextlib.contextmanager
def _source(storage: Storage, ref: str) -> Iterator[ModelSource]:
    record = require_record(storage, ref)
    if "pinned" not in record.spec:
        with local_files(storage, record) as folder:
            yield ModelSource(str(folder), None, EMBEDDED)
        return
    spec = HFModelSpec.model_validate(record.spec)
    yield pinned_source(spec)


def _load(source: ModelSource, device: str | torch.device) -> Subject:
    with _LOADING, explained(source):
        model, causal = _load_model(source)
        tokenizer = load_source_tokenizer(source)
    model.to(device).eval().requires_grad_(False)
    return Subject(model, tokenizer, special_ids(tokenizer), causal)


def _load_model(source: ModelSource) -> tuple[Any, bool]:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source.name, **source.where)
    model, report = auto_class(config).from_pretrained(
        source.name,
        config=config,
        dtype=getattr(torch, source.config.dtype),
        use_safetensors=True,
        output_loading_info=True,
        **source.where,
    )
    missing = sorted(name for name in report["missing_keys"] if not _is_unused(name))
    if missing or report["mismatched_keys"]:
        raise InputError(
            f"{source.name}: its weights do not fill a {type(model).__name__} (missing: {', '.join(missing[:3])}"
            f"{', …' if len(missing) > 3 else ''}; wrong shape: {len(report['mismatched_keys'])}). "
            f"Random weights would take their place."
        )
    return model, is_causal(config)


def _is_unused(name: str) -> bool:
    # BERT's pooler serves sentence classification only; masked-LM checkpoints come without it.
    return ".pooler." in f".{name}"
