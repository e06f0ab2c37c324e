"""Latents over HTTP against the model and the SAE by hand."""

from typing import Any

import numpy as np
import pytest
import torch

TEXT = "naïve: def"


def activations(model: Any, ids: list[int]) -> torch.Tensor:
    """[T, d_in], read with a hook of our own from a forward pass of the whole model."""
    seen = []
    handle = model.gpt_neox.layers[0].mlp.act.register_forward_hook(lambda _m, _a, output: seen.append(output[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0]


@pytest.fixture(scope="module")
def answer(server: Any) -> dict[str, Any]:
    found = server.post("latents", text=TEXT, sae="live", top=64)
    assert found.status == 200
    return found.json


def test_tokens_are_the_separator_and_the_texts_bytes(answer: dict[str, Any]) -> None:
    tokens = answer["tokens"]
    assert tokens[0]["id"] == 0
    assert not tokens[0]["seen"]
    assert len(tokens) == 1 + len(TEXT.encode())
    assert tokens[3]["shown"] == ["ï"]
    assert tokens[4]["shown"][0][0] == "⋯"


def test_latents_are_the_saes_code_of_the_models_activations(answer: dict[str, Any], served: Any) -> None:
    ids = [token["id"] for token in answer["tokens"]]
    expected = served.sae.encode(activations(served.model, ids))
    expected[0] = 0  # the SAE was not trained on the separator
    found = torch.zeros_like(expected)
    for row, token in enumerate(answer["tokens"]):
        values = [value for _, value in token["top"]]
        assert values == sorted(values, reverse=True)
        for latent, value in token["top"]:
            found[row, latent] = value
        assert token["n"] == int((expected[row] > 0).sum())
        assert token["total"] == pytest.approx(float(expected[row].sum()), rel=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    totals = {one["latent"]: one for one in answer["latents"]}
    assert list(totals) == sorted(totals, key=lambda latent: -float(expected[:, latent].sum()))
    for latent, one in totals.items():
        column = expected[:, latent]
        assert one["n_tokens"] == int((column > 0).sum())
        np.testing.assert_allclose([one["total"], one["max"]], [column.sum(), column.max()], rtol=1e-5)


def test_one_latent_is_the_same_column(answer: dict[str, Any], server: Any) -> None:
    latent = answer["latents"][0]["latent"]
    found = server.post("latent", text=TEXT, sae="live", latent=latent).json
    by_token = [dict(map(tuple, token["top"])).get(latent, 0) for token in answer["tokens"]]
    assert found["values"] == by_token
    assert [token["id"] for token in found["tokens"]] == [token["id"] for token in answer["tokens"]]


def test_only_the_strongest_are_listed(server: Any, answer: dict[str, Any]) -> None:
    found = server.post("latents", text=TEXT, sae="live", top=2).json
    assert [token["top"] for token in found["tokens"]] == [token["top"][:2] for token in answer["tokens"]]


def test_text_that_spells_a_special_token_stays_text(server: Any) -> None:
    text = "<|endoftext|>"
    found = server.post("latents", text=text, sae="live").json
    assert [token["id"] for token in found["tokens"]].count(0) == 1
    assert len(found["tokens"]) == 1 + len(text)


@pytest.mark.parametrize("text", ["<script>x", "\x00\x01", "\u202eabc", "'\"&", "{{7*7}}"])
def test_hostile_text_comes_back_as_text_and_chips(server: Any, text: str) -> None:
    found = server.post("latents", text=text, sae="live").json
    shown = [part for token in found["tokens"][1:] for part in token["shown"]]
    assert "".join(part for part in shown if isinstance(part, str)) == "".join(c for c in text if c.isprintable())
