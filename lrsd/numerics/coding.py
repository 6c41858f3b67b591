"""Integer codes as bytes: fixed width, or entropy coded. Lossless both ways.

Entropy coding is DEFLATE with Huffman codes only (RFC 1951, zlib's Z_HUFFMAN_ONLY): every Python has
it and it decodes hundreds of megabytes per second. A Huffman code spends at least one bit per symbol,
so short codes go several to a symbol; long ones are escaped into a stream of their own.
"""

import math
import struct
import zlib

import torch
from torch import Tensor
from torch.nn.functional import pad

# Codes per symbol, and how many zigzagged values one of them can take; the last value is the escape.
# The products stay within a byte.
_LEVELS = {1: 256, 2: 15, 3: 6, 4: 4}
# Median zigzagged code above which several to a symbol cannot win, so that it is not tried.
_GROUPING_LIMIT = 5
# Median zigzagged code down to which low bits are split off and kept raw: they are as good as random
# there, and what is left fits the symbols.
_SPLIT_ABOVE = 16
# In front of a stream: codes per symbol, raw low bits per code (a byte each), length of the DEFLATE
# part (4 bytes, little endian).
_HEADER = struct.Struct("<BBI")
# Bits of an escape's exponent: up to 2^31.
_EXPONENT_BITS = 5


def entropy_encode(codes: Tensor) -> Tensor:
    """Integers of any shape, in the order of their memory, to bytes; uint8 (n,).

    Layout: header, raw low bits, DEFLATE part, then the escapes: the excess of each over the escape
    value, as 5 bits of exponent each and the bits below.
    Raises: ValueError for codes of 2^30 and more.
    """
    zigzag = codes.flatten().long()
    zigzag = torch.where(zigzag < 0, -2 * zigzag - 1, 2 * zigzag)
    if zigzag.numel() and int(zigzag.max()) >= 1 << 31:
        raise ValueError(f"codes must be below 2^30, got {int(codes.abs().max())}")
    typical = int(zigzag.median()) if zigzag.numel() else 0  # a few giants must not move it
    split = max(0, math.floor(math.log2(typical / _SPLIT_ABOVE))) if typical else 0
    groupings = _LEVELS if typical < _GROUPING_LIMIT else (1,)
    streams = [_encode(zigzag, split, together) for together in groupings]
    return _from_bytes(min(streams, key=len)).to(codes.device)


def entropy_decode(stream: Tensor, count: int) -> Tensor:
    """The `count` integers that `entropy_encode` was given; int32.

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
    if bool((symbols.long() >= levels**together).any()):
        raise ValueError("entropy-coded stream is damaged: a symbol out of range")
    places = levels ** torch.arange(together, dtype=torch.int32)
    zigzag = (symbols.int()[:, None] // places % levels).flatten()[:count]
    escaped = zigzag == levels - 1
    zigzag[escaped] += _decode_integers(data[start + length :], int(escaped.sum()))
    low = unpack_codes(_from_bytes(data[_HEADER.size : start]), split, count)
    zigzag = (zigzag << split) + low
    return ((zigzag >> 1) ^ -(zigzag & 1)).to(stream.device)


def _encode(zigzag: Tensor, split: int, together: int) -> bytes:
    levels, low = _LEVELS[together], pack_codes(zigzag & ((1 << split) - 1), split)
    zigzag = zigzag >> split
    limited = pad(zigzag.clamp(max=levels - 1), (0, -zigzag.numel() % together))
    places = levels ** torch.arange(together, device=zigzag.device)
    symbols = (limited.view(-1, together) * places).sum(1).to(torch.uint8)
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    huffman = compressor.compress(symbols.cpu().numpy().tobytes()) + compressor.flush()
    excess = zigzag[zigzag >= levels - 1] - (levels - 1)
    header = _HEADER.pack(together, split, len(huffman))
    return header + low.cpu().numpy().tobytes() + huffman + _encode_integers(excess)


def _inflate(huffman: bytes, count: int) -> Tensor:
    inflater = zlib.decompressobj(-15)
    try:
        symbols = inflater.decompress(huffman, count + 1)
    except zlib.error as error:
        raise ValueError(f"entropy-coded stream is damaged: {error}") from error
    if len(symbols) != count or not inflater.eof or inflater.unused_data:
        raise ValueError(f"entropy-coded stream must hold {count} symbols, got {len(symbols)}")
    return _from_bytes(symbols)


def _encode_integers(values: Tensor) -> bytes:
    """Non-negative integers below 2^31: v + 1 by exponent (5 bits each) and the bits below its top one."""
    exponents = torch.frexp((values + 1).double()).exponent.long() - 1  # exact: float64 holds 2^53
    mantissas = _pack_variable(values + 1 - (1 << exponents), exponents)
    return torch.cat([pack_codes(exponents, _EXPONENT_BITS), mantissas]).cpu().numpy().tobytes()


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
    places = torch.arange(bits, device=codes.device)
    return pack_bits((codes.flatten().int()[:, None] >> places) & 1)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_codes`; int32 (count,)."""
    places = torch.arange(bits, device=packed.device)
    return (unpack_bits(packed, count * bits).view(count, bits).int() << places).sum(1, dtype=torch.int32)


def pack_bits(bits: Tensor) -> Tensor:
    """0/1 or booleans to bytes, first one in the lowest bit; uint8 (ceil(n / 8),)."""
    flat = bits.flatten().to(torch.uint8)
    octets = pad(flat, (0, -flat.numel() % 8)).view(-1, 8).int()
    return (octets << torch.arange(8, device=bits.device)).sum(1).to(torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The first `count` bits; bool."""
    bits = (packed.int()[:, None] >> torch.arange(8, device=packed.device)) & 1
    return bits.flatten()[:count].bool()


def _bit_places(widths: Tensor) -> tuple[Tensor, Tensor]:
    """For numbers of these widths end to end: which number each bit belongs to, and its place in it."""
    owner = torch.arange(widths.numel(), device=widths.device).repeat_interleave(widths)
    first = widths.cumsum(0) - widths
    return owner, torch.arange(owner.numel(), device=widths.device) - first[owner]


def _pack_variable(values: Tensor, widths: Tensor) -> Tensor:
    owner, place = _bit_places(widths)
    return pack_bits((values[owner] >> place) & 1)


def _unpack_variable(packed: Tensor, widths: Tensor) -> Tensor:
    owner, place = _bit_places(widths)
    bits = unpack_bits(packed, owner.numel()).long() << place
    return torch.zeros(widths.numel(), dtype=torch.int64, device=packed.device).index_add_(0, owner, bits)
