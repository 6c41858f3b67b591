"""Low rank whose two factors are integers."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from lrsd.forms.base import Form, Shape, Spec, Specs, Tensors
from lrsd.numerics.coding import pack_codes, unpack_codes

WIDTHS = (4, 8)


@dataclass(frozen=True, slots=True)
class CodedLowRank(Form):
    """L = sum_r left_r scale_r right_r^T, both factors integers of `bits` bits around zero.

    | tensor      | size                        | what                                       |
    |-------------|-----------------------------|--------------------------------------------|
    | left_codes  | (ceil(O r bits / 8),) uint8 | (O, r) codes + 2^(bits - 1), row by row    |
    | right_codes | (ceil(r I bits / 8),) uint8 | (r, I) codes + 2^(bits - 1), row by row    |
    | rank_scales | (r,) float32                | steps of the two factors, multiplied       |
    """

    rank: int
    bits: int
    name: ClassVar[str] = "coded_low_rank"
    decodes: ClassVar[bool] = True
    encoded: ClassVar[tuple[str, ...]] = ("left_codes", "right_codes")

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS or (isinstance(self.rank, int) and self.rank < 1):
            raise ValueError(f"rank {self.rank} in {self.bits} bits; 1 or more, 4 or 8")

    @staticmethod
    def of(U_OR: Tensor, V_RI: Tensor, bits: int) -> tuple["CodedLowRank", dict[str, Tensor]]:
        """L = U V, both factors rounded to the nearest, their largest value being the largest integer."""
        form, top = CodedLowRank(U_OR.shape[1], bits), 2 ** (bits - 1) - 1
        left_R = _steps(U_OR.T.double(), top)
        right_R = _steps(V_RI.double(), top)
        codes = {
            "left": (U_OR.double() / left_R).round().to(torch.int8),
            "right": (V_RI.double() / right_R[:, None]).round().to(torch.int8),
        }
        return form, form.encode(codes, {}) | {"rank_scales": (left_R * right_R).float()}

    def tensors(self, shape: Shape) -> Specs:
        left, right = (
            -(-side * self.rank * self.bits // 8) for side in (shape.out_features, shape.in_features)
        )
        return {
            "left_codes": Spec((left,), torch.uint8),
            "right_codes": Spec((right,), torch.uint8),
            "rank_scales": Spec((self.rank,), torch.float32),
        }

    def fits(self, shape: Shape) -> bool:
        return self.rank <= min(shape.out_features, shape.in_features)

    def load(self, tensors: Tensors, shape: Shape) -> Tensors:
        sizes = {"left": (shape.out_features, self.rank), "right": (self.rank, shape.in_features)}
        codes = {
            name: (unpack_codes(tensors[f"{name}_codes"], self.bits, rows * columns) - 2 ** (self.bits - 1))
            .to(torch.int8)
            .view(rows, columns)
            for name, (rows, columns) in sizes.items()
        }
        return codes | {"rank_scales": tensors["rank_scales"]}

    def encode(self, loaded: Tensors, tensors: Tensors) -> dict[str, Tensor]:
        half = 2 ** (self.bits - 1)
        return {
            f"{name}_codes": pack_codes(loaded[name].int().flatten() + half, self.bits)
            for name in ("left", "right")
        }

    def forward(self, loaded: Tensors, x: Tensor, shape: Shape) -> Tensor:
        z = linear(x, loaded["right"].to(x.dtype)) * loaded["rank_scales"].to(x.dtype)
        return linear(z, loaded["left"].to(x.dtype))

    def dense(self, loaded: Tensors, shape: Shape) -> Tensor:
        return (loaded["left"].float() * loaded["rank_scales"]) @ loaded["right"].float()

    def macs(self, shape: Shape) -> int:
        return self.rank * (shape.out_features + shape.in_features)

    def describe(self) -> str:
        return f"rank {self.rank} in {self.bits} bit"


def _steps(factor_RN: Tensor, top: int) -> Tensor:
    """(R,) of each row; 1 where it is all zero."""
    steps_R = factor_RN.abs().amax(1) / top
    return torch.where(steps_R > 0, steps_R, torch.ones_like(steps_R))
