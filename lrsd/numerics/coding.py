"""Integer codes as bytes: of fixed width, or the entropy-coded ones of earlier releases, which are only read.

Those are DEFLATE with Huffman codes only (RFC 1951, zlib's Z_HUFFMAN_ONLY). A Huffman code spends at least
one bit per symbol, so short codes go several to a symbol; long ones are escaped into a stream of their own.

A stream: codes per symbol, raw low bits per code (a byte each), length of the DEFLATE part (4 bytes, little
endian); the low bits of the zigzagged codes; the DEFLATE part, the rest of them; the exponents of escapes, 5
bits each, then their bits below the highest. An escape is 1 + what a code exceeds the largest symbol by.
"""

import struct
import zlib

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

# Codes per symbol, and how many zigzagged values one of them can take; the last value is the escape.
# The products stay within a byte.
_LEVELS = {1: 256, 2: 15, 3: 6, 4: 4}
# In front of a stream: codes per symbol, raw low bits per code (a byte each), length of the DEFLATE
# part (4 bytes, little endian).
_HEADER = struct.Struct("<BBI")
# Bits of an escape's exponent: up to 2^31.
_EXPONENT_BITS = 5
# Codes worked on at once, so that a layer takes no more than a few bytes per code; a multiple of 8 and of
# every number of codes per symbol.
_PIECE = 24 * 2**14


def entropy_decode(stream: Tensor, count: int) -> Tensor:
    """The `count` integers of a stream; int32 (count,).

    Raises: ValueError if the bytes are not such a stream of exactly `count` codes. No more symbols
        than that are ever inflated.
    """
    data = stream.cpu().numpy().tobytes()
    if len(data) < _HEADER.size:
        raise ValueError(f"entropy-coded stream is cut off after {len(data)} bytes")
    together, split, length = _HEADER.unpack_from(data)
    if together not in _LEVELS or split > 30:
        raise ValueError(f"entropy-coded stream is damaged: {together} codes per symbol, {split} raw bits")
    levels = _LEVELS[together]
    start = _HEADER.size + -(-count * split // 8)
    if len(data) < start:
        raise ValueError(f"entropy-coded stream is cut off after {len(data)} bytes")
    symbols = _inflate(data[start : start + length], -(-count // together))
    if levels**together < 256 and bool((symbols >= levels**together).any()):
        raise ValueError("entropy-coded stream is damaged: a symbol out of range")
    places = levels ** torch.arange(together, dtype=torch.int32)
    pieces = symbols.split(_PIECE // together)
    limited = [(piece.int()[:, None] // places % levels).flatten().to(torch.uint8) for piece in pieces]
    zigzag = torch.cat([*limited, symbols[:0]])[:count].int()
    escaped = zigzag == levels - 1
    zigzag[escaped] += _decode_integers(data[start + length :], int(escaped.sum()))
    zigzag <<= split
    zigzag += unpack_codes(_from_bytes(data[_HEADER.size : start]), split, count)
    return ((zigzag >> 1) ^ -(zigzag & 1)).to(stream.device)


def _inflate(huffman: bytes, count: int) -> Tensor:
    inflater = zlib.decompressobj(-15)
    try:
        symbols = inflater.decompress(huffman, count + 1)
    except zlib.error as error:
        raise ValueError(f"entropy-coded stream is damaged: {error}") from error
    if len(symbols) != count or not inflater.eof or inflater.unused_data:
        raise ValueError(f"entropy-coded stream must hold {count} symbols, got {len(symbols)}")
    return _from_bytes(symbols)


def _decode_integers(data: bytes, count: int) -> Tensor:
    head = -(-count * _EXPONENT_BITS // 8)
    packed = _from_bytes(data)
    if packed.numel() < head:
        raise ValueError("entropy-coded stream is damaged: escapes are missing")
    exponents = unpack_codes(packed[:head], _EXPONENT_BITS, count).long()
    if packed.numel() - head != -(-int(exponents.sum()) // 8):
        raise ValueError("entropy-coded stream is damaged: escapes and their bits do not match")
    return ((1 << exponents) - 1 + _unpack_variable(packed[head:], exponents)).int()


def _from_bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes 0..2^bits - 1 of any shape at `bits` bits each, first one lowest; uint8 (ceil(n bits / 8),)."""
    places = torch.arange(bits, dtype=torch.int32, device=codes.device)
    pieces = codes.flatten().split(_PIECE)
    packed = [pack_bits((piece.int()[:, None] >> places) & 1) for piece in pieces]
    return torch.cat([*packed, torch.zeros(0, dtype=torch.uint8, device=codes.device)])


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_codes`; int32 (count,)."""
    places = torch.arange(bits, dtype=torch.int32, device=packed.device)
    codes = torch.zeros(count, dtype=torch.int32, device=packed.device)
    for start in range(0, count if bits else 0, _PIECE):
        stop = min(start + _PIECE, count)
        part = unpack_bits(packed[start * bits // 8 : -(-stop * bits // 8)], (stop - start) * bits)
        codes[start:stop] = (part.view(-1, bits).int() << places).sum(1, dtype=torch.int32)
    return codes


def pack_bits(bits: Tensor) -> Tensor:
    """0/1 or booleans to bytes, first one in the lowest bit; uint8 (ceil(n / 8),)."""
    if bits.device.type == "cpu":
        return torch.from_numpy(np.packbits(bits.flatten().numpy(), bitorder="little"))
    whole = pad(bits.flatten().to(torch.uint8), (0, -bits.numel() % 8)).view(-1, 8)
    return (whole << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The first `count` bits; bool."""
    if packed.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed.numpy(), count=count, bitorder="little")).view(
            torch.bool
        )
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed[:, None] >> places & 1).flatten()[:count].bool()


def _bit_places(widths: Tensor) -> tuple[Tensor, Tensor]:
    """For numbers of these widths end to end: which number each bit belongs to, and its place in it."""
    owner = torch.arange(widths.numel(), device=widths.device).repeat_interleave(widths)
    first = widths.cumsum(0) - widths
    return owner, torch.arange(owner.numel(), device=widths.device) - first[owner]


def _unpack_variable(packed: Tensor, widths: Tensor) -> Tensor:
    owner, place = _bit_places(widths)
    bits = unpack_bits(packed, owner.numel()).long() << place
    return torch.zeros(widths.numel(), dtype=torch.int64, device=packed.device).index_add_(0, owner, bits)
