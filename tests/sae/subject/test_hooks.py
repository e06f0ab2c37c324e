import pytest
import torch
from torch import nn

from sae.errors import InputError
from sae.store.storage.filesystem import Storage
from sae.subject.config import HFModel, HFModelSpec
from sae.subject.hooks import (
    capture,
    check_hook_points,
    direct_logit_matrix,
    hook_width,
    parse_hook_point,
    splice,
)
from sae.subject.huggingface import pin_subject, resolve_pin
from sae.subject.load import Subject, load_subject

POINTS = {
    "gpt_neox": ["gpt_neox.layers.0.mlp.act", "gpt_neox.layers.1", "layers.1.attention", "layers.1.mlp:input"],
    "gpt2": ["transformer.h.0.mlp", "transformer.h.1.mlp.act", "h.1:input", "transformer.h.1"],
    "llama": ["model.layers.1", "model.layers.0.mlp.down_proj:input", "layers.0.self_attn", "layers.1.mlp.act_fn"],
    "bert": ["bert.encoder.layer.1", "bert.encoder.layer.0.intermediate", "encoder.layer.0.attention"],
}
CASES = [(family, name) for family, names in POINTS.items() for name in names]


@pytest.fixture(scope="module")
def subject_of(model_folder, tmp_path_factory):
    def load(family: str) -> Subject:
        config = HFModel(name=str(model_folder(family)))
        spec = HFModelSpec(config=config, pinned=resolve_pin(config))
        storage = Storage(str(tmp_path_factory.mktemp("root")))
        pin_subject(storage, spec)
        return load_subject(storage, spec.ref)

    return load


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(5, 60, (3, 7), generator=torch.Generator().manual_seed(0))


