"""Losses with the SAE spliced in, against forwards done by hand on a tiny model."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from sae.architectures import build_sae
from sae.architectures.config import StandardConfig
from sae.evaluate import cross_entropy
from sae.evaluate.cross_entropy import measure_cross_entropy
from sae.store.text.contexts import PADDING, Contexts
from sae.store.text.left_out import LeftOut

HOOK_POINT = "gpt_neox.layers.0.mlp.act"
VOCAB, D_MLP, T = 30, 12, 9
SPECIAL = 0


@pytest.fixture(scope="module")
def model() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=D_MLP,
        max_position_embeddings=16,
        hidden_act="relu",
        use_cache=False,
    )
    model = GPTNeoXForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.5)
    return model


@pytest.fixture(scope="module")
def contexts() -> Contexts:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCAB, (7, T)).astype(np.int32)
    tokens[:, 0] = SPECIAL
    docs = np.zeros((7, T), np.int32)
    docs[2, 5:] = PADDING
    docs[6, 1:] = PADDING
    return Contexts(np.arange(7, dtype=np.int32), tokens, docs, None)


def identity_sae():
    """Reconstructs any non-negative activation exactly."""
    sae = build_sae(StandardConfig(d_sae=D_MLP, l1_coefficient=0), D_MLP)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(D_MLP))
        sae.W_dec.copy_(torch.eye(D_MLP))
    return sae


def naive_logits(model, contexts: Contexts, change) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per context the logits and the next tokens; `change(act [T, d], tokens [T])` edits the MLP's activations."""
    found = []
    for tokens, docs in zip(contexts.tokens, contexts.docs, strict=True):
        n = int((docs != PADDING).sum())
        ids = torch.from_numpy(tokens[:n].astype(np.int64))
        handle = model.gpt_neox.layers[0].mlp.act.register_forward_hook(
            lambda _m, _a, out, ids=ids: change(out[0].clone(), ids)[None]
        )
        logits = model(input_ids=ids[None]).logits[0]
        handle.remove()
        found.append((logits[:-1], ids[1:]))
    return found


def naive_losses(model, contexts: Contexts, change) -> list[list[float]]:
    """Per context the loss of every predicted token."""
    return [
        F.cross_entropy(logits, following, reduction="none").tolist()
        for logits, following in naive_logits(model, contexts, change)
    ]


def naive_activations(model, contexts: Contexts) -> list[torch.Tensor]:
    """The activation of every token that is no padding."""
    found = []
    naive_logits(model, contexts, lambda act, ids: found.extend(act) or act)
    return found


def where(value):
    """An edit that leaves special tokens as they are."""
    return lambda act, ids: torch.where((ids != SPECIAL)[:, None], value(act), act)


def random_sae():
    sae = build_sae(StandardConfig(d_sae=5, l1_coefficient=0), D_MLP)
    with torch.no_grad():
        sae.W_enc.normal_(generator=torch.Generator().manual_seed(1))
        sae.W_dec.normal_(generator=torch.Generator().manual_seed(2))
    return sae


@pytest.mark.parametrize("elements", [1 << 25, 3 * T * VOCAB])
def test_losses_equal_forwards_by_hand(model, contexts, elements: int, monkeypatch) -> None:
    monkeypatch.setattr(cross_entropy, "BATCH_ELEMENTS", elements)
    mean = np.linspace(0, 1, D_MLP)
    sae = random_sae()
    found = measure_cross_entropy(
        model, HOOK_POINT, sae, mean, contexts, LeftOut((SPECIAL,)), others={"half": lambda act: act / 2}
    )
    changes = {
        "clean": lambda act, ids: act,
        "sae": where(lambda act: sae(act).detach()),
        "zero": where(torch.zeros_like),
        "mean": where(lambda act: torch.from_numpy(mean).float().expand_as(act)),
        "half": where(lambda act: act / 2),
    }
    for variant, change in changes.items():
        expected = naive_losses(model, contexts, change)
        np.testing.assert_allclose(found.losses[variant], [sum(losses) for losses in expected], rtol=1e-4)
        assert found.n_targets.tolist() == [len(losses) for losses in expected]
        flat = [loss for losses in expected for loss in losses]
        assert found.mean(variant) == pytest.approx(np.mean(flat), rel=1e-4)
    means = [found.mean(variant) for variant in changes]
    assert len({round(value, 3) for value in means}) == 5


