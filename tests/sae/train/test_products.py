import pytest
import torch

from sae.train import products
from sae.train.products import probe_library, products_by

SWITCH = getattr(torch.backends.mkldnn, "matmul", None)
needs_switch = pytest.mark.skipif(SWITCH is None, reason="this torch has no switch for oneDNN's products")


@needs_switch
@pytest.mark.parametrize("library", ["blas", "onednn"])
def test_the_setting_of_the_process_is_as_before_also_after_an_error(library: products.ProductLibrary) -> None:
    before = SWITCH.fp32_precision

    def fail() -> None:
        with products_by(library):
            assert SWITCH.fp32_precision != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert SWITCH.fp32_precision == before
    assert torch.get_float32_matmul_precision() == "highest"


@needs_switch
def test_a_setting_of_the_caller_does_not_reach_inside_and_is_put_back() -> None:
    before = SWITCH.fp32_precision
    SWITCH.fp32_precision = "bf16"
    try:
        with products_by("blas"):
            assert SWITCH.fp32_precision == "ieee"
        assert SWITCH.fp32_precision == "bf16"
    finally:
        SWITCH.fp32_precision = before


def test_the_probed_library_is_as_accurate_as_float32() -> None:
    a, b = torch.randn(300, 700), torch.randn(700, 200)
    exact = a.double() @ b.double()
    with products_by(probe_library()):
        found = a @ b
    assert float((found - exact).norm() / exact.norm()) < 2e-6


@needs_switch
def test_an_inaccurate_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded = torch.Tensor.__matmul__

    def coarse(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.dtype is torch.float32 and SWITCH.fp32_precision == "bf16":
            return rounded(a.bfloat16().float(), b.bfloat16().float())
        return rounded(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", coarse)
    assert probe_library() == "blas"


def test_elsewhere_than_on_the_cpu_nothing_is_probed() -> None:
    assert probe_library("meta") == "blas"


def test_without_the_switch_products_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_SWITCH", None)
    assert probe_library() == "blas"
    with products_by("onednn"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).tolist() == [[2, 2], [2, 2]]
