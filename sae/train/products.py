"""Which library multiplies float32 matrices on the CPU, chosen by its error.

torch sends float32 products to BLAS (MKL, OpenBLAS). Where reduced precision is permitted for them, it asks oneDNN
instead, which makes use of that only on hardware that has it: elsewhere its products are float32 throughout, and on
some processors twice as fast as BLAS. Whether they are is probed, once per run.
"""

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch

ProductLibrary = Literal["blas", "onednn"]

MAX_ERROR = 2e-6
"""Relative, in the Frobenius norm. float32 products of this size err by 2e-7 to 5e-7, those of tf32 or bfloat16
inputs by 3e-4 and 2e-3."""

# One switch of torch, for oneDNN's matrix products alone; torch.set_float32_matmul_precision would also change CUDA.
_SWITCH = getattr(torch.backends.mkldnn, "matmul", None)


@contextlib.contextmanager
def products_by(library: ProductLibrary) -> Iterator[None]:
    """Inside, float32 products on the CPU are made by `library`; afterwards by whichever made them before."""
    if _SWITCH is None or not torch.backends.mkldnn.is_available():
        yield
        return
    before = _SWITCH.fp32_precision
    _SWITCH.fp32_precision = "bf16" if library == "onednn" else "ieee"
    try:
        yield
    finally:
        _SWITCH.fp32_precision = before


def probe_library(device: torch.device | str = "cpu") -> ProductLibrary:
    """oneDNN where its products are as accurate as float32 allows, else BLAS. Elsewhere than on the CPU: BLAS.

    A function of hardware and torch, not of time, so equal machines choose equally.
    """
    if torch.device(device).type != "cpu" or _SWITCH is None or not torch.backends.mkldnn.is_available():
        return "blas"
    a = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    b = torch.randn(512, 256, generator=torch.Generator().manual_seed(1))
    exact = a.double() @ b.double()
    with products_by("onednn"):
        error = torch.linalg.vector_norm(a @ b - exact) / torch.linalg.vector_norm(exact)
    return "onednn" if float(error) <= MAX_ERROR else "blas"
