"""Steered text against a loop that runs the whole model again for every token, with hooks of its own."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from sae.serve.bodies import Generation, Intervention
from sae.serve.generate import generate
from sae.serve.live import load_live
from sae.serve.refusals import Refused

PROMPT = "abc"


def forward(served: Any, ids: list[int], interventions: list[dict[str, Any]]) -> torch.Tensor:
    """Logits [T, vocab] with x' = x + (f' - f) W_dec at every position but the separator's."""

    def steer(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        for row, token in enumerate(ids):
            if token == 0:
                continue
            latents = served.sae.encode(output[0, row])
            for one in interventions:
                before = latents[one["latent"]]
                after = {"clamp": one.get("value"), "scale": before * (one.get("value") or 0), "ablate": 0}[one["mode"]]
                changed[0, row] += (after - before) * served.sae.W_dec[one["latent"]]
        return changed

    handle = served.model.gpt_neox.layers[0].mlp.act.register_forward_hook(steer)
    with torch.no_grad():
        logits = served.model(input_ids=torch.tensor([ids])).logits[0]
    handle.remove()
    return logits


def greedy(served: Any, prompt: list[int], n: int, interventions: list[dict[str, Any]]) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(forward(served, ids, interventions)[-1].argmax()))
        if ids[-1] == 0:
            break
    return ids[len(prompt) :]


def probabilities(served: Any, prompt: list[int], ids: list[int], interventions: list[dict[str, Any]]) -> list[float]:
    whole = forward(served, [*prompt, *ids], interventions).softmax(dim=-1)
    return [float(whole[len(prompt) + i - 1, token]) for i, token in enumerate(ids)]


def ids_of(tokens: list[dict[str, Any]]) -> list[int]:
    return [token["id"] for token in tokens]


@pytest.fixture(scope="module")
def strongest(server: Any) -> list[int]:
    """The latents that fire most on the prompt."""
    return [one["latent"] for one in server.post("latents", text=PROMPT, sae="live").json["latents"]]


@pytest.mark.parametrize(
    "modes",
    [[("ablate", None)], [("clamp", 9.0)], [("scale", 3.0)], [("ablate", None), ("clamp", -2.0), ("scale", 0.5)]],
    ids=lambda modes: "+".join(mode for mode, _ in modes),
)
def test_steered_text_equals_the_naive_computation(
    served: Any, server: Any, strongest: list[int], modes: list[tuple[str, float | None]]
) -> None:
    asked = [
        {"latent": latent, "mode": mode} | ({} if value is None else {"value": value})
        for latent, (mode, value) in zip(strongest, modes, strict=False)
    ]
    found = server.post("generate", prompt=PROMPT, sae="live", n_tokens=8, interventions=asked).json
    prompt = ids_of(found["prompt"])
    for side, own, other in (("plain", [], asked), ("steered", asked, [])):
        ids = ids_of(found[side]["tokens"])
        assert ids == greedy(served, prompt, 8, own)
        for name, used in (("probability", own), ("other", other)):
            listed = [token[name] for token in found[side]["tokens"]]
            np.testing.assert_allclose(listed, probabilities(served, prompt, ids, used), rtol=1e-4)
    assert found["largest_change"] > 1e-4


def test_differing_tokens_are_marked(server: Any, strongest: list[int]) -> None:
    asked = [{"latent": strongest[0], "mode": "clamp", "value": 100.0}]
    found = server.post("generate", prompt=PROMPT, sae="live", n_tokens=8, interventions=asked).json
    plain, steered = (ids_of(found[side]["tokens"]) for side in ("plain", "steered"))
    assert plain != steered
    assert not found["same"]
    for side, own, other in (("plain", plain, steered), ("steered", steered, plain)):
        expected = [i >= len(other) or own[i] != other[i] for i in range(len(own))]
        assert [token["differs"] for token in found[side]["tokens"]] == expected
        assert expected.index(True) == found["first_difference"]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_scaling_by_one_changes_nothing(server: Any, strongest: list[int], temperature: float) -> None:
    asked = [{"latent": latent, "mode": "scale", "value": 1.0} for latent in strongest[:3]]
    found = server.post(
        "generate", prompt=PROMPT, sae="live", n_tokens=10, temperature=temperature, seed=3, interventions=asked
    ).json
    assert found["same"]
    assert found["largest_change"] == 0
    assert found["plain"] == found["steered"]


def test_clamping_to_its_own_activation_changes_nothing(server: Any) -> None:
    """The SAE's error stays: with its reconstruction in place of x, the probabilities would move."""
    latent, value = server.post("latents", text="a", sae="live").json["tokens"][1]["top"][0]
    asked = {"prompt": "a", "sae": "live", "n_tokens": 1}
    own = server.post("generate", **asked, interventions=[{"latent": latent, "mode": "clamp", "value": value}]).json
    assert own["same"]
    assert own["largest_change"] < 1e-6
    none = server.post("generate", **asked, interventions=[{"latent": latent, "mode": "ablate"}]).json
    assert none["largest_change"] > 1e-4


def test_samples_are_a_function_of_the_seed(server: Any, strongest: list[int]) -> None:
    asked = [{"latent": strongest[0], "mode": "ablate"}]
    texts = []
    for seed in (1, 1, 2, 3):
        found = server.post(
            "generate", prompt=PROMPT, sae="live", n_tokens=10, temperature=1.0, seed=seed, interventions=asked
        )
        texts.append(found.body)
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_text_ends_where_the_context_does(server: Any) -> None:
    asked = [{"latent": 0, "mode": "scale", "value": 1.0}]
    found = server.post("generate", prompt=PROMPT, sae="live", n_tokens=256, interventions=asked).json
    assert found["plain"]["stopped"] in ("context", "end")
    assert len(found["prompt"]) + len(found["plain"]["tokens"]) <= 16
    full = server.post("generate", prompt="x" * 15, sae="live", interventions=asked)
    assert full.status == 422
    assert "fills the context" in full.json["error"]["what"]


def test_a_model_that_does_not_predict_the_next_token_is_not_steered(served: Any) -> None:
    one = load_live(served.storage, served.record).saes["live"]
    encoder = dataclasses.replace(one, subject=dataclasses.replace(one.subject, causal=False))
    asked = Generation(prompt="a", sae="live", interventions=(Intervention(latent=1, mode="ablate"),))
    with pytest.raises(Refused, match="does not predict the next token") as refused:
        generate(encoder, asked, lambda: None)
    assert refused.value.status == 409


def test_an_empty_prompt_is_the_start_of_a_document_where_nothing_is_steered_yet(server: Any) -> None:
    asked = [{"latent": 0, "mode": "clamp", "value": 100.0}]
    found = server.post("generate", prompt="", sae="live", n_tokens=1, interventions=asked).json
    assert ids_of(found["prompt"]) == [0]
    assert found["largest_change"] == 0, "the separator keeps its activations"
    longer = server.post("generate", prompt="", sae="live", n_tokens=4, interventions=asked).json
    assert longer["largest_change"] > 1e-4
