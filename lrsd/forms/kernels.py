"""Products with integer weights."""

import torch
from torch import Tensor
from torch.nn.functional import linear

# Tokens up to which torch's int8 kernel beats widening the codes for a dense product, on a CPU: at one
# token it takes a seventh of the time, at sixteen as much, at 512 four times as much.
_KERNEL_TOKENS = 8


def integer_product(x: Tensor, codes_OI: Tensor) -> Tensor:
    """x (..., I) times Q^T, Q small integers: exact in x's type as far as that goes."""
    if _reads_codes_in_place(x, codes_OI):
        flat = x.reshape(-1, x.shape[-1])
        product = torch._weight_int8pack_mm(flat, codes_OI, flat.new_ones(codes_OI.shape[0]))
        return product.view(*x.shape[:-1], -1)
    return linear(x, codes_OI.to(x.dtype))


def narrowest(codes: Tensor) -> Tensor:
    """The same integers as int8 where they fit, else int16 or int32."""
    low, high = (int(codes.min()), int(codes.max())) if codes.numel() else (0, 0)
    kinds = (torch.int8, torch.int16, torch.int32)
    return codes.to(next(k for k in kinds if torch.iinfo(k).min <= low and high <= torch.iinfo(k).max))


def _reads_codes_in_place(x: Tensor, codes_OI: Tensor) -> bool:
    """Whether torch's kernel for int8 weights applies and is the faster way: a few tokens, on a CPU."""
    few = x.numel() <= _KERNEL_TOKENS * x.shape[-1]
    # The kernel reads past the end of shapes that do not fill its registers.
    whole = all(size % 64 == 0 for size in codes_OI.shape)
    cpu = x.device.type == "cpu"
    return few and whole and cpu and x.dtype == torch.bfloat16 and codes_OI.dtype == torch.int8
