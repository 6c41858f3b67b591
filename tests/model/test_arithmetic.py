"""Products of 16-bit matrices, widened where the CPU has no kernels for them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lrsd.model import arithmetic
from lrsd.model.arithmetic import WideProducts, fast_products
from lrsd.model.load import load_model
from lrsd.model.samples import Samples, run_model

NARROW = [torch.bfloat16, torch.float16]


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("widened", [2**24, 1000])
def test_products_are_rounded_once(
    dtype: torch.dtype, rows: int, widened: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever number of rows is widened at once; few rows are left to torch, which may round its sums."""
    monkeypatch.setattr(arithmetic, "_WIDENED", widened)
    x, weight, bias = (
        normal(*size, seed=len(size) + size[-1]).to(dtype) for size in ((2, rows, 48), (56, 48), (56,))
    )
    exact = x.double() @ weight.double().T
    ulp = torch.finfo(dtype).eps / 2 * (1 + 1e-3)
    with WideProducts():
        found = {
            "linear": (functional.linear(x, weight), exact),
            "bias": (functional.linear(x, weight, bias), exact + bias.double()),
            "named bias": (functional.linear(x, weight, bias=bias), exact + bias.double()),
            "addmm": (torch.addmm(bias, x[0], weight.T), (exact + bias.double())[0]),
            "matmul": (x @ weight.T, exact),
            "bmm": (torch.bmm(x, x.mT), x.double() @ x.double().mT),
        }
    for name, (product, expected) in found.items():
        assert product.dtype is dtype
        error = (product.double() - expected).abs()
        allowed = ulp * expected.abs() + 1e-5
        assert (error <= allowed).all() or 2 * rows < 8, name


def test_nothing_else_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    monkeypatch.setattr(Tensor, "float", lambda self: seen.append(self.dtype) or self.to(torch.float32))
    wide, narrow = normal(9, 9), normal(9, 9).bfloat16()
    with WideProducts():
        assert torch.equal(functional.linear(wide, wide), wide @ wide.T)
        assert (narrow + narrow).dtype is torch.bfloat16
        with pytest.raises(RuntimeError):
            functional.linear(wide, narrow)
    assert not seen
    functional.linear(narrow, narrow)
    assert not seen, "nothing is widened after the context"


@pytest.mark.parametrize("kernels", [True, False])
def test_a_model_is_widened_where_the_cpu_has_no_kernels(
    tiny_model_dir: Any, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    widened: list[int] = []
    plain = WideProducts.__torch_function__
    monkeypatch.setattr(WideProducts, "__torch_function__", lambda *args: widened.append(1) or plain(*args))
    monkeypatch.setattr(arithmetic, "has_kernels", lambda dtype: kernels)
    model = load_model(str(tiny_model_dir)).model
    run_model(model, Samples({"input_ids": torch.arange(12).reshape(1, 12)}))
    assert bool(widened) is not kernels


def test_float32_and_other_devices_need_nothing() -> None:
    assert not isinstance(fast_products(torch.float32, torch.device("cpu")), WideProducts)
    assert not isinstance(fast_products(torch.bfloat16, torch.device("meta")), WideProducts)
