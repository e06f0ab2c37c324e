"""A device that is not the CPU, on machines that have none: its tensors refuse to be mixed with the CPU's.

Its name is `pretend`. A tensor there is held by the CPU and computed by it, operation by operation, to the same bits;
but as on a GPU an operation with tensors of both devices is an error, and so is `.numpy()`. What a GPU allows is
allowed: copies from one device to the other, indices on the CPU, and single numbers of the CPU. Nothing is known of
streams and page-locked memory.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration

NAME = "pretend"
COPIES = ("aten::copy_", "aten::_to_copy", "aten::_copy_from")
TAKING_INDICES = ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")
_REGISTERED: list[torch.library.Library] = []
"""A library's registrations end with it."""


class MixedDevices(AssertionError):
    """What a GPU would refuse."""


@cache
def pretend_device() -> torch.device:
    """The device, which exists from the first call on: to be made before a process differentiates anything."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Absent(), hook=_AbsentHook())
    aten = torch.library.Library("aten", "IMPL")
    _REGISTERED.append(aten)
    # What is made there out of nothing comes down to these; the rest is done by `_compute`.
    aten.impl("empty.memory_format", _empty, "PrivateUse1")
    aten.impl("empty_strided", _empty_strided, "PrivateUse1")
    aten.impl("_copy_from", _copy_from, "PrivateUse1")
    return torch.device(NAME, 0)


class _Absent(backend_registration._DummyBackendModule):
    """So that nobody finds the device who does not name it."""

    def is_available(self) -> bool:
        return False

    def device_count(self) -> int:
        return 0


class _AbsentHook(backend_registration._DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return False


class PretendTensor(Tensor):
    """A tensor of the device.

    Attributes:
        held: what it is on the CPU.
        n_computed: operations on the device so far.
    """

    held: Tensor
    n_computed = 0
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "PretendTensor":
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What is made in inference mode is of another kind, which a wrapper cannot be.
        with torch.inference_mode(False), torch.no_grad():
            found = func.decompose(*args, **kwargs or {})  # that mode has not done it yet
            return found if found is not NotImplemented else _compute(func, args, kwargs or {})

    def numpy(self, *, force: bool = False) -> Any:
        raise MixedDevices("numpy() of a tensor that is not on the CPU")

    def tolist(self) -> Any:  # copies, from any device; torch has it for no subclass
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:
        return f"pretend({self.held!r})"


def _compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    tensors = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
    mixing = args if name in TAKING_INDICES else tensors
    devices = {each.device.type for each in mixing if isinstance(each, Tensor) and each.dim() > 0}
    if len(devices) > 1 and name not in COPIES:
        raise MixedDevices(f"{name}: tensors on {sorted(devices)}")
    if name == "aten::copy_":  # stays where it is, wherever that is
        _held(args[0]).copy_(_held(args[1]))
        return args[0]
    PretendTensor.n_computed += 1
    own = {id(each.held): each for each in tensors if isinstance(each, PretendTensor)}
    inner = {key: _mapped(_held, value) for key, value in kwargs.items()}
    if "device" in kwargs:
        inner["device"] = torch.device("cpu")
    found = func(*_mapped(_held, args), **inner)
    if torch.device(kwargs.get("device") or NAME).type != NAME:  # a copy, even though all is on the CPU
        return found.clone() if id(found) in own else found
    return _mapped(lambda each: own[id(each)] if id(each) in own else PretendTensor(each), found)


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    return type(value)(_mapped(function, each) for each in value) if type(value) in (tuple, list) else value


def _held(tensor: Tensor) -> Tensor:
    return tensor.held if isinstance(tensor, PretendTensor) else tensor


def _empty(size: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return PretendTensor(torch.empty(size, dtype=dtype))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return PretendTensor(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _held(target).copy_(_held(source))
    return target
