"""A Hugging Face causal model as explainer, in this process, greedy: the same prompt gives the same answer."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from sae.errors import InputError, TransientError
from sae.explain.explainer import Answer, Messages, NoAnswer
from sae.subject.config import HFModel, HFModelSpec
from sae.subject.huggingface import resolve_pin
from sae.subject.load import load_pinned


def pin_explainer(config: HFModel) -> HFModelSpec:
    """The model as it is now. Raises: InputError and TransientError, as for a subject, naming the setting here."""
    with _as_explainer():
        return HFModelSpec(config=config, pinned=resolve_pin(config))


class LocalExplainer:
    """Answers with a pinned model.

    Raises: InputError when it cannot be loaded or does not write text.
    """

    n_at_once = 1

    def __init__(self, spec: HFModelSpec, device: torch.device | str = "cpu") -> None:
        with _as_explainer():
            loaded = load_pinned(spec, device)
        if not loaded.causal:
            raise InputError(f"labels.explainer.name: {spec.config.name} is no causal model: it writes no text.")
        self._name, self._model, self._tokenizer = spec.config.name, loaded.model, loaded.tokenizer
        self._longest = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)

    @torch.inference_mode()
    def complete(self, messages: Messages, *, max_tokens: int, seed: int) -> Answer:
        """Continue the conversation. `seed` has nothing to decide. Raises: NoAnswer for a prompt that is too long."""
        tokenizer = self._tokenizer
        has_template = bool(tokenizer.chat_template)
        # A template writes the special tokens itself.
        inputs = tokenizer(self._prompt(messages), return_tensors="pt", add_special_tokens=not has_template)
        ids = inputs["input_ids"].to(self._model.device)
        n_prompt = ids.shape[1]
        if self._longest is not None and n_prompt + max_tokens > self._longest:
            raise NoAnswer(
                f"a prompt of {n_prompt} tokens and labels.max_tokens = {max_tokens} are more than the "
                f"{self._longest} tokens that {self._name} takes",
                outage=False,
            )
        written = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=self._greedy(max_tokens),
        )[0, n_prompt:]
        return Answer(tokenizer.decode(written, skip_special_tokens=True), self._name, n_prompt, len(written))

    def close(self) -> None:
        """Nothing waits."""

    def _prompt(self, messages: Messages) -> str:
        if self._tokenizer.chat_template:
            return str(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        return "\n\n".join([*(message["content"] for message in messages), ""])

    def _greedy(self, max_tokens: int) -> Any:
        from transformers import GenerationConfig

        # The model's own may ask for sampling; its ends of text are kept.
        own = self._model.generation_config
        end = own.eos_token_id if own.eos_token_id is not None else self._tokenizer.eos_token_id
        padding = end[0] if isinstance(end, list) else end
        return GenerationConfig(max_new_tokens=max_tokens, do_sample=False, eos_token_id=end, pad_token_id=padding)


@contextlib.contextmanager
def _as_explainer() -> Iterator[None]:
    """What loads subjects names settings of the subject; here they are the explainer's."""
    try:
        yield
    except (InputError, TransientError) as err:
        raise type(err)(str(err).replace("subject.", "labels.explainer.")) from err
