"""A module and its optimizer as named tensors, and back."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sae.errors import StoreError

_MOMENTS = ("exp_avg", "exp_avg_sq")


def named_tensor(tensors: Mapping[str, Tensor], name: str, like: Tensor | None = None) -> Tensor:
    """One tensor of a checkpoint. Raises: StoreError when it is missing, or has not shape and dtype of `like`."""
    found = tensors.get(name)
    if found is None:
        raise StoreError(f"it has no tensor {name}")
    if like is not None and (found.shape, found.dtype) != (like.shape, like.dtype):
        raise StoreError(f"its {name} is {found.dtype} {list(found.shape)}, not {like.dtype} {list(like.shape)}")
    return found


def module_tensors(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters, buffers, and the moments of an Adam that has taken a step with every parameter."""
    tensors = {f"module.{name}": tensor for name, tensor in _state(module).items()}
    for name, parameter in module.named_parameters():
        tensors |= {f"adam.{moment}.{name}": optimizer.state[parameter][moment] for moment in _MOMENTS}
    return tensors


@torch.no_grad()
def restore_module(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], step: int
) -> None:
    """Put back what `module_tensors` gave. Raises: StoreError when it does not fit; then nothing is changed."""
    state = {name: named_tensor(tensors, f"module.{name}", tensor) for name, tensor in _state(module).items()}
    moments = {
        name: {moment: named_tensor(tensors, f"adam.{moment}.{name}", parameter) for moment in _MOMENTS}
        for name, parameter in module.named_parameters()
    }
    for name, tensor in _state(module).items():
        tensor.copy_(state[name])
    for name, parameter in module.named_parameters():
        # Fresh tensors like those the optimizer makes: the ones read back are slices of one file.
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step), device=parameter.device),
            **{key: torch.empty_like(parameter).copy_(value) for key, value in moments[name].items()},
        }


def _state(module: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, shared ones once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
