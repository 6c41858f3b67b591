"""2:4 semi-structured sparsity: of every four neighboring columns two, row by row."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from lrsd.forms.base import Form, Shape, Spec, Specs, Tensors

# What torch's semi-structured kernels want of the sides of a weight in 16 bit.
_KERNEL_SIDES = 64


@dataclass(frozen=True, slots=True)
class SemiStructured(Form):
    """Two values of every four columns of a row, I a multiple of 8.

    | tensor      | size             | what                                                                 |
    |-------------|------------------|----------------------------------------------------------------------|
    | pair_values | (O, I / 2)       | the kept values, from left to right                                  |
    | pair_places | (O, I / 8) uint8 | of two fours each: place of the first value + 4 x that of the second, |
    |             |                  | the left four in the low half                                        |
    """

    name: ClassVar[str] = "semi_structured"
    decodes: ClassVar[bool] = True

    @staticmethod
    def of(values_OI: Tensor, mask_OI: Tensor) -> tuple["SemiStructured", dict[str, Tensor]]:
        """mask: two of every four set."""
        places_OQ2 = mask_OI.view(len(mask_OI), -1, 4).byte().topk(2, sorted=False).indices.sort().values
        fours_OQ = places_OQ2[..., 0] + 4 * places_OQ2[..., 1]
        tensors = {
            "pair_values": values_OI.view(len(mask_OI), -1, 4).gather(2, places_OQ2).flatten(1),
            "pair_places": fours_OQ[:, ::2] + 16 * fours_OQ[:, 1::2],
        }
        return SemiStructured(), tensors

    def tensors(self, shape: Shape) -> Specs:
        return {
            "pair_values": Spec((shape.out_features, shape.in_features // 2)),
            "pair_places": Spec((shape.out_features, shape.in_features // 8), torch.uint8),
        }

    def fits(self, shape: Shape) -> bool:
        return shape.in_features % 8 == 0

    def check(self, tensors: Tensors, shape: Shape) -> None:
        places_OQ2 = _places(tensors)
        if bool((places_OQ2[..., 0] >= places_OQ2[..., 1]).any()):
            raise ValueError("pair_places must be two ascending places of every four columns")

    def load(self, tensors: Tensors, shape: Shape) -> Tensors:
        return self.moved(tensors, tensors["pair_values"].device)

    def moved(self, loaded: Tensors, device: torch.device) -> Tensors:
        """On CUDA as torch's kernels read it too, where they take such sides."""
        stored = {name: tensor for name, tensor in loaded.items() if name != "sparse"}
        loaded = super(SemiStructured, self).moved(stored, device)
        if _kernel_reads(loaded["pair_values"]):
            return {**loaded, "sparse": torch.sparse.to_sparse_semi_structured(_whole(loaded))}
        return loaded

    def forward(self, loaded: Tensors, x: Tensor, shape: Shape) -> Tensor:
        # The kernels have no derivative.
        if "sparse" in loaded and x.dtype == loaded["sparse"].dtype and not x.requires_grad:
            return linear(x, loaded["sparse"])
        return linear(x, _whole(loaded).to(x.dtype))

    def dense(self, loaded: Tensors, shape: Shape) -> Tensor:
        return _whole(loaded).float()


def _kernel_reads(values: Tensor) -> bool:
    if not (values.device.type == "cuda" and torch.cuda.is_available()) or values.dtype.itemsize != 2:
        return False
    whole = values.shape[0] % _KERNEL_SIDES == 2 * values.shape[1] % _KERNEL_SIDES == 0
    return whole and torch.cuda.get_device_capability(values.device) >= (8, 0)


def _places(loaded: Tensors) -> Tensor:
    """(O, I / 4, 2) int64: which of its four columns each value is in."""
    bytes_OB = loaded["pair_places"]
    fours_OQ = torch.stack([bytes_OB % 16, bytes_OB // 16], -1).flatten(1)
    return torch.stack([fours_OQ % 4, fours_OQ // 4], -1).long()


def _whole(loaded: Tensors) -> Tensor:
    places_OQ2 = _places(loaded)
    values_OQ2 = loaded["pair_values"].view_as(places_OQ2)
    W_OQ4 = values_OQ2.new_zeros(*places_OQ2.shape[:2], 4)
    return W_OQ4.scatter(2, places_OQ2, values_OQ2).flatten(1)
