"""Integer weights in memory, and products with them."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from lrsd.forms.base import Tensors

# Tokens up to which torch's int8 kernel beats widening the codes for a dense product, on a CPU: at one
# token it takes a seventh of the time, at sixteen as much, at 512 four times as much.
_KERNEL_TOKENS = 8


def split_integers(codes_OI: Tensor) -> dict[str, Tensor]:
    """Q (O, I) a byte each: `codes` int8, where the few columns with larger integers are zero; these in
    `wide_codes` (O, K), their numbers in `wide` (K,). Where half of all columns are wide, `codes` alone, of
    the narrowest type that holds them all."""
    if codes_OI.dtype == torch.int8:
        return {"codes": codes_OI.contiguous()}
    wide_I = (codes_OI > 127).any(0) | (codes_OI < -128).any(0)
    columns_K = wide_I.nonzero().flatten()
    if 2 * len(columns_K) >= codes_OI.shape[1]:
        return {"codes": narrowest(codes_OI).contiguous()}
    codes = codes_OI.masked_fill(wide_I, 0).to(torch.int8).contiguous()
    if not len(columns_K):
        return {"codes": codes}
    return {"codes": codes, "wide": columns_K, "wide_codes": narrowest(codes_OI[:, columns_K]).contiguous()}


def joined_integers(loaded: Tensors) -> Tensor:
    """Q (O, I), whole again, of the narrowest type."""
    if "wide" not in loaded:
        return loaded["codes"]
    codes_OI = loaded["codes"].to(loaded["wide_codes"].dtype)
    codes_OI[:, loaded["wide"]] = loaded["wide_codes"]
    return codes_OI


def split_product(x: Tensor, loaded: Tensors) -> Tensor:
    """x (..., I) times Q^T from what `split_integers` gives."""
    y = integer_product(x, loaded["codes"])
    if "wide" in loaded:  # few of them: in float32, which 16 bit would round
        y = y + linear(x[..., loaded["wide"]].float(), loaded["wide_codes"].float()).to(x.dtype)
    return y


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
