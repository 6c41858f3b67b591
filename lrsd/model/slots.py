"""Where a linear weight lives in a model, and which way round it is stored there: read, write, swap, pack."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lrsd.forms.base import Shape
from lrsd.forms.layer import Layer
from lrsd.forms.packed import PackedLinear
from lrsd.work.onloading import compute_device


class WeightSlot:
    """The weight of one nn.Linear, by the name of its module; (O, I) whatever way it is stored."""

    transposed: ClassVar[bool] = False

    def __init__(self, model: nn.Module, name: str) -> None:
        self._model, self.name = model, name

    @property
    def module(self) -> nn.Module:
        return self._model.get_submodule(self.name)

    @property
    def parameter(self) -> nn.Parameter:
        parameter = self.module.weight
        assert isinstance(parameter, nn.Parameter)
        return parameter

    @property
    def shape(self) -> Shape:
        return Shape(*self._turned(self.parameter).shape)

    @property
    def bias(self) -> Tensor | None:
        bias = self.module.bias
        return bias.detach().to(compute_device(self._model)) if isinstance(bias, Tensor) else None

    def read(self) -> Tensor:
        """(O, I) float32 where the model runs."""
        return self._turned(self.parameter).detach().to(compute_device(self._model)).float()

    def write(self, W_OI: Tensor, bias_O: Tensor | None = None) -> None:
        """Put another weight in place, in the type of the old one; and another bias, where one is given."""
        old = self.parameter
        self._put(self._turned(W_OI).to(old.device, old.dtype).contiguous())
        if bias_O is not None:
            self.module.bias = nn.Parameter(bias_O.to(old.device, old.dtype), requires_grad=False)

    @contextmanager
    def swapped(self, W_OI: Tensor, dtype: torch.dtype | None = None) -> Iterator[None]:
        """Another weight in place for as long as the context lasts."""
        module, original = self.module, self.parameter
        self._put(self._turned(W_OI).to(original.device, dtype or original.dtype).contiguous())
        try:
            yield
        finally:
            module.weight = original

    @contextmanager
    def paged(self, read: Callable[[], Tensor]) -> Iterator[None]:
        """A weight that is read whenever the layer runs, and in memory no longer than that."""
        module, original = self.module, self.parameter

        def enter(module: nn.Module, args: Any) -> None:
            self.write(read())

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            module.weight = original

        hooks = module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def pack(self, layer: Layer, tensors: Mapping[str, Tensor]) -> None:
        """Put a packed layer in the place of the module."""
        self._model.set_submodule(self.name, PackedLinear.holding(self.shape, layer, tensors))

    def pack_empty(self, layer: Layer) -> None:
        """The same before there are tensors."""
        self._model.set_submodule(self.name, PackedLinear(self.shape, layer, self.parameter.dtype))

    def _put(self, stored: Tensor) -> None:
        self.module.weight = nn.Parameter(stored, requires_grad=False)

    def _turned(self, weight: Tensor) -> Tensor:
        """Between (O, I) and what is stored, either way."""
        return weight


class Conv1DSlot(WeightSlot):
    """The weight of a Conv1D, stored as (I, O)."""

    transposed = True

    def _turned(self, weight: Tensor) -> Tensor:
        return weight.T


# Whether modules of a class with a forward of its own are linear layers, as far as it was asked for.
_LINEAR: dict[type[nn.Module], bool] = {}
# By the class of the module that holds the weight.
SLOTS: dict[type[nn.Module], type[WeightSlot]] = {nn.Linear: WeightSlot, Conv1D: Conv1DSlot}


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by its weight, adds its bias, and does nothing else. A subclass with a
    forward of its own is tried: routers give more than the product, Falcon's layers do not."""
    for kind in SLOTS:
        if isinstance(module, kind):
            cls = type(module)
            if cls.forward is kind.forward:
                return True
            if cls not in _LINEAR:
                _LINEAR[cls] = _only_multiplies(module, kind)
            return _LINEAR[cls]
    return False


def _only_multiplies(module: Any, kind: type[nn.Module]) -> bool:
    """Whether it gives what the class that it derives from gives. It must have its weights."""
    inputs = module.weight.shape[0 if kind is Conv1D else 1]
    x = torch.linspace(-1, 1, 2 * inputs).view(2, inputs).to(module.weight)
    try:
        with torch.no_grad():
            found, expected = type(module).forward(module, x), kind.forward(module, x)
    except Exception:  # it wants something else
        return False
    alike = isinstance(found, Tensor) and found.shape == expected.shape
    return alike and torch.allclose(found.float(), expected.float(), rtol=0.02, atol=0.02)


def weight_slot(model: nn.Module, name: str) -> WeightSlot:
    """Raises: KeyError if that is no linear layer."""
    module = model.get_submodule(name)
    for kind, slot in SLOTS.items():
        if isinstance(module, kind):
            return slot(model, name)
    raise KeyError(f"{name} is a {type(module).__name__}, no linear layer")


def dense_linear(packed: PackedLinear, dtype: torch.dtype) -> nn.Module:
    """The nn.Linear that a packed layer is equivalent to, or the Conv1D where the model has those."""
    dense: nn.Module = (
        Conv1D(packed.out_features, packed.in_features) if packed.layer.transposed
        else nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None)
    )  # fmt: skip
    weight = packed.dense_weight(dtype)
    dense.weight = nn.Parameter(
        weight.T.contiguous() if packed.layer.transposed else weight, requires_grad=False
    )
    if packed.bias is not None:
        dense.bias = nn.Parameter(packed.bias.to(dtype), requires_grad=False)
    return dense