def test_attention_sinks_that_no_training_saw_keep_their_activations(model, contexts) -> None:
    norms = [float(act.norm()) for act in naive_activations(model, contexts)]
    limit = float(np.quantile(norms, 0.8))
    sae = random_sae()
    found = measure_cross_entropy(
        model, HOOK_POINT, sae, np.zeros(D_MLP), contexts, LeftOut((SPECIAL,), norm_limit=limit)
    )

    def change(act: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        chosen = (ids != SPECIAL) & (act.norm(dim=1) <= limit)
        return torch.where(chosen[:, None], sae(act).detach(), act)

    expected = naive_losses(model, contexts, change)
    np.testing.assert_allclose(found.losses["sae"], [sum(losses) for losses in expected], rtol=1e-4)
    everywhere = measure_cross_entropy(model, HOOK_POINT, sae, np.zeros(D_MLP), contexts, LeftOut((SPECIAL,)))
    assert everywhere.mean("sae") != pytest.approx(found.mean("sae"), rel=1e-3)


def test_a_perfect_sae_costs_nothing(model, contexts) -> None:
    found = measure_cross_entropy(model, HOOK_POINT, identity_sae(), np.zeros(D_MLP), contexts)
    np.testing.assert_allclose(found.losses["sae"], found.losses["clean"], rtol=1e-6)
    np.testing.assert_allclose(found.losses["zero"], found.losses["mean"], rtol=1e-6)
    np.testing.assert_allclose(found.kl["sae"], 0, atol=1e-5)
    np.testing.assert_allclose(found.bin_increase, 0, atol=1e-5)


def test_the_model_is_left_as_it_was(model, contexts) -> None:
    before = measure_cross_entropy(model, HOOK_POINT, identity_sae(), np.zeros(D_MLP), contexts)
    after = measure_cross_entropy(model, HOOK_POINT, identity_sae(), np.zeros(D_MLP), contexts)
    np.testing.assert_array_equal(before.losses["clean"], after.losses["clean"])
    assert not model.gpt_neox.layers[0].mlp.act._forward_hooks


def test_divergence_equals_torchs_from_the_untouched_distribution(model, contexts, monkeypatch) -> None:
    monkeypatch.setattr(cross_entropy, "BATCH_ELEMENTS", 3 * T * VOCAB)
    sae = random_sae()
    found = measure_cross_entropy(model, HOOK_POINT, sae, np.zeros(D_MLP), contexts, LeftOut((SPECIAL,)))
    clean = naive_logits(model, contexts, lambda act, ids: act)
    for variant, value in (("sae", lambda act: sae(act).detach()), ("zero", torch.zeros_like)):
        changed = naive_logits(model, contexts, where(value))
        expected = [
            float(F.kl_div(b.log_softmax(1), a.log_softmax(1), log_target=True, reduction="sum"))
            for (a, _), (b, _) in zip(clean, changed, strict=True)
        ]
        np.testing.assert_allclose(found.kl[variant], expected, rtol=1e-3, atol=1e-5)
        assert found.mean_kl(variant) == pytest.approx(sum(expected) / found.n_targets.sum(), rel=1e-3)
    assert found.mean_kl("zero") > 0.01


def test_increase_by_position_equals_a_plain_loop(model, contexts) -> None:
    sae = random_sae()
    edges = np.array([0, 1, 4, T])
    found = measure_cross_entropy(
        model, HOOK_POINT, sae, np.zeros(D_MLP), contexts, LeftOut((SPECIAL,)), position_edges=edges
    )
    clean = naive_losses(model, contexts, lambda act, ids: act)
    spliced = naive_losses(model, contexts, where(lambda act: sae(act).detach()))
    for i, (before, after) in enumerate(zip(clean, spliced, strict=True)):
        increase, targets = np.zeros(3), np.zeros(3)
        for position in range(len(before)):
            place = 0 if position < 1 else 1 if position < 4 else 2
            increase[place] += after[position] - before[position]
            targets[place] += 1
        np.testing.assert_allclose(found.bin_increase[i], increase, rtol=1e-3, atol=1e-5)
        np.testing.assert_array_equal(found.bin_targets[i], targets)
