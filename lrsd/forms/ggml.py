"""llama.cpp's block types, byte for byte as they stand in a GGUF file.

Layout: ggml/src/ggml-common.h and ggml-quants.c of https://github.com/ggml-org/llama.cpp
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from lrsd.forms.base import Form, Shape, Spec, Specs, Tensors
from lrsd.numerics.blocks import BlockCodes, Grid

_NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class BlockType:
    """number: ggml's own; pack: codes (N, block), sc and m (N, groups), all uint8 and from 0 up, d and e
    (N, 2) bytes -> blocks (N, bytes)."""

    number: int
    nbytes: int
    grid: Grid
    pack: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

    def bytes_of(self, numel: int) -> int:
        return numel // self.grid.block * self.nbytes


def _halves(codes_NJ: Tensor, width: int) -> Tensor:
    """Two 4-bit codes a byte: of each `width` columns the first half low, the second half high."""
    pairs = codes_NJ.view(len(codes_NJ), -1, 2, width // 2)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1)


def _places(numbers: Tensor, bits: int = 1) -> Tensor:
    """Where numbers of so many bits each begin in a byte: uint8, on the device of these."""
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=numbers.device)


def _high_bits(codes_NJ: Tensor, bit: int) -> Tensor:
    """One bit of 32 columns in 4 bytes, the first column lowest."""
    bits_NBb = (codes_NJ >> bit & 1).view(len(codes_NJ), -1, 8)
    return (bits_NBb << _places(codes_NJ)).sum(-1, dtype=torch.uint8)


def _quarters(codes_NJ: Tensor) -> Tensor:
    """Four 2-bit codes a byte, of each 128 columns every 32nd."""
    parts = codes_NJ.view(len(codes_NJ), -1, 4, 32) << _places(codes_NJ, 2)[:, None]
    return parts.sum(2, dtype=torch.uint8).flatten(1)


def _eighths(bits_NJ: Tensor) -> Tensor:
    """One bit of 256 columns, every 32nd in a byte."""
    parts = bits_NJ.view(len(bits_NJ), 8, 32) << _places(bits_NJ)[:, None]
    return parts.sum(1, dtype=torch.uint8)


def _six_bit_pairs(sc_N8: Tensor, m_N8: Tensor) -> Tensor:
    """Eight scales and eight offsets of 6 bits in 12 bytes."""
    low = sc_N8[:, :4] | sc_N8[:, 4:] >> 4 << 6
    middle = m_N8[:, :4] | m_N8[:, 4:] >> 4 << 6
    return torch.cat([low, middle, (sc_N8[:, 4:] & 15) | (m_N8[:, 4:] & 15) << 4], 1)


def _q4_0(q: Tensor, sc: Tensor, m: Tensor, d: Tensor, e: Tensor) -> Tensor:
    return torch.cat([d, _halves(q, 32)], 1)


def _q4_1(q: Tensor, sc: Tensor, m: Tensor, d: Tensor, e: Tensor) -> Tensor:
    return torch.cat([d, e, _halves(q, 32)], 1)


def _q5_0(q: Tensor, sc: Tensor, m: Tensor, d: Tensor, e: Tensor) -> Tensor:
    return torch.cat([d, _high_bits(q, 4), _halves(q & 15, 32)], 1)


def _q5_1(q: Tensor, sc: Tensor, m: Tensor, d: Tensor, e: Tensor) -> Tensor:
    return torch.cat([d, e, _high_bits(q, 4), _halves(q & 15, 32)], 1)


def _q8_0(q: Tensor, sc: Tensor, m: Tensor, d: Tensor, e: Tensor) -> Tensor:
    return torch.cat([d, q - 127], 1)  # as int8, modulo 256


def _q2_k(q: Tensor, sc: Tensor, m: Tensor, d: Tensor, e: Tensor) -> Tensor:
    return torch.cat([sc | m << 4, _quarters(q), d, e], 1)


def _q3_k(q: Tensor, sc: Tensor, m: Tensor, d: Tensor, e: Tensor) -> Tensor:
    low = (sc[:, :8] & 15) | (sc[:, 8:] & 15) << 4
    high = (sc >> 4).view(-1, 4, 4) << _places(sc, 2)[:, None]
    return torch.cat([_eighths(q >> 2), _quarters(q & 3), low, high.sum(1, dtype=torch.uint8), d], 1)


def _q4_k(q: Tensor, sc: Tensor, m: Tensor, d: Tensor, e: Tensor) -> Tensor:
    return torch.cat([d, e, _six_bit_pairs(sc, m), _halves(q, 64)], 1)


def _q5_k(q: Tensor, sc: Tensor, m: Tensor, d: Tensor, e: Tensor) -> Tensor:
    return torch.cat([d, e, _six_bit_pairs(sc, m), _eighths(q >> 4), _halves(q & 15, 64)], 1)


def _q6_k(q: Tensor, sc: Tensor, m: Tensor, d: Tensor, e: Tensor) -> Tensor:
    return torch.cat([_halves(q & 15, 128), _quarters(q >> 4), sc - 128, d], 1)


def _iq4_xs(q: Tensor, sc: Tensor, m: Tensor, d: Tensor, e: Tensor) -> Tensor:
    high = ((sc >> 4).view(-1, 2, 4) << _places(sc, 2)).sum(-1, dtype=torch.uint8)
    low = (sc & 15).view(-1, 4, 2)
    return torch.cat([d, high, low[..., 0] | low[..., 1] << 4, _halves(q, 32)], 1)


def _numbers(first: int, last: int) -> tuple[int, ...]:
    return tuple(range(first, last + 1))


_PAIRS = ((0, 63), (0, 63))
# By the name that llama.cpp knows them by.
BLOCK_TYPES: dict[str, BlockType] = {
    "Q2_K": BlockType(10, 84, Grid(_numbers(0, 3), 16, 256, (0, 15), (0, 15)), _q2_k),
    "Q3_K": BlockType(11, 110, Grid(_numbers(-4, 3), 16, 256, (-32, 31)), _q3_k),
    "IQ4_XS": BlockType(23, 136, Grid(_NONLINEAR, 32, 256, (-32, 31)), _iq4_xs),
    "Q4_0": BlockType(2, 18, Grid(_numbers(-8, 7), 32, 32), _q4_0),
    "IQ4_NL": BlockType(20, 18, Grid(_NONLINEAR, 32, 32), _q4_0),
    "Q4_K": BlockType(12, 144, Grid(_numbers(0, 15), 32, 256, *_PAIRS), _q4_k),
    "Q4_1": BlockType(3, 20, Grid(_numbers(0, 15), 32, 32, offsets=(-1, -1)), _q4_1),
    "Q5_0": BlockType(6, 22, Grid(_numbers(-16, 15), 32, 32), _q5_0),
    "Q5_K": BlockType(13, 176, Grid(_numbers(0, 31), 32, 256, *_PAIRS), _q5_k),
    "Q5_1": BlockType(7, 24, Grid(_numbers(0, 31), 32, 32, offsets=(-1, -1)), _q5_1),
    "Q6_K": BlockType(14, 210, Grid(_numbers(-32, 31), 16, 256, (-128, 127)), _q6_k),
    "Q8_0": BlockType(8, 34, Grid(_numbers(-127, 127), 32, 32), _q8_0),
}
_BY_NUMBER = {found.number: name for name, found in BLOCK_TYPES.items()}


@dataclass(frozen=True, slots=True)
class Ggml(Form):
    """Rows of blocks of one of llama.cpp's types.

    | tensor | size                           | what                                  |
    |--------|--------------------------------|---------------------------------------|
    | blocks | (O, I / block x bytes) uint8   | as a GGUF file has them, row after row |
    """

    type: int
    name: ClassVar[str] = "ggml"

    def __post_init__(self) -> None:
        if self.type not in _BY_NUMBER:
            raise ValueError(f"no block type of llama.cpp that is known here has number {self.type}")

    @staticmethod
    def of(kind: str, codes: BlockCodes) -> tuple["Ggml", dict[str, Tensor]]:
        return Ggml(BLOCK_TYPES[kind].number), {"blocks": packed_blocks(kind, codes)}

    @property
    def kind(self) -> str:
        return _BY_NUMBER[self.type]

    def tensors(self, shape: Shape) -> Specs:
        per_row = BLOCK_TYPES[self.kind].bytes_of(shape.in_features)
        return {"blocks": Spec((shape.out_features, per_row), torch.uint8)}

    def check(self, tensors: Tensors, shape: Shape) -> None:
        if shape.in_features % (block := BLOCK_TYPES[self.kind].grid.block):
            raise ValueError(f"{self.kind} needs columns in blocks of {block}, there are {shape.in_features}")

    def forward(self, loaded: Tensors, x: Tensor, shape: Shape) -> Tensor:
        return linear(x, self.dense(loaded, shape).to(x.dtype))

    def dense(self, loaded: Tensors, shape: Shape) -> Tensor:
        from gguf import GGMLQuantizationType, dequantize

        blocks = loaded["blocks"]
        values = dequantize(blocks.cpu().numpy(), GGMLQuantizationType(self.type))
        return torch.from_numpy(values).to(blocks.device)

    def macs(self, shape: Shape) -> int:
        return shape.out_features * shape.in_features

    def describe(self) -> str:
        return self.kind


def packed_blocks(kind: str, codes: BlockCodes) -> Tensor:
    """Codes as bytes (O, I / block x bytes)."""
    found = BLOCK_TYPES[kind]
    grid, rows = found.grid, len(codes.codes_OI)

    def integers(values_OG: Tensor, bounds: tuple[int, int] | None) -> Tensor:
        least = bounds[0] if bounds else 0
        return (values_OG - least).to(torch.uint8).view(-1, grid.block // grid.group)

    def halves(values_OB: Tensor) -> Tensor:
        return values_OB.contiguous().view(torch.uint8).view(-1, 2)

    codes_NJ = codes.codes_OI.view(-1, grid.block)
    sc, m = integers(codes.scales_OG, grid.scales), integers(codes.offsets_OG, grid.offsets)
    blocks = found.pack(codes_NJ, sc, m, halves(codes.steps_OB), halves(codes.offset_steps_OB))
    return blocks.reshape(rows, -1)


def usable_types(in_features: int, kinds: Mapping[str, BlockType] = BLOCK_TYPES) -> list[str]:
    """Names of the types whose blocks divide a row."""
    return [name for name, kind in kinds.items() if in_features % kind.grid.block == 0]
