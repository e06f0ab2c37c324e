"""Text generated with and without interventions on latents.

An intervention changes the activations x at the hook point on every position, of the prompt and of what is generated:

    x' = x + sum_i (f'_i - f_i) W_dec[i]

with f = encode(x) and f'_i what the intervention makes of f_i. What the SAE does not reconstruct of x stays, so
f' = f changes nothing. Tokens that the SAE was not trained on (special tokens) keep their activations.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae.philox import philox
from sae.report.numbers import short
from sae.serve.bodies import Generation, Intervention
from sae.serve.encode import Check, check_latent, seen, show_ids, tokenize
from sae.serve.live import LiveSAE
from sae.serve.refusals import Refused
from sae.subject.hooks import splice
from sae.subject.text import token_bytes

FORMULA = (
    "x' = x + sum_i (f'_i - f_i) W_dec[i] at every position; clamp: f' = value, scale: f' = value f, ablate: f' = 0"
)
Interventions = tuple[Intervention, ...]


class _Continuation(NamedTuple):
    ids: list[int]
    stopped: str
    """`length`: as long as asked; `context`: the context is full; `end`: the model ended the text."""


def generate(live: LiveSAE, asked: Generation, check: Check) -> dict[str, Any]:
    """The answer to POST api/generate: the prompt continued by the model as it is and by the steered one.

    Both draw with the same random numbers, so that what differs comes from the interventions. Probabilities are those
    at temperature 1, of each text under both models.

    Raises: Refused: 404 when the SAE has no such latent, 409 when the model does not predict the next token, 422 when
        the prompt is too long or the interventions lead to values that are not finite.
    """
    for number, each in enumerate(asked.interventions):
        check_latent(live, each.latent, f"body.interventions.{number}.latent")
    if not live.subject.causal:
        raise Refused(409, f"{live.model_name} does not predict the next token", "model", "Encode text instead")
    prompt = tokenize(live, asked.prompt, "body.prompt")
    if len(prompt) == live.max_tokens:
        raise Refused(422, f"it fills the context of {live.max_tokens} tokens", "body.prompt", "Send a shorter one")
    with torch.inference_mode():
        plain = _continue(live, prompt, asked, (), check)
        steered = _continue(live, prompt, asked, asked.interventions, check)
        same = plain.ids == steered.ids
        shown = {"plain": _scored(live, prompt, plain, (), asked.interventions)}
        check()
        shown["steered"] = _swapped(shown["plain"]) if same else _scored(live, prompt, steered, asked.interventions, ())
    pairs = list(zip(plain.ids, steered.ids, strict=False))
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    for continuation, other in (("plain", steered), ("steered", plain)):
        for i, token in enumerate(shown[continuation]["tokens"]):
            token["differs"] = i >= len(other.ids) or other.ids[i] != token["id"]
    return {
        "sae": asked.sae,
        "formula": FORMULA,
        "prompt": show_ids(live, prompt),
        **shown,
        "same": same,
        "first_difference": None if same else first,
        "largest_change": short(
            max(abs(t["probability"] - t["other"]) for side in shown.values() for t in side["tokens"])
        ),
    }


def steer(live: LiveSAE, act: Tensor, steered: Tensor, interventions: Interventions) -> Tensor:
    """Activations with the interventions applied.

    Args:
        act: [..., T, d_in]
        steered: positions where they apply, but at attention sinks. [T] bool

    Returns: [..., T, d_in] float32
    """
    x = act.float()
    latents = torch.tensor([each.latent for each in interventions])
    before = live.sae.encode(x)[..., latents]
    columns = []
    for column, each in zip(before.unbind(-1), interventions, strict=True):
        match each.mode:
            case "clamp":
                columns.append(torch.full_like(column, each.value or 0.0))
            case "scale":
                columns.append(column * (each.value or 0.0))
            case "ablate":
                columns.append(torch.zeros_like(column))
    change = (torch.stack(columns, dim=-1) - before) * (steered & live.left_out.is_within(x))[..., None]
    return x + change @ live.sae.W_dec[latents]


def _continue(
    live: LiveSAE, prompt: tuple[int, ...], asked: Generation, interventions: Interventions, check: Check
) -> _Continuation:
    """Draw tokens one by one, keeping the attention's keys and values where the model can."""
    room = live.max_tokens - len(prompt)
    draws = philox("generate", asked.seed).random(asked.n_tokens)
    ends = {live.separator, live.subject.tokenizer.eos_token_id} - {None}
    ids: list[int] = []
    fed, cache = list(prompt), None
    for draw in draws[:room]:
        check()
        result = _run(live, fed, interventions, past_key_values=cache, use_cache=True)
        token = _draw(result.logits[0, -1], asked.temperature, float(draw))
        ids.append(token)
        if token in ends:
            return _Continuation(ids, "end")
        cache = getattr(result, "past_key_values", None)
        fed = [*prompt, *ids] if cache is None else [token]
    return _Continuation(ids, "length" if len(ids) == asked.n_tokens else "context")


def _run(live: LiveSAE, ids: list[int], interventions: Interventions, **options: Any) -> Any:
    """The model's output for tokens that follow what its cache holds."""
    tokens = torch.tensor([ids])
    if not interventions:
        return live.subject.model(input_ids=tokens, **options)
    steered = seen(live, ids)
    with splice(live.subject.model, live.hook_point, lambda act: steer(live, act, steered, interventions)):
        return live.subject.model(input_ids=tokens, **options)


def _draw(logits: Tensor, temperature: float, uniform: float) -> int:
    """The likeliest token, or one by inverting the distribution function at `uniform`, tokens in order of id."""
    _check_finite(logits)
    if temperature == 0:
        return int(logits.argmax())
    wide = logits.double()
    cumulative = ((wide - wide.max()) / temperature).softmax(dim=0).cumsum(dim=0)
    drawn = torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)
    return min(int(drawn), len(logits) - 1)


def _scored(
    live: LiveSAE, prompt: tuple[int, ...], continuation: _Continuation, own: Interventions, other: Interventions
) -> dict[str, Any]:
    """A continuation as text and tokens, each with its probability under its own and the other model."""
    whole = [*prompt, *continuation.ids]
    tokens = show_ids(live, tuple(whole))[len(prompt) :]
    for name, interventions in (("probability", own), ("other", other)):
        logits = _run(live, whole[:-1], interventions, use_cache=False).logits[0, len(prompt) - 1 :]
        _check_finite(logits)
        chosen = torch.tensor(continuation.ids)[:, None]
        probabilities = logits.double().softmax(dim=-1).gather(1, chosen)[:, 0]
        for token, probability in zip(tokens, probabilities.tolist(), strict=True):
            token[name] = short(probability)
    text = b"".join(token_bytes(live.subject.tokenizer, continuation.ids)).decode(errors="replace")
    return {"text": text, "tokens": tokens, "stopped": continuation.stopped}


def _swapped(side: dict[str, Any]) -> dict[str, Any]:
    """The same text seen from the other model."""
    tokens = [token | {"probability": token["other"], "other": token["probability"]} for token in side["tokens"]]
    return side | {"tokens": tokens}


def _check_finite(logits: Tensor) -> None:
    if not torch.isfinite(logits).all():
        raise Refused(422, "the model's output is not finite", "body.interventions", "Use values nearer to zero")
