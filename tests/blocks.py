"""Random blocks of llama.cpp's types."""

import torch
from torch import Tensor

from lrsd.forms.ggml import BLOCK_TYPES
from lrsd.numerics.blocks import BlockCodes


def random_blocks(kind: str, generator: torch.Generator, rows: int = 5, columns: int = 512) -> BlockCodes:
    """Every number drawn from its whole range."""
    grid = BLOCK_TYPES[kind].grid

    def integers(bounds: tuple[int, int] | None) -> Tensor:
        low, high = bounds or (0, 0)
        shape = (rows, columns // grid.group)
        return torch.randint(low, high + 1, shape, generator=generator).to(torch.int16)

    codes_OI = torch.randint(len(grid.levels), (rows, columns), generator=generator).to(torch.uint8)
    steps = torch.randn(2, rows, columns // grid.block, generator=generator).half()
    lows_OB = steps[1] if grid.offsets else torch.zeros_like(steps[1])
    return BlockCodes(grid, codes_OI, integers(grid.scales), integers(grid.offsets), steps[0], lows_OB)
