"""An SAE as a folder: `sae.safetensors` and `cfg.json`. Loading needs no training code.

Tensors and keys are those of SAELens: W_enc [d_in, d_sae] (transposed here and nowhere else), W_dec [d_sae, d_in],
b_enc [d_sae], b_dec [d_in]. BatchTopK is written as what it is at inference, a "jumprelu" with the same threshold
[d_sae] for every latent. The weights take the model's own activations: whatever scale the training used is folded in,
and `normalize_activations` is "none". Equal weights give equal bytes.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sae.architectures import SAE, SAEConfig, TopKConfig, build_sae
from sae.architectures.batch_topk import BatchTopKSAE
from sae.errors import StoreError

WEIGHTS_FILE = "sae.safetensors"
CONFIG_FILE = "cfg.json"
SAELENS_VERSION = "6.0.0"
"""The cfg.json layout written. SAELens converts what does not name a version >= 6.0.0-rc.0."""
DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SAELENS_NAMES = {"batch_topk": "jumprelu"}
"""Architecture -> SAELens's name for its inference rule, where the two differ."""

_SAE_CONFIG: TypeAdapter[SAEConfig] = TypeAdapter(SAEConfig)


@torch.no_grad()
def fold_decoder_norm(sae: SAE) -> None:
    """Give the rows of W_dec norm 1 by moving their norms into the encoder; x_hat stays as it is.

    Only for activations that scale with their input (ReLU). Rows of norm 0 are left alone.
    """
    norm = sae.W_dec.norm(dim=1)
    norm = torch.where(norm > 0, norm, torch.ones_like(norm))
    sae.W_dec.div_(norm[:, None])
    sae.W_enc.mul_(norm[:, None])
    sae.b_enc.mul_(norm)


@torch.no_grad()
def fold_input_scale(sae: SAE, scale: float) -> None:
    """Make an SAE trained on `scale * x` take x itself: the same latents, and x_hat in the units of x.

    Works with and without a pre-bias: (scale x - b_dec) W_enc^T = (x - b_dec / scale) (scale W_enc)^T.
    """
    sae.W_enc.mul_(scale)
    sae.W_dec.div_(scale)
    sae.b_dec.div_(scale)


def save_sae(sae: SAE, folder: str | os.PathLike[str], metadata: dict[str, Any] | None = None) -> None:
    """Write the SAE into a folder, which is made if it is not there.

    Args:
        metadata: what else cfg.json should say under `metadata`: `hook_name`, `model_name`, ... JSON values.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "W_enc": sae.W_enc.detach().T.contiguous().cpu(),
        "W_dec": sae.W_dec.detach().contiguous().cpu(),
        "b_enc": sae.b_enc.detach().contiguous().cpu(),
        "b_dec": sae.b_dec.detach().contiguous().cpu(),
    }
    if isinstance(sae, BatchTopKSAE):
        tensors["threshold"] = sae.threshold.expand(sae.d_sae).contiguous().cpu()
    config = {
        "architecture": _SAELENS_NAMES.get(sae.config.architecture, sae.config.architecture),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.subtracts_b_dec,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": None,
            "sae_config": sae.config.model_dump(mode="json"),
            **(metadata or {}),
        },
    }
    if isinstance(sae.config, TopKConfig):
        config["k"] = sae.config.k
        config["rescale_acts_by_decoder_norm"] = False
    save_file(tensors, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


class SavedWeights(NamedTuple):
    """What a folder holds. Of the tensors, which are the mapped file, only what is looked at is read."""

    config: SAEConfig
    d_in: int
    tensors: dict[str, Tensor]
    """Of every parameter and buffer of an SAE, by its name and in its shape."""

    def sae(self, latents: slice = slice(None)) -> SAE:
        """In memory. latents: an interval of them; the SAE then has fewer than its config says."""
        with torch.device("meta"):
            sae = build_sae(self.config, self.d_in)
        for name, tensor in self.tensors.items():
            own = tensor if name == "b_dec" or tensor.ndim == 0 else tensor[latents]
            own = torch.empty(own.shape, dtype=own.dtype).copy_(own)
            setattr(sae, name, nn.Parameter(own, requires_grad=False) if own.ndim else own)
        sae.d_sae = len(sae.b_enc)
        return sae


def load_sae(folder: Path, device: torch.device | str = "cpu") -> SAE:
    """Read what `save_sae` wrote, in the dtype it was saved in. Raises: as `read_weights`."""
    return read_weights(folder).sae().to(device)


def read_weights(folder: Path) -> SavedWeights:
    """What `save_sae` wrote, as far as it is looked at.

    Raises: StoreError when a file is missing, unreadable, or the tensors do not fit the config.
    """
    try:
        cfg = json.loads((folder / CONFIG_FILE).read_text())
        config, dtype = _SAE_CONFIG.validate_python(cfg["metadata"]["sae_config"]), DTYPES[cfg["dtype"]]
        with torch.device("meta"):
            sae = build_sae(config, cfg["d_in"])
        saved = load_file(folder / WEIGHTS_FILE)
    except FileNotFoundError as err:
        raise StoreError(f"{err.filename or folder}: no such file; an SAE is {CONFIG_FILE} and {WEIGHTS_FILE}") from err
    except (ValueError, KeyError, TypeError, ValidationError, SafetensorError) as err:
        raise StoreError(f"{folder}: not an SAE written by this project ({err!r})") from err
    saved["W_enc"] = saved["W_enc"].T if "W_enc" in saved else torch.empty(0)
    tensors = {}
    for name, parameter in sae.named_parameters():
        found = saved.get(name)
        if found is None or found.shape != parameter.shape:
            raise StoreError(
                f"{folder / WEIGHTS_FILE}: tensor {name} should have the shape {tuple(parameter.shape)} of cfg.json, "
                f"found {None if found is None else tuple(found.shape)}. The two files do not belong together."
            )
        tensors[name] = found.to(dtype)
    if isinstance(sae, BatchTopKSAE):
        tensors["threshold"] = _one_threshold(saved.get("threshold"), sae.d_sae, folder).to(dtype)
    return SavedWeights(config, sae.d_in, tensors)


def _one_threshold(threshold: Tensor | None, d_sae: int, folder: Path) -> Tensor:
    if threshold is None or threshold.shape != (d_sae,) or not bool((threshold == threshold[0]).all()):
        raise StoreError(
            f"{folder / WEIGHTS_FILE}: tensor threshold of a BatchTopK SAE should hold one number {d_sae} times, found "
            f"{'none' if threshold is None else f'shape {tuple(threshold.shape)}, {threshold.unique().numel()} values'}"
        )
    return threshold[0]
