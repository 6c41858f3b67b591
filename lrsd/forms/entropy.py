"""Entropy-coded scalar quantization as earlier releases stored it: integers of any size, a step per column.

Only read; `forms.trellis` has taken its place.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrsd.forms.base import Form, Shape, Spec, Specs, Tensors, check_coded
from lrsd.forms.kernels import integer_product, narrowest, wide_enough
from lrsd.numerics.coding import entropy_decode
from lrsd.numerics.rounding import column_steps


@dataclass(frozen=True, slots=True)
class Entropy(Form):
    """Q_ij 2^((exponent + steps_j) / 8), Q entropy coded into `stream` bytes.

    | tensor | size            | what                                                              |
    |--------|-----------------|-------------------------------------------------------------------|
    | codes  | (stream,) uint8 | Q column by column, columns of finer steps first, ties in order   |
    | steps  | (I,) uint8      | the columns' steps in eighths of an octave over the exponent      |
    """

    stream: int
    exponent: int = 0
    name: ClassVar[str] = "entropy"
    decodes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_coded(self.stream, self.exponent)

    def tensors(self, shape: Shape) -> Specs:
        return {
            "codes": Spec((self.stream,), torch.uint8),
            "steps": Spec((shape.in_features,), torch.uint8),
        }

    def load(self, tensors: Tensors, shape: Shape) -> Tensors:
        """Q (O, I) as int8 where it fits, and the steps (I,) in float32."""
        steps_I = tensors["steps"]
        sorted_IO = entropy_decode(tensors["codes"], shape.out_features * shape.in_features)
        sorted_IO = sorted_IO.view(shape.in_features, shape.out_features)
        codes_OI = sorted_IO[steps_I.argsort(stable=True).argsort()].T
        return {"codes": narrowest(codes_OI).contiguous(), "steps": column_steps(steps_I, self.exponent)}

    def forward(self, loaded: Tensors, x: Tensor, shape: Shape) -> Tensor:
        # Steps go onto x: codes are small integers, exact in 16 bit.
        wide = wide_enough(x.dtype)
        return integer_product(x.to(wide) * loaded["steps"].to(wide), loaded["codes"]).to(x.dtype)

    def dense(self, loaded: Tensors, shape: Shape) -> Tensor:
        return loaded["codes"].float() * loaded["steps"]

    def macs(self, shape: Shape) -> int:
        return shape.out_features * shape.in_features

    def describe(self) -> str:
        return "entropy codes"
