"""A compressed module as a function of what is continuous in it: low-rank factors, kept values, scales,
biases, gains of norms. Integers, and the matrices that stayed dense, are constants.

Packed layers decode and multiply by kernels without derivatives; for as long as `trainable` lasts, modules
stand in for them that multiply as `forms.layer` says, in float32.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lrsd.forms.base import Form, Shape, Specs, Tensors
from lrsd.forms.packed import PackedLinear


@contextmanager
def trainable(module: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """The module in float32, its packed layers exchanged for functions of their continuous tensors.

    Yields: the continuous tensors by their names in the module, in float32 and to be differentiated by; all
        else is constant. When the context ends the module is as it was: `store` puts new values into it.
    """
    packed = {name: m for name, m in module.named_modules() if isinstance(m, PackedLinear)}
    within = {id(p) for layer in packed.values() for p in layer.parameters()}
    others = [p for p in module.parameters() if id(p) not in within]
    before = [(parameter, parameter.data, parameter.requires_grad) for parameter in others]
    buffers = [(m, name, b) for m in module.modules() for name, b in m._buffers.items() if b is not None]
    try:
        for name, layer in packed.items():
            module.set_submodule(name, Differentiable(layer))
        for parameter in others:
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.float32, copy=True)
        for owner, name, buffer in buffers:
            if buffer.is_floating_point():
                owner._buffers[name] = buffer.float()
        names = set(continuous(module))
        found = {name: p for name, p in module.named_parameters() if name in names}
        for parameter in found.values():
            parameter.requires_grad_(True)
        yield found
    finally:
        for name, layer in packed.items():
            module.set_submodule(name, layer)
        for parameter, data, required in before:
            parameter.data = data
            parameter.grad = None
            parameter.requires_grad_(required)
        for owner, name, buffer in buffers:
            owner._buffers[name] = buffer


def continuous(module: nn.Module) -> list[str]:
    """Names of the continuous tensors of a compressed module: of packed layers all that are stored in the
    model's own 16-bit type; of others gains, biases and scales, which are vectors. What has no values (the
    factors of no rank) is none."""
    found = []
    for owner, child in module.named_modules():
        stored = isinstance(child, PackedLinear | Differentiable)
        for name, parameter in child.named_parameters(recurse=False):
            kept = parameter.is_floating_point() and (stored or parameter.dim() == 1)
            if kept and parameter.numel():
                found.append(f"{owner}.{name}" if owner else name)
    return found


def store(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put values into the parameters of these names. Tensors mapped from files are not written to; what was
    made of the old values is forgotten."""
    for name, value in values.items():
        parameter = module.get_parameter(name)
        assert (parameter.shape, parameter.dtype) == (value.shape, value.dtype), name
        parameter.data = value.to(parameter.device)
        if isinstance(owner := module.get_submodule(name.rpartition(".")[0]), PackedLinear):
            owner.forget_values()


class Differentiable(nn.Module):
    """What stands in for a packed layer: the same sum of forms, its continuous tensors in float32.

    Integers are those that the layer has decoded; a term without continuous tensors is one constant matrix.
    """

    weight: Tensor

    def __init__(self, packed: PackedLinear) -> None:
        super().__init__()
        self.shape = packed.shape
        self.in_features, self.out_features = packed.in_features, packed.out_features
        specs, free = packed.layer.tensors(packed.shape), packed.layer.free(packed.shape)
        for name, spec in specs.items():
            tensor = getattr(packed, name).detach()
            if spec.dtype is None:
                wide = tensor.to(torch.float32, copy=True)
                self.register_parameter(name, nn.Parameter(wide, requires_grad=False))
            else:
                self.register_buffer(name, tensor, persistent=False)
        if not packed.layer.bias:
            self.register_parameter("bias", None)
        terms: list[Form] = []
        self._decoded: list[Tensors] = []
        for term, decoded in zip(packed.layer.terms, packed.decoded(), strict=True):
            mine = {name for name, spec in term.tensors(free).items() if spec.dtype is None}
            assert mine <= decoded.keys(), f"{term.name}: load must keep {mine} under their names"
            if not mine:
                terms.append(Constant())
                self._decoded.append({"dense": term.dense(decoded, free)})
                continue
            terms.append(term)
            self._decoded.append({name: tensor for name, tensor in decoded.items() if name not in mine})
        self._layer = replace(packed.layer, terms=tuple(terms))
        self._names = [
            {name for name, spec in term.tensors(free).items() if spec.dtype is None} for term in terms
        ]

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))  # so that all summands are of one type
        masters = {name: tensor for name, tensor in self._parameters.items() if tensor is not None}
        loaded = [
            {**decoded, **{name: masters[name] for name in names}}
            for decoded, names in zip(self._decoded, self._names, strict=True)
        ]
        tensors = {name: b for name, b in self._buffers.items() if b is not None} | masters
        return self._layer.forward(tensors, loaded, x, self.shape)


@dataclass(frozen=True, slots=True)
class Constant(Form):
    """A matrix that nothing is differentiated by. Never stored."""

    name: ClassVar[str] = "constant"

    def tensors(self, shape: Shape) -> Specs:
        return {}

    def forward(self, loaded: Tensors, x: Tensor, shape: Shape) -> Tensor:
        return linear(x, loaded["dense"])

    def dense(self, loaded: Tensors, shape: Shape) -> Tensor:
        return loaded["dense"]


def as_stored(masters: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """The masters' values in the types that they are stored in."""
    return {name: master.detach().to(dtypes[name], copy=True) for name, master in masters.items()}
