"""Codes come back as they went in, in close to as few bits as there can be; damage never passes as data."""

import struct
import tracemalloc
import zlib
from contextlib import suppress

import pytest
import torch
from deflate import entropy_encode
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lrsd.numerics.coding import (
    entropy_decode,
    pack_bits,
    pack_codes,
    unpack_bits,
    unpack_codes,
)

LIMIT = 2**30 - 1


def entropy(codes: Tensor) -> float:
    """Bits per code of the codes' own frequencies: no code that knows only these does better."""
    counts = codes.unique(return_counts=True)[1].double()
    shares = counts / counts.sum()
    return float(-(shares * shares.log2()).sum())


@given(st.lists(st.one_of(st.integers(-3, 3), st.integers(-300, 300), st.integers(-LIMIT, LIMIT))))
def test_any_integers_survive(values: list[int]) -> None:
    codes = torch.tensor(values, dtype=torch.int64)
    assert entropy_decode(entropy_encode(codes), len(values)).tolist() == values


@pytest.mark.parametrize("deviation", [0.35, 0.5, 0.7, 1, 1.5, 3, 10, 40, 300, 3000])
def test_normal_codes_take_little_more_than_their_entropy(
    generator: torch.Generator, deviation: float
) -> None:
    """A Huffman symbol for each code alone would waste 0.1 to 0.4 bit on the three shortest."""
    codes = (torch.randn(300_000, generator=generator) * deviation).round().int()
    stream = entropy_encode(codes)
    assert torch.equal(entropy_decode(stream, codes.numel()), codes)
    excess = 8 * stream.numel() / codes.numel() - entropy(codes)
    assert excess <= 0.09


def test_one_giant_among_small_codes_costs_its_own_bits_only(generator: torch.Generator) -> None:
    codes = torch.randn(10_000, generator=generator).round().int()
    plain = entropy_encode(codes).numel()
    codes[1234] = 2_000_000
    assert entropy_encode(codes).numel() <= plain + 10


def test_codes_beyond_the_format_are_refused() -> None:
    with pytest.raises(ValueError, match=r"below 2\^30"):
        entropy_encode(torch.tensor([2**30]))


def test_damage_is_an_error_or_other_codes_never_a_crash(generator: torch.Generator) -> None:
    codes = (torch.randn(500, generator=generator) * 2).round().int()
    codes[7] = 100_000
    stream = entropy_encode(codes)
    for place in range(stream.numel()):
        for flipped in (1, 128):
            damaged = stream.clone()
            damaged[place] ^= flipped
            with suppress(ValueError):
                assert entropy_decode(damaged, codes.numel()).shape == codes.shape
    for cut in (0, 3, 6, stream.numel() - 1):
        with pytest.raises(ValueError, match="entropy-coded stream"):
            entropy_decode(stream[:cut], codes.numel())
    for count in (codes.numel() - 10, codes.numel() + 10, 10**12):
        with pytest.raises(ValueError, match="entropy-coded stream"):
            entropy_decode(stream, count)


def test_a_bomb_is_not_inflated() -> None:
    """100 MB of zeros in a DEFLATE stream of 100 kB, behind the header of ten codes."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = compressor.compress(bytes(100_000_000)) + compressor.flush()
    stream = torch.frombuffer(bytearray(struct.pack("<BBI", 1, 0, len(bomb)) + bomb), dtype=torch.uint8)
    tracemalloc.start()
    with pytest.raises(ValueError, match="must hold"):
        entropy_decode(stream, 10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("count", [0, 1, 8, 37])
def test_fixed_width_codes_survive_without_padding_waste(
    generator: torch.Generator, bits: int, count: int
) -> None:
    codes = torch.randint(2**bits, (count,), generator=generator)
    packed = pack_codes(codes, bits)
    assert packed.numel() == -(-count * bits // 8)
    assert torch.equal(unpack_codes(packed, bits, count), codes.int())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("count", [0, 1, 8, 37])
def test_bit_i_of_a_mask_is_bit_i_mod_8_of_byte_i_div_8(
    generator: torch.Generator, count: int, dtype: torch.dtype
) -> None:
    """The checkpoint format, spelled out."""
    bits = torch.randint(2, (count,), generator=generator)
    packed = pack_bits(bits.to(dtype))
    assert packed.tolist() == [
        sum(bit << place for place, bit in enumerate(bits[start : start + 8].tolist()))
        for start in range(0, count, 8)
    ]
    assert torch.equal(unpack_bits(packed, count), bits.bool())
