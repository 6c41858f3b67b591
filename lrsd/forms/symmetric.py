"""Group-wise integers around zero, in the tensors of the compressed-tensors format ("pack-quantized")."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from lrsd.forms.base import Form, Shape, Spec, Specs, Tensors
from lrsd.numerics.blocks import BlockCodes, Grid
from lrsd.numerics.coding import pack_codes, unpack_codes


@dataclass(frozen=True, slots=True)
class Symmetric(Form):
    """Q_ij scale_ig with g = j // group, Q of `bits` bits around zero.

    | tensor        | size                         | what                                              |
    |---------------|------------------------------|---------------------------------------------------|
    | weight_packed | (O, ceil(I bits / 32)) int32 | Q + 2^(bits - 1), the first one in the lowest bits |
    | weight_scale  | (O, I / group)               | in the model's 16-bit type                        |
    | weight_shape  | (2,) int64                   | O, I                                              |
    """

    bits: int
    group: int
    name: ClassVar[str] = "symmetric"
    decodes: ClassVar[bool] = True
    encoded: ClassVar[tuple[str, ...]] = ("weight_packed",)

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 or self.group < 32 or self.group % 32:
            raise ValueError(f"codes of {self.bits} bits in groups of {self.group}; 2 to 8, multiples of 32")

    @property
    def grid(self) -> Grid:
        half = 2 ** (self.bits - 1)
        return Grid(tuple(range(-half, half)), self.group, self.group)

    @staticmethod
    def of(codes: BlockCodes) -> tuple["Symmetric", dict[str, Tensor]]:
        """codes: on the `grid` of some width and group."""
        form = Symmetric(len(codes.grid.levels).bit_length() - 1, codes.grid.group)
        values_OI = codes.codes_OI.to(torch.int16) + codes.grid.levels[0]
        tensors = form.encode({"codes": values_OI}, {}) | {"weight_scale": codes.steps_OB}
        return form, tensors | {"weight_shape": torch.tensor(codes.codes_OI.shape)}

    def tensors(self, shape: Shape) -> Specs:
        words = -(-shape.in_features * self.bits // 32)
        return {
            "weight_packed": Spec((shape.out_features, words), torch.int32),
            "weight_scale": Spec((shape.out_features, shape.in_features // self.group)),
            "weight_shape": Spec((2,), torch.int64),
        }

    def check(self, tensors: Tensors, shape: Shape) -> None:
        expected = [shape.out_features, shape.in_features]
        if shape.in_features % self.group or tensors["weight_shape"].tolist() != expected:
            raise ValueError(
                f"weight_shape is {tensors['weight_shape'].tolist()}, expected {expected} in groups of "
                f"{self.group}"
            )

    def load(self, tensors: Tensors, shape: Shape) -> Tensors:
        packed = tensors["weight_packed"].contiguous().view(torch.uint8).flatten()
        codes = unpack_codes(packed, self.bits, shape.out_features * shape.in_features)
        codes_OI = (codes - 2 ** (self.bits - 1)).to(torch.int8).view(shape.out_features, shape.in_features)
        return {"codes": codes_OI, "weight_scale": tensors["weight_scale"]}

    def encode(self, loaded: Tensors, tensors: Tensors) -> dict[str, Tensor]:
        # Groups of 32 fill whole words, so that no row begins within one.
        packed = pack_codes(loaded["codes"].int() + 2 ** (self.bits - 1), self.bits)
        return {"weight_packed": packed.view(torch.int32).view(loaded["codes"].shape[0], -1)}

    def forward(self, loaded: Tensors, x: Tensor, shape: Shape) -> Tensor:
        return linear(x, self.dense(loaded, shape).to(x.dtype))

    def dense(self, loaded: Tensors, shape: Shape) -> Tensor:
        scales_OG = loaded["weight_scale"].float()
        return (loaded["codes"].float().view(*scales_OG.shape, -1) * scales_OG[..., None]).flatten(1)

    def macs(self, shape: Shape) -> int:
        return shape.out_features * shape.in_features

    def describe(self) -> str:
        return f"{self.bits} bit codes"
