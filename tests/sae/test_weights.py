import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.architectures import SAE, BatchTopKConfig, SAEConfig, StandardConfig, TopKConfig, build_sae
from sae.errors import StoreError
from sae.weights import fold_decoder_norm, fold_input_scale, load_sae, read_weights, save_sae

CONFIGS = [
    StandardConfig(d_sae=11, l1_coefficient=0.1),
    StandardConfig(d_sae=11, l1_coefficient=0.1, decoder="free"),
    TopKConfig(d_sae=11, k=3),
    BatchTopKConfig(d_sae=11, k=3),
]


def _random(config: SAEConfig, dtype: torch.dtype = torch.float32) -> SAE:
    sae = build_sae(config, 5).to(dtype)
    generator = torch.Generator().manual_seed(3)
    for parameter in sae.parameters():
        parameter.data.normal_(generator=generator)
    for threshold in sae.buffers():
        threshold.fill_(0.3)
    return sae


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_saved_is_what_is_loaded(config: SAEConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    sae = _random(config, dtype)
    save_sae(sae, tmp_path)
    loaded = load_sae(tmp_path)
    assert loaded.config == config
    for name, parameter in sae.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
        assert loaded.get_parameter(name).dtype is dtype
    for name, buffer in sae.named_buffers():
        assert torch.equal(loaded.get_buffer(name), buffer)


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_an_interval_of_latents_is_loaded_alone(config: SAEConfig, tmp_path: Path) -> None:
    sae = _random(config)
    save_sae(sae, tmp_path)
    own = slice(4, 9)
    part = read_weights(tmp_path).sae(own)
    assert (part.d_sae, part.config) == (5, config)
    x = torch.randn(40, 5)
    torch.testing.assert_close(part.pre_acts(x), sae.pre_acts(x)[:, own])
    assert torch.equal(part.W_dec, sae.W_dec[own])
    assert part.W_enc.untyped_storage().nbytes() == 5 * 5 * 4, "others' weights are held in memory"
    assert all(torch.equal(buffer, sae.get_buffer(name)) for name, buffer in part.named_buffers())


def test_equal_weights_give_equal_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_sae(_random(CONFIGS[2]), tmp_path / name, {"hook_name": "layer.0", "model_name": "m"})
        contents.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1]
    assert sorted(contents[0]) == ["cfg.json", "sae.safetensors"]


def test_the_folder_says_what_other_libraries_ask_for(tmp_path: Path) -> None:
    sae = _random(CONFIGS[2])
    save_sae(sae, tmp_path, {"hook_name": "layer.0"})
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert cfg["architecture"] == "topk"
    assert (cfg["d_in"], cfg["d_sae"], cfg["k"], cfg["dtype"]) == (5, 11, 3, "float32")
    assert cfg["apply_b_dec_to_input"] is True
    assert cfg["normalize_activations"] == "none"
    assert cfg["metadata"]["hook_name"] == "layer.0"
    tensors = load_file(tmp_path / "sae.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "W_enc": (5, 11),
        "W_dec": (11, 5),
        "b_enc": (11,),
        "b_dec": (5,),
    }
    assert torch.equal(tensors["W_enc"].T, sae.W_enc)


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_the_folder_alone_decides_the_forward_pass_as_its_keys_say(config: SAEConfig, tmp_path: Path) -> None:
    sae = _random(config)
    save_sae(sae, tmp_path)
    cfg, t = json.loads((tmp_path / "cfg.json").read_text()), load_file(tmp_path / "sae.safetensors")
    x = torch.randn(40, 5)
    pre_acts = (x - t["b_dec"] if cfg["apply_b_dec_to_input"] else x) @ t["W_enc"] + t["b_enc"]
    latents = pre_acts.relu()
    if cfg["architecture"] == "jumprelu":
        latents *= pre_acts > t["threshold"]
    if cfg["architecture"] == "topk":
        latents[pre_acts < pre_acts.topk(cfg["k"]).values[:, -1:]] = 0
    torch.testing.assert_close(sae(x), latents @ t["W_dec"] + t["b_dec"])


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_folding_the_input_scale_changes_neither_latents_nor_reconstruction(config: SAEConfig) -> None:
    trained, folded = _random(config, torch.float64), _random(config, torch.float64)
    scale = 1 / 7.3
    fold_input_scale(folded, scale)
    x = torch.randn(40, 5, dtype=torch.float64) * 7 + 3
    torch.testing.assert_close(folded.encode(x), trained.encode(x * scale))
    torch.testing.assert_close(folded(x), trained(x * scale) / scale)


def test_folding_the_decoder_norm_makes_rows_unit_and_keeps_the_reconstruction() -> None:
    sae, folded = _random(CONFIGS[1], torch.float64), _random(CONFIGS[1], torch.float64)
    for each in (sae, folded):
        each.W_dec.data[4] = 0
    fold_decoder_norm(folded)
    x = torch.randn(40, 5, dtype=torch.float64)
    torch.testing.assert_close(folded(x), sae(x))
    norms = folded.W_dec.norm(dim=1)
    assert norms[4] == 0
    torch.testing.assert_close(norms[[0, 1, 10]], torch.ones(3, dtype=torch.float64))


def test_a_batch_topk_sae_is_a_jumprelu_of_one_threshold_to_other_libraries(tmp_path: Path) -> None:
    sae = _random(CONFIGS[3])
    save_sae(sae, tmp_path)
    cfg, tensors = json.loads((tmp_path / "cfg.json").read_text()), load_file(tmp_path / "sae.safetensors")
    assert cfg["architecture"] == "jumprelu"
    assert "k" not in cfg
    assert torch.equal(tensors["threshold"], torch.full((11,), 0.3))
    tensors["threshold"][4] = 0.2
    save_file(tensors, tmp_path / "sae.safetensors")
    with pytest.raises(StoreError, match=r"threshold of a BatchTopK SAE should hold one number 11 times.* 2 values"):
        load_sae(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cfg\.json.*no such file"):
        load_sae(tmp_path)
    save_sae(_random(CONFIGS[0]), tmp_path)
    (tmp_path / "sae.safetensors").unlink()
    with pytest.raises(StoreError, match="no such file"):
        load_sae(tmp_path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    save_sae(_random(CONFIGS[0]), tmp_path)
    data = (tmp_path / "sae.safetensors").read_bytes()
    (tmp_path / "sae.safetensors").write_bytes(data[:-10])
    with pytest.raises(StoreError, match="not an SAE"):
        load_sae(tmp_path)
    (tmp_path / "sae.safetensors").write_bytes(data)
    (tmp_path / "cfg.json").write_text("{}")
    with pytest.raises(StoreError, match="not an SAE"):
        load_sae(tmp_path)


def test_tensors_that_do_not_fit_the_config_are_named(tmp_path: Path) -> None:
    save_sae(_random(CONFIGS[0]), tmp_path)
    tensors = load_file(tmp_path / "sae.safetensors")
    tensors["W_dec"] = tensors["W_dec"][:-1].contiguous()
    save_file(tensors, tmp_path / "sae.safetensors")
    with pytest.raises(StoreError, match=r"W_dec should have the shape \(11, 5\).*\(10, 5\)"):
        load_sae(tmp_path)
