"""Values come to where the bits are set."""

import pytest
import torch

from lrsd.numerics.coding import pack_bits
from lrsd.numerics.masks import expand


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("count", "share"), [(1, 1.0), (13, 0.5), (8, 0.0), (300_001, 0.7), (70_000, 1.0)])
def test_entries_come_to_where_the_bits_are_set(
    count: int, share: float, dtype: torch.dtype, threads: int, generator: torch.Generator
) -> None:
    bits = torch.rand(count, generator=generator) < share
    entries = torch.randn(int(bits.sum()), generator=generator).to(dtype)
    if len(entries) > 2:
        entries[0], entries[1], entries[-1] = torch.inf, torch.nan, -0.0
    expected = torch.zeros(count, dtype=dtype)
    expected[bits] = entries
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = expand(pack_bits(bits), entries, count)
    finally:
        torch.set_num_threads(before)
    assert found.dtype == dtype
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(found.view(kind), expected.view(kind))
