"""The writer of `lrsd.numerics.coding`'s entropy-coded streams, as releases before the trellis had it."""

import math
import struct
import zlib

import torch
from torch import Tensor
from torch.nn.functional import pad

from lrsd.forms.entropy import Entropy
from lrsd.numerics.coding import pack_bits, pack_codes
from lrsd.numerics.rounding import EntropyCodes

_LEVELS = {1: 256, 2: 15, 3: 6, 4: 4}
# Median zigzagged code above which several to a symbol cannot win, so that it is not tried.
_GROUPING_LIMIT = 5
# Median zigzagged code down to which low bits are split off and kept raw: they are as good as random
# there, and what is left fits the symbols.
_SPLIT_ABOVE = 16
_HEADER = struct.Struct("<BBI")
# Codes worked on at once; a multiple of 8 and of every number of codes per symbol.
_PIECE = 24 * 2**14


def entropy_form(codes: EntropyCodes) -> tuple[Entropy, dict[str, Tensor]]:
    """Codes on a plain grid as the form that is only read now, and its tensors."""
    stream = entropy_encode(codes.codes_OI.T[codes.offsets_I.argsort(stable=True)])
    return Entropy(stream.numel(), codes.exponent), {"codes": stream, "steps": codes.offsets_I}


def entropy_encode(codes: Tensor) -> Tensor:
    """Integers of any shape, in the order of their memory, to bytes; uint8 (n,).

    Raises: ValueError for codes of 2^30 and more.
    """
    flat = codes.flatten()
    if flat.numel() and max(int(flat.max()), -int(flat.min())) >= 1 << 30:
        raise ValueError(f"codes must be below 2^30, got {max(int(flat.max()), -int(flat.min()))}")
    flat = flat.int()
    zigzag = (flat << 1) ^ (flat >> 31)
    typical = int(zigzag.median()) if zigzag.numel() else 0  # a few giants must not move it
    split = max(0, math.floor(math.log2(typical / _SPLIT_ABOVE))) if typical else 0
    groupings = _LEVELS if typical < _GROUPING_LIMIT else (1,)
    streams = [_encode(zigzag, split, together) for together in groupings]
    return torch.frombuffer(bytearray(min(streams, key=len)), dtype=torch.uint8).to(codes.device)


def _encode(zigzag: Tensor, split: int, together: int) -> bytes:
    levels = _LEVELS[together]
    places = levels ** torch.arange(together, device=zigzag.device)
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    huffman, excess = [], []
    for piece in zigzag.split(_PIECE):
        piece = piece >> split
        limited = pad(piece.clamp(max=levels - 1), (0, -piece.numel() % together))
        symbols = (limited.view(-1, together) * places).sum(1).to(torch.uint8)
        huffman.append(compressor.compress(symbols.cpu().numpy().tobytes()))
        excess.append(piece[piece >= levels - 1] - (levels - 1))
    huffman.append(compressor.flush())
    header = _HEADER.pack(together, split, sum(map(len, huffman)))
    low = pack_codes(zigzag & ((1 << split) - 1), split).cpu().numpy().tobytes()
    return b"".join([header, low, *huffman, _encode_integers(torch.cat([*excess, zigzag[:0]]))])


def _encode_integers(values: Tensor) -> bytes:
    """Non-negative integers below 2^31: v + 1 by exponent (5 bits each) and the bits below its top one."""
    parts = [part.long() + 1 for part in values.split(_PIECE)]
    # Exact: float64 holds 2^53.
    exponents = [torch.frexp(part.double()).exponent.long() - 1 for part in parts]
    bits = [_variable_bits(part, width) for part, width in zip(parts, exponents, strict=True)]
    none = torch.zeros(0, dtype=torch.uint8, device=values.device)
    packed = pack_codes(torch.cat([*exponents, none.long()]), 5)
    return torch.cat([packed, pack_bits(torch.cat([*bits, none]))]).cpu().numpy().tobytes()


def _variable_bits(values: Tensor, widths: Tensor) -> Tensor:
    """The lowest `widths` bits of each number, one after the other; uint8."""
    owner = torch.arange(widths.numel()).repeat_interleave(widths)
    place = torch.arange(owner.numel()) - (widths.cumsum(0) - widths)[owner]
    return ((values[owner] >> place) & 1).to(torch.uint8)
