"""The packed linear layer: y = W x + b from the tensors that a `Layer` states, W never formed."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lrsd.errors import CheckpointError
from lrsd.forms.base import Shape, Tensors
from lrsd.forms.layer import Layer


class PackedLinear(nn.Module):
    """A linear layer (O, I) stored as `layer` says, its tensors as parameters of the same names."""

    bias: Tensor | None
    weight: Tensor

    def __init__(self, shape: Shape, layer: Layer, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.shape, self.layer = shape, layer
        self.in_features, self.out_features = shape.in_features, shape.out_features
        for name, spec in layer.tensors(shape).items():
            empty = torch.zeros(spec.size, dtype=spec.dtype or dtype)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        if not layer.bias:
            self.register_parameter("bias", None)
        self._decoded: dict[int, Tensors] = {}
        self._decoded_on: torch.device | None = None

    @classmethod
    def holding(cls, shape: Shape, layer: Layer, tensors: Mapping[str, Tensor]) -> "PackedLinear":
        """Around tensors that there are already."""
        with torch.device("meta"):
            packed = cls(shape, layer)
        packed.load_state_dict(tensors, assign=True)
        return packed

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.forward(self._tensors(), self.decoded(), x, self.shape)

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W as one (O, I) matrix, summed in float32."""
        if self.weight.is_meta:
            raise RuntimeError("weights are offloaded; export with `lrsd export --dense` instead")
        return self.layer.dense(self._tensors(), self.decoded(), self.shape).to(dtype)

    def decoded(self) -> Sequence[Tensors]:
        """What the terms read at a product; integers are decoded once and kept, a byte or more per weight.

        Raises: CheckpointError for damaged codes.
        """
        if self._decoded_on != self.weight.device:
            self._decoded, self._decoded_on = {}, self.weight.device
        tensors, free = self._tensors(), self.layer.free(self.shape)
        loaded = []
        for index, term in enumerate(self.layer.terms):
            if (known := self._decoded.get(index)) is None:
                try:
                    known = term.load(self.layer.part(term, tensors, self.shape), free)
                except ValueError as error:
                    raise CheckpointError(
                        f"the {term.name} part of a {self.out_features} x {self.in_features} layer cannot be "
                        f"read: {error}; the checkpoint is damaged: copy or compress it again"
                    ) from error
                if term.decodes:
                    self._decoded[index] = known
            loaded.append(known)
        return loaded

    def release_encoded(self) -> None:
        """Free what was decoded from: the layer still computes, but can no longer be saved or moved."""
        loaded = self.decoded()
        read = {id(tensor) for tensors in loaded for tensor in tensors.values()}
        for term in self.layer.terms:
            for name in term.tensors(self.layer.free(self.shape)) if term.decodes else ():
                parameter = self._parameters[name]
                if parameter is not None and id(parameter) not in read:
                    parameter.data = parameter.new_empty(0)

    def check(self, name: str) -> None:
        """Raises: CheckpointError if values contradict each other; what is offloaded is not looked at."""
        if any(parameter.is_meta for parameter in self.parameters()):
            return
        try:
            self.layer.check(self._tensors(), self.shape)
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}; it is damaged: copy or compress it again") from error

    def _tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._parameters.items() if tensor is not None}

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.layer.to_dict()}"
