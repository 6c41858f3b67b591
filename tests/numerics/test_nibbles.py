"""Integers come back as they went in, whatever their sizes, and products equal those of the dense matrix."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from forks import run_in_fork
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrsd.numerics import nibbles
from lrsd.numerics.nibbles import nibble_product, pack_nibbles, region_bounds, unpack_nibbles
from lrsd.numerics.rounding import column_steps


def on_grid(codes_IO: Tensor) -> Tensor:
    """Values of codes, column by column, each on the grid of its path through the trellis."""
    values = torch.empty_like(codes_IO)
    state = torch.zeros(codes_IO.shape[0], dtype=codes_IO.dtype)
    for i, code in enumerate(codes_IO.T):
        values[:, i] = 2 * code - ((state >> 1 ^ state >> 3) & 1) * code.sign()
        state = (state << 1 | (code ^ state ^ state >> 5) & 1) & 63
    return values


def opened(packed: dict[str, Tensor], states: int) -> Tensor:
    values_OI = unpack_nibbles(packed, states)
    return torch.empty_like(values_OI).index_copy_(1, packed["order"].long(), values_OI).T


def product(x_TI: Tensor, packed: dict[str, Tensor], states: int) -> Tensor:
    steps_I = torch.zeros(x_TI.shape[1], dtype=torch.uint8)
    return nibble_product(x_TI, packed, states, steps_I, steps_I[:0], 1)


def assert_same(
    packed: dict[str, Tensor], values_IO: Tensor, states: int, generator: torch.Generator
) -> None:
    assert torch.equal(opened(packed, states).long(), values_IO.long())
    for tokens in (1, 3):
        x_TI = torch.randn(tokens, values_IO.shape[0], generator=generator)
        expected = x_TI.double() @ values_IO.double()
        size = x_TI.double().abs() @ values_IO.double().abs()
        assert ((product(x_TI, packed, states) - expected).abs() <= 1e-5 * size + 1e-6).all()


# Columns: fewer than a vector, of one block, of two, of two regions. Deviations: all of four bits, some of a
# byte, all of a byte, larger than a byte.
@pytest.mark.parametrize("states", [1, 64])
@pytest.mark.parametrize("shape", [(1, 1), (5, 70), (300, 9), (577, 40), (1100, 20)])
@pytest.mark.parametrize("deviation", [0.5, 4, 15, 500])
def test_values_and_products_are_those_of_the_matrix(
    generator: torch.Generator, shape: tuple[int, int], deviation: float, states: int
) -> None:
    scale = deviation * torch.exp2(torch.randn(shape[0], 1, generator=generator))
    codes_IO = (torch.randn(shape, generator=generator) * scale).round().int()
    values_IO = on_grid(codes_IO) if states == 64 else codes_IO
    assert_same(pack_nibbles(values_IO, states), values_IO, states, generator)


@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(1, 70), st.integers(1, 9), st.sampled_from([1, 64]))
def test_any_integers_survive(data: st.DataObject, columns: int, rows: int, states: int) -> None:
    number = st.one_of(st.integers(-9, 8), st.integers(-30, 30), st.integers(-(2**28), 2**28))
    codes = data.draw(st.lists(number, min_size=columns * rows, max_size=columns * rows))
    codes_IO = torch.tensor(codes, dtype=torch.int32).view(columns, rows)
    values_IO = on_grid(codes_IO) if states == 64 else codes_IO
    assert torch.equal(opened(pack_nibbles(values_IO, states), states).int(), values_IO)


@pytest.mark.parametrize("states", [1, 64])
def test_a_row_of_large_codes_has_more_differences_than_a_byte_counts(
    generator: torch.Generator, states: int
) -> None:
    codes_IO = torch.randint(-7, 8, (256, 30), generator=generator, dtype=torch.int32)
    codes_IO[:, 11] = 17
    values_IO = on_grid(codes_IO) if states == 64 else codes_IO
    packed = pack_nibbles(values_IO, states)
    assert packed["bytes"].numel() == 0
    assert packed["counts"].max() == 255
    assert len(packed["far"]) == 1
    assert_same(packed, values_IO, states, generator)


def test_normal_codes_of_four_bits_take_little_more(generator: torch.Generator) -> None:
    scale = 3.5 * torch.exp2(0.3 * torch.randn(1024, 1, generator=generator))
    codes_IO = (torch.randn(1024, 512, generator=generator) * scale).round().int()
    codes_IO[:9] *= 20
    packed = pack_nibbles(on_grid(codes_IO), 64)
    assert packed["bytes"].numel() >= 9 * 512
    assert 8 * sum(tensor.nbytes for tensor in packed.values()) / codes_IO.numel() <= 4.9


def test_steps_scale_columns_and_rows(generator: torch.Generator) -> None:
    codes_IO = torch.randint(-20, 20, (90, 50), generator=generator, dtype=torch.int32)
    packed = pack_nibbles(codes_IO, 1)
    steps_I, steps_O = (torch.randint(0, 60, (n,), generator=generator).byte() for n in (90, 50))
    x_TI = torch.randn(4, 90, generator=generator)
    W_OI = codes_IO.T * column_steps(steps_I, -9) * column_steps(steps_O, 0)[:, None]
    found = nibble_product(x_TI, packed, 1, steps_I, steps_O, 2 ** (-9 / 8))
    torch.testing.assert_close(found, x_TI @ W_OI.T, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_loop_reads_or_writes_beyond_its_arrays(tokens: int) -> None:
    """Uncompiled, where Python looks: machine code would do it in silence."""
    code = f"""
