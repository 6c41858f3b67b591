"""Group-wise integer quantization: codes of a fixed width, a scale and a zero per row and group of
columns."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from lrsd.forms.base import Form, Shape, Spec, Specs, Tensors
from lrsd.numerics.coding import pack_codes, unpack_codes
from lrsd.numerics.rounding import GroupCodes


@dataclass(frozen=True, slots=True)
class Groupwise(Form):
    """(Q_ij - zero_ig) scale_ig with g = j // group, Q of `bits` bits.

    | tensor | size                         | what                                |
    |--------|------------------------------|-------------------------------------|
    | codes  | (ceil(O I bits / 8),) uint8  | row by row, the first one lowest    |
    | scales | (O, ceil(I / group))         | in the model's 16-bit type          |
    | zeros  | (ceil(O groups bits / 8),)   | packed like the codes               |
    """

    bits: int
    group: int
    name: ClassVar[str] = "groupwise"
    decodes: ClassVar[bool] = True
    encoded: ClassVar[tuple[str, ...]] = ("codes",)

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8 or self.group < 1:
            raise ValueError(f"codes of {self.bits} bits in groups of {self.group}; 1 to 8 and 1 or more")

    @staticmethod
    def of(codes: GroupCodes) -> tuple["Groupwise", dict[str, Tensor]]:
        tensors = {
            "codes": pack_codes(codes.codes_OI, codes.bits),
            "scales": codes.scales_OG,
            "zeros": pack_codes(codes.zeros_OG, codes.bits),
        }
        return Groupwise(codes.bits, codes.group), tensors

    def tensors(self, shape: Shape) -> Specs:
        groups = -(-shape.in_features // self.group)
        return {
            "codes": Spec((-(-shape.out_features * shape.in_features * self.bits // 8),), torch.uint8),
            "scales": Spec((shape.out_features, groups)),
            "zeros": Spec((-(-shape.out_features * groups * self.bits // 8),), torch.uint8),
        }

    def load(self, tensors: Tensors, shape: Shape) -> Tensors:
        scales = tensors["scales"]
        codes = unpack_codes(tensors["codes"], self.bits, shape.out_features * shape.in_features)
        return {
            "codes": codes.view(shape.out_features, shape.in_features).to(torch.uint8),
            "scales": scales,
            "zeros": unpack_codes(tensors["zeros"], self.bits, scales.numel())
            .view_as(scales)
            .to(torch.uint8),
        }

    def encode(self, loaded: Tensors, tensors: Tensors) -> dict[str, Tensor]:
        return {"codes": pack_codes(loaded["codes"], self.bits)}

    def forward(self, loaded: Tensors, x: Tensor, shape: Shape) -> Tensor:
        return linear(x, self.dense(loaded, shape).to(x.dtype))

    def dense(self, loaded: Tensors, shape: Shape) -> Tensor:
        codes = GroupCodes(loaded["codes"], loaded["scales"], loaded["zeros"], self.bits, self.group)
        return codes.dense()

    def macs(self, shape: Shape) -> int:
        return shape.out_features * shape.in_features

    def describe(self) -> str:
        return f"{self.bits} bit codes"
