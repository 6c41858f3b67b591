"""Integer weights in memory, and products with them."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lrsd.forms.base import Tensors
from lrsd.numerics.nibbles import (
    NIBBLES,
    nibble_product,
    pack_nibbles,
    region_bounds,
    unpack_nibbles,
)
from lrsd.numerics.rounding import column_steps

# Tokens up to which torch's int8 kernel beats widening the codes for a dense product, on a CPU: at one
# token it takes a seventh of the time, at sixteen as much, at 512 four times as much.
_KERNEL_TOKENS = 8
# Integers that are opened at once for a product with many tokens.
_UNPACKED = 2**24


def held_integers(values_IO: Tensor, states: int) -> dict[str, Tensor]:
    """Q^T (I, O) as products read it: on a CPU by `pack_nibbles`, unless integers are so large that they take
    less by `split_integers`, which is how they are elsewhere, a byte or two each."""
    if values_IO.device.type != "cpu":
        return split_integers(values_IO.T)
    held = pack_nibbles(values_IO, states)
    if _bytes_of(held) > values_IO.numel():
        split = split_integers(values_IO.T)
        return split if _bytes_of(split) < _bytes_of(held) else held
    return held


def _bytes_of(held: Tensors) -> int:
    return sum(tensor.nbytes for tensor in held.values())


def whole_integers(held: Tensors, states: int) -> Tensor:
    """Q (O, I) again, from either."""
    if "nibbles" not in held:
        return joined_integers(held)
    in_order_OI = unpack_nibbles(held, states)
    return torch.empty_like(in_order_OI).index_copy_(1, held["order"].long(), in_order_OI)


def nibbles_product(
    x: Tensor, held: Tensors, states: int, steps_I: Tensor, row_steps_O: Tensor, exponent: int
) -> Tensor:
    """x (..., I) times what `numerics.nibbles` holds, with steps for columns and, unless empty, rows."""
    args = x, [held[name] for name in NIBBLES], states, steps_I, row_steps_O, exponent
    # A compiler cannot look into loops that are compiled already, nor can autograd.
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        return torch.ops.lrsd.nibbles(*args)
    return _nibbles(*args)


def _nibbles(
    x: Tensor, tensors: list[Tensor], states: int, steps_I: Tensor, row_steps_O: Tensor, exponent: int
) -> Tensor:
    held = dict(zip(NIBBLES, tensors, strict=True))
    if x.numel() <= _KERNEL_TOKENS * x.shape[-1]:
        flat = x.reshape(-1, x.shape[-1]).float().contiguous()
        y_TO = nibble_product(flat, held, states, steps_I, row_steps_O, 2.0 ** (exponent / 8))
        return y_TO.to(x.dtype).view(*x.shape[:-1], -1)
    # Steps go onto x and y: codes are small integers, exact in 16 bit.
    wide = wide_enough(x.dtype)
    dtype = wide if has_kernels(wide) else torch.float32
    order = held["order"]
    scaled = (x[..., order].to(wide) * column_steps(steps_I[order], exponent).to(wide)).to(dtype)
    bounds, rows = region_bounds(held), int(held["sizes"][0])
    each = max(1, _UNPACKED // (rows * bounds[1]))
    y = scaled.new_zeros(*x.shape[:-1], rows)
    for first in range(0, len(bounds) - 1, each):
        last = min(first + each, len(bounds) - 1)
        codes = unpack_nibbles(held, states, first, last).to(dtype)
        y += linear(scaled[..., bounds[first] : bounds[last]], codes)
    if row_steps_O.numel():
        y *= column_steps(row_steps_O, 0)
    return y.to(x.dtype)


@torch.library.custom_op("lrsd::nibbles", mutates_args=())
def _nibbles_op(
    x: Tensor, tensors: list[Tensor], states: int, steps_I: Tensor, row_steps_O: Tensor, exponent: int
) -> Tensor:
    return _nibbles(x, tensors, states, steps_I, row_steps_O, exponent)


@_nibbles_op.register_fake
def _(x: Tensor, tensors: list[Tensor], *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], tensors[NIBBLES.index("counts")].shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.rest = inputs[1:]


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    tensors, states, steps_I, row_steps_O, exponent = ctx.rest
    if row_steps_O.numel():
        gradient = gradient * column_steps(row_steps_O, 0).to(gradient.dtype)
    codes_OI = whole_integers(dict(zip(NIBBLES, tensors, strict=True)), states)
    of_x = gradient @ codes_OI.to(gradient.dtype) * column_steps(steps_I, exponent).to(gradient.dtype)
    return of_x, [None] * len(tensors), None, None, None, None


_nibbles_op.register_autograd(_gradient, setup_context=_keep)


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
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        product = torch._weight_int8pack_mm(flat, codes_OI, flat.new_ones(codes_OI.shape[0]))
        return product.view(*x.shape[:-1], -1)
    return linear(x, codes_OI.to(x.dtype))


def wide_enough(dtype: torch.dtype) -> torch.dtype:
    """The type in which inputs, steps and integers are multiplied: the range of float16 holds neither small
    steps nor the integers that go with them."""
    return torch.float32 if dtype is torch.float16 else dtype


@cache
def has_kernels(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of this type at full speed on this CPU."""
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


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