import torch
from lrsd.numerics.nibbles import nibble_product, pack_nibbles, unpack_nibbles
values_IO = torch.randint(-12, 12, (70, 5), dtype=torch.int32)
values_IO[:40] *= 99
packed = pack_nibbles(values_IO, 1)
steps_I = torch.zeros(70, dtype=torch.uint8)
assert nibble_product(torch.zeros({tokens}, 70), packed, 1, steps_I, steps_I[:0], 1.0).shape == ({tokens}, 5)
assert torch.equal(unpack_nibbles(packed, 1), values_IO.T[:, packed["order"]])
"""
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1", "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_infinities_and_not_a_numbers_come_through(generator: torch.Generator) -> None:
    codes_IO = torch.randint(-30, 30, (90, 50), generator=generator, dtype=torch.int32)
    x_TI = torch.randn(3, 90, generator=generator)
    x_TI[0, 5], x_TI[1, 7] = torch.nan, torch.inf
    found, expected = product(x_TI, pack_nibbles(codes_IO, 1), 1), x_TI @ codes_IO.float()
    assert torch.equal(found.isfinite(), expected.isfinite())
    assert found[0].isnan().all()


def test_parts_of_the_columns_are_those_of_the_whole(generator: torch.Generator) -> None:
    codes_IO = torch.randint(-9, 9, (1300, 12), generator=generator, dtype=torch.int32)
    codes_IO[::20] *= 5_000
    packed = pack_nibbles(codes_IO, 1)
    bounds, whole = region_bounds(packed), unpack_nibbles(packed, 1)
    assert len(bounds) == 4, "two of four bits, one of a byte"
    parts = [unpack_nibbles(packed, 1, first, first + 1) for first in range(3)]
    assert [part.shape[1] for part in parts] == torch.tensor(bounds).diff().tolist()
    assert torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(unpack_nibbles(packed, 1, 1, 3), whole[:, bounds[1] :])


def test_threads_and_forked_children_compute_the_same(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nibbles, "_LEAST_WORK", 1)
    values_IO = on_grid(torch.randint(-30, 30, (2100, 40), generator=generator, dtype=torch.int32))
    packed = pack_nibbles(values_IO, 64)
    x_TI = torch.randn(2, 2100, generator=generator)
    alone, whole = product(x_TI, packed, 64).numpy(), unpack_nibbles(packed, 64).numpy()
    before = torch.get_num_threads()

    def use() -> None:
        """By numpy: torch's own threads hang in a child forked after their use."""
        torch.set_num_threads(3)
        try:
            np.testing.assert_allclose(product(x_TI, packed, 64).numpy(), alone, rtol=1e-4, atol=1e-2)
            assert (unpack_nibbles(packed, 64).numpy() == whole).all()
        finally:
            torch.set_num_threads(before)

    use()
    ended = run_in_fork(use)
    assert ended.returncode == 0, ended.stderr
