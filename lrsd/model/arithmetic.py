"""Products of 16-bit matrices on CPUs that have no instructions for them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lrsd.forms.kernels import has_kernels

# Below so many rows torch's own loop is as fast as widening the weight.
_FEW_ROWS = 8
# Weights widened at once.
_WIDENED = 2**24


class WideProducts(TorchFunctionMode):
    """Products of 16-bit matrices on a CPU are computed in float32 and rounded once, as kernels for 16 bit
    do, for as long as the context lasts. Where a CPU has no such kernels torch sums a dot product term by
    term, six to fourteen times as slowly.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and torch.is_grad_enabled():
            return _widened(func, args, kwargs)
        factors = [arg for arg in (*args, kwargs.get("bias")) if arg is not None]
        others = kwargs.keys() - {"bias"}
        if func not in _PRODUCTS or others or not all(_is_narrow(factor) for factor in factors):
            return func(*args, **kwargs)
        dtype = factors[0].dtype
        if func is not functional.linear:
            return func(*(factor.float() for factor in factors)).to(dtype)
        x, weight, *bias = factors
        if x.numel() < _FEW_ROWS * x.shape[-1]:
            return func(*factors)
        wide, rows = x.float(), max(1, _WIDENED // weight.shape[1])
        parts = zip(weight.split(rows), *(b.split(rows) for b in bias), strict=True)
        products = [func(wide, *(t.float() for t in part)).to(dtype) for part in parts]
        return products[0] if len(products) == 1 else torch.cat(products, -1)


def _widened(func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """In float32: the derivative of attention in 16 bit takes seven times as long as that in float32."""
    narrow = [arg.dtype for arg in (*args, *kwargs.values()) if _is_narrow(arg)]
    args = tuple(arg.float() if _is_narrow(arg) else arg for arg in args)
    kwargs = {name: arg.float() if _is_narrow(arg) else arg for name, arg in kwargs.items()}
    found = func(*args, **kwargs)
    return found.to(narrow[0]) if narrow else found


_PRODUCTS = (functional.linear, torch.addmm, torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__)


def _is_narrow(argument: Any) -> bool:
    return (
        isinstance(argument, Tensor)
        and argument.device.type == "cpu"
        and argument.dtype in (torch.bfloat16, torch.float16)
    )


def fast_products(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """What a model of that type on that device is to be run in: `WideProducts` where there are no kernels."""
    return WideProducts() if device.type == "cpu" and not has_kernels(dtype) else nullcontext()