def observed(model, name: str, tokens: torch.Tensor) -> torch.Tensor:
    """The activation by a plain hook in a full forward pass."""
    path, side = parse_hook_point(name)
    prefix = model.base_model_prefix + "."
    module = model.base_model.get_submodule(path.removeprefix(prefix))
    seen = []
    if side == "input":
        handle = module.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    else:
        handle = module.register_forward_hook(
            lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
    model(tokens)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_captured_activations_are_those_of_the_full_forward_pass(subject_of, tokens, family, name):
    model = subject_of(family).model
    with capture(model, [name]) as read:
        act = read(tokens)[name]
    assert torch.equal(act, observed(model, name, tokens))
    assert act.shape[-1] == hook_width(model, name)


@pytest.mark.parametrize("family", POINTS)
def test_several_hook_points_in_one_pass_equal_one_at_a_time(subject_of, tokens, family):
    model, names = subject_of(family).model, POINTS[family]
    with capture(model, names) as read:
        together = read(tokens)
        again = read(tokens)
    assert list(together) == names
    for name in names:
        with capture(model, [name]) as read:
            assert torch.equal(together[name], read(tokens)[name])
        assert torch.equal(together[name], again[name])


@pytest.mark.parametrize("family", POINTS)
def test_forward_pass_stops_after_the_last_hooked_layer(subject_of, tokens, family):
    model = subject_of(family).model
    layers = next(module for module in model.base_model.modules() if isinstance(module, nn.ModuleList))
    path = next(path for path, module in model.base_model.named_modules() if module is layers[0])
    ran = []
    handle = layers[1].register_forward_pre_hook(lambda *_: ran.append(1))
    with capture(model, [path]) as read:
        read(tokens)
    handle.remove()
    assert not ran


def test_hooks_are_gone_after_an_error(subject_of, tokens):
    model = subject_of("gpt_neox").model
    with pytest.raises(RuntimeError, match="stop"), capture(model, ["layers.0"]):
        raise RuntimeError("stop")
    assert all(not module._forward_hooks for module in model.modules())


def test_misspelt_hook_point_names_the_nearest(subject_of):
    with pytest.raises(InputError, match=r"Did you mean 'gpt_neox\.layers\.0\.mlp\.act'"):
        check_hook_points(subject_of("gpt_neox").model, ["gpt_neox.layers.0.mlp.atc"])


def test_hook_point_outside_the_base_model_is_refused(subject_of):
    with pytest.raises(InputError, match="not a module inside the base model"):
        check_hook_points(subject_of("gpt_neox").model, ["lm_head"])


@pytest.mark.parametrize("name", ["", "layers.0:outputs", ":input"])
def test_malformed_hook_point_is_refused(name):
    with pytest.raises(InputError, match="expected a module path"):
        parse_hook_point(name)


def test_hook_point_without_one_vector_per_token_is_refused(subject_of):
    with pytest.raises(InputError, match=r"expected \[batch, T, width\]"):
        hook_width(subject_of("gpt_neox").model, "gpt_neox.rotary_emb")


def test_activation_overwritten_in_place_is_refused(subject_of, tokens):
    model = subject_of("gpt_neox").model
    model.gpt_neox.layers[0].mlp.act = nn.ReLU(inplace=True)
    names = ["layers.0.mlp.dense_h_to_4h", "layers.0.mlp.act"]
    with torch.no_grad(), capture(model, names) as read, pytest.raises(InputError, match="in place"):
        read(tokens)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_splicing_the_same_activation_leaves_the_logits_unchanged(subject_of, tokens, family, name):
    model = subject_of(family).model
    clean = model(tokens).logits
    with splice(model, name, lambda act: act.clone()):
        assert torch.equal(model(tokens).logits, clean)
    with splice(model, name, lambda act: act + 1.0):
        assert not torch.allclose(model(tokens).logits, clean)
    assert torch.equal(model(tokens).logits, clean)


def test_spliced_activation_is_what_later_layers_see(subject_of, tokens):
    model = subject_of("gpt2").model
    other = torch.full((3, 7, 16), 0.5)
    with splice(model, "transformer.h.0", lambda act: other), capture(model, ["h.1:input"]) as read:
        assert torch.equal(read(tokens)["h.1:input"], other)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gpt_neox", "gpt_neox.layers.1.mlp.act"),
        ("gpt_neox", "gpt_neox.layers.1.mlp"),
        ("gpt_neox", "gpt_neox.layers.1"),
        ("gpt2", "transformer.h.1.mlp.act"),
        ("gpt2", "transformer.h.1.mlp.c_proj:input"),
        ("llama", "model.layers.1.mlp.down_proj:input"),
        ("llama", "model.layers.1"),
    ],
)
def test_direct_path_predicts_how_logits_change_in_the_last_layer(subject_of, tokens, family, name):
    """In the last layer the direct path is the only one: logits times the final norm's scale are linear in act."""
    model = subject_of(family).model.double()
    matrix = direct_logit_matrix(model, name)
    assert matrix is not None
    norm = {"gpt_neox": "final_layer_norm", "gpt2": "ln_f", "llama": "norm"}[family]
    module = model.base_model.get_submodule(norm)
    seen = []
    handle = module.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    acts = [torch.randn(3, 7, hook_width(model, name), dtype=torch.float64) for _ in range(2)]
    scaled = []
    for act in acts:
        with splice(model, name, lambda _, act=act: act):
            logits = model(tokens).logits
        residual = seen.pop()
        if isinstance(module, nn.LayerNorm):
            scale = (residual.var(-1, correction=0, keepdim=True) + module.eps).sqrt()
            constant = module.bias @ model.get_output_embeddings().weight.T
        else:
            scale = (residual.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt()
            constant = 0.0
        scaled.append((logits - constant) * scale)
    handle.remove()
    expected = (acts[0] - acts[1]) @ matrix.double()
    torch.testing.assert_close(scaled[0] - scaled[1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.0.mlp.act_fn"),  # multiplied by the up projection before it is projected
        ("gpt2", "transformer.h.0.ln_1"),
        ("llama", "model.layers.0.self_attn.q_proj"),
        ("gpt_neox", "layers.0.mlp:input"),
        ("bert", "bert.encoder.layer.1"),
    ],
)
def test_no_direct_path_where_there_is_none(subject_of, family, name):
    assert direct_logit_matrix(subject_of(family).model, name) is None
