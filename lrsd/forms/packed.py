"""The packed linear layer: y = W x + b from the tensors that a `Layer` states, W never formed."""

from collections.abc import Mapping, Sequence
from typing import Any

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
        """What the terms read at a product; integers are decoded once and kept, about a byte per weight.

        Raises: CheckpointError for damaged codes.
        """
        tensors, free = self._tensors(), self.layer.free(self.shape)
        loaded = []
        for index, term in enumerate(self.layer.terms):
            known = self._decoded.get(index)
            if known is None or next(iter(known.values())).device != self.weight.device:
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

    def resident_bytes(self) -> int:
        """What the layer holds in memory: parameters, which may be mapped from a file of many, and
        the storages of what was decoded of them."""
        stored = {parameter.data_ptr(): parameter.nbytes for parameter in self.parameters()}
        decoded = [tensor for part in self._decoded.values() for tensor in part.values()]
        kept = {t.data_ptr(): t.untyped_storage().nbytes() for t in decoded if t.data_ptr() not in stored}
        return sum(stored.values()) + sum(kept.values())

    def forget(self) -> None:
        """Free what was decoded; it is decoded again when it is next used."""
        self._decoded = {}

    def forget_values(self) -> None:
        """The same of what is made of other values than integers, where these have changed."""
        terms = self.layer.terms
        self._decoded = {index: known for index, known in self._decoded.items() if terms[index].encoded}

    def release_encoded(self) -> None:
        """Decode, and free what was decoded from where it can be encoded again, as saving the layer does."""
        self.decoded()
        for name in (name for term in self.layer.terms for name in term.encoded):
            parameter = self._parameters[name]
            assert parameter is not None
            parameter.data = parameter.new_empty(0)

    def _encoded(self) -> dict[str, Tensor]:
        """Released tensors, made again."""
        tensors, found = self._tensors(), dict[str, Tensor]()
        for index, term in enumerate(self.layer.terms):
            if any(tensors[name].numel() == 0 for name in term.encoded) and index in self._decoded:
                found |= term.encode(self._decoded[index], self.layer.part(term, tensors, self.shape))
        return found

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self._encoded().items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        specs = self.layer.tensors(self.shape)
        if any(f"{prefix}{name}" in state_dict for name in specs):  # not those of an adapter alone
            released = self._encoded()
            for name, spec in specs.items():
                parameter = self._parameters[name]
                if parameter is not None and tuple(parameter.shape) != spec.size:
                    parameter.data = released.get(name, parameter.new_zeros(spec.size))
            self._decoded = {}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, *args: Any, **kwargs: Any) -> "PackedLinear":
        super()._apply(*args, **kwargs)
        if not self.weight.is_meta:
            for index, known in self._decoded.items():
                self._decoded[index] = self.layer.terms[index].moved(known, self.weight.device)
        return self

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
