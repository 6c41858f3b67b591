"""Matrices of codes come back as they went in, near their entropy; damage is an error."""

import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
import torch
from forks import run_in_fork
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_decoder import decoded_stream
from torch import Tensor

from lrsd.numerics import ans_counts, ans_lanes, ans_side
from lrsd.numerics.ans import ans_decode, ans_encode

LIMIT = 2**30 - 1
SLOW = pytest.mark.slow
LONG = [(1, 5000), (5000, 1), (3, 70_000), (70_000, 3)]
DAMAGED = "entropy-coded stream is damaged: "


def trellis(codes_IO: Tensor) -> tuple[Tensor, Tensor]:
    """Values and grids of codes k, column by column, as the standard has them."""
    values, grids = torch.zeros_like(codes_IO), torch.zeros_like(codes_IO)
    state = torch.zeros(codes_IO.shape[0], dtype=codes_IO.dtype)
    for row in range(codes_IO.shape[1]):
        code, grid = codes_IO[:, row], (state >> 1 ^ state >> 3) & 1
        values[:, row], grids[:, row] = 2 * code - grid * code.sign(), grid
        state = (state << 1 | (code ^ state ^ state >> 5) & 1) & 63
    return values, grids


def no_hints(values_IO: Tensor) -> tuple[Tensor, Tensor]:
    columns, rows = values_IO.shape
    return torch.zeros(rows, dtype=torch.int64), torch.zeros(columns, dtype=torch.int64)


def sealed(stream: Tensor, shape: tuple[int, int]) -> Tensor:
    """With a checksum that fits, so that what is behind it has to notice damage."""
    data = bytes(stream.tolist())
    sizes = b"".join(size.to_bytes(8, "little") for size in shape)
    checksum = zlib.crc32(data[:8] + sizes + data[12:]).to_bytes(4, "little")
    return torch.tensor(list(data[:8] + checksum + data[12:]), dtype=torch.uint8)


def assert_survives(values_IO: Tensor, states: int, *hints: Tensor) -> Tensor:
    hints = hints or no_hints(values_IO)
    stream = ans_encode(values_IO, states, *hints)
    decoded = ans_decode(stream, states, *hints)
    assert torch.equal(decoded.long(), values_IO.long())
    largest = int(values_IO.abs().max()) if values_IO.numel() else 0
    assert decoded.dtype == (
        torch.int8 if largest <= 127 else torch.int16 if largest < 2**15 else torch.int32
    )
    return stream


def scaled(generator: torch.Generator, columns: int, rows: int, deviation: float, spread: float) -> Tensor:
    """Normal codes whose rows' and columns' deviations differ by factors of about e^spread."""
    scale = torch.randn(columns, 1, generator=generator) + torch.randn(1, rows, generator=generator)
    return (
        (torch.randn(columns, rows, generator=generator) * deviation * (spread * scale).exp()).round().long()
    )


@settings(deadline=None)
@given(
    st.integers(0, 9),
    st.integers(0, 9),
    st.sampled_from([1, 64]),
    st.data(),
)
def test_any_integers_and_hints_survive(columns: int, rows: int, states: int, data: st.DataObject) -> None:
    limit = LIMIT if states == 1 else LIMIT // 2
    number = st.one_of(st.integers(-3, 3), st.integers(-300, 300), st.integers(-limit, limit))
    codes = data.draw(st.lists(number, min_size=columns * rows, max_size=columns * rows))
    hint = st.one_of(st.integers(-40, 40), st.integers(-(2**63), 2**63 - 1))
    row_hints = torch.tensor(data.draw(st.lists(hint, min_size=rows, max_size=rows)), dtype=torch.int64)
    column_hints = torch.tensor(
        data.draw(st.lists(hint, min_size=columns, max_size=columns)), dtype=torch.int64
    )
    values = torch.tensor(codes, dtype=torch.int64).view(columns, rows)
    values = trellis(values)[0] if states == 64 else values
    assert_survives(values, states, row_hints, column_hints)


@pytest.mark.parametrize("states", [1, 64])
@pytest.mark.parametrize("deviation", [0.02, 0.3, 2, 15, 200, 3e5])
@pytest.mark.parametrize("shape", [(31, 70), (1, 500), (500, 1), (6, 9), (0, 5), (5, 0)])
def test_the_documented_layout_is_that_of_the_stream(
    generator: torch.Generator, shape: tuple[int, int], deviation: float, states: int
) -> None:
    codes = scaled(generator, *shape, deviation, 0.5)
    codes[: shape[0] // 9] = LIMIT // 2
    values = trellis(codes)[0] if states == 64 else codes
    rows, columns = (torch.randint(-9, 9, (n,), generator=generator) for n in reversed(shape))
    data = bytes(ans_encode(values, states, rows, columns).tolist())
    assert decoded_stream(data, states, rows.tolist(), columns.tolist()) == values.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("states", [1, 64])
def test_the_documented_layout_is_that_of_several_chunks(generator: torch.Generator, states: int) -> None:
    codes = scaled(generator, 333, 901, 3, 0.3)
    values = trellis(codes)[0] if states == 64 else codes
    rows, columns = no_hints(values)
    data = bytes(ans_encode(values, states, rows, columns).tolist())
    assert decoded_stream(data, states, rows.tolist(), columns.tolist()) == values.tolist()


@pytest.mark.parametrize("states", [1, 64])
@pytest.mark.parametrize("deviation", [0.02, 2, 3e5, *(pytest.param(d, marks=SLOW) for d in (0.3, 15, 200))])
@pytest.mark.parametrize("shape", [(301, 700), *(pytest.param(s, marks=SLOW) for s in LONG)])
def test_any_shape_and_deviation_survives(
    generator: torch.Generator, shape: tuple[int, int], deviation: float, states: int
) -> None:
    codes = scaled(generator, *shape, deviation, 0.5)
    codes[:: max(shape[0] // 5, 2)] = 0
    codes[:, :: max(shape[1] // 5, 2)] = 0
    codes[-1, -1] = LIMIT // 2
    assert_survives(trellis(codes)[0] if states == 64 else codes, states)


@pytest.mark.parametrize("states", [1, 64])
def test_heavy_tails_survive(generator: torch.Generator, states: int) -> None:
    cauchy = torch.randn(400, 500, generator=generator) / torch.randn(400, 500, generator=generator)
    codes = cauchy.clamp(-1e8, 1e8).round().long()
    assert_survives(trellis(codes)[0] if states == 64 else codes, states)


@pytest.mark.parametrize("states", [1, 64])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (1, 1), (1000, 1000)])
def test_zeros_take_a_few_dozen_bytes(shape: tuple[int, int], states: int) -> None:
    stream = assert_survives(torch.zeros(shape, dtype=torch.int8), states)
    chunks = -(-shape[0] * shape[1] // 2**17)
    assert stream.numel() <= 44 + 22 * chunks + sum(shape) // 40


def bits_over_entropy(codes: Tensor, grids: Tensor, stream: Tensor, rows: Tensor, columns: Tensor) -> float:
    """Bits per number beyond the entropy of the magnitudes and signs given class and grid."""
    folded = (columns[:, None] + rows) * 2 + grids
    joint = (folded - folded.min()) * 2**20 + codes + 2**19
    bits = 0.0
    for counts, sign in ((joint, -1), (folded, 1)):
        numbers = counts.flatten().unique(return_counts=True)[1].double()
        bits += sign * float((numbers * numbers.log2()).sum())
    return (8 * stream.numel() - bits) / codes.numel()


@pytest.mark.parametrize("states", [1, 64])
@pytest.mark.parametrize("deviation", [0.3, 4, *(pytest.param(d, marks=SLOW) for d in (0.7, 1.5, 12, 100))])
def test_normal_codes_take_little_more_than_their_entropy(
    generator: torch.Generator, deviation: float, states: int
) -> None:
    columns = torch.randint(-6, 7, (1000,), generator=generator)
    rows = torch.randint(-4, 5, (700,), generator=generator)
    scale = deviation * torch.exp2((columns[:, None] + rows) / 4)
    codes = (torch.randn(scale.shape, generator=generator) * scale).round().long()
    values, grids = trellis(codes) if states == 64 else (codes, torch.zeros_like(codes))
    # Entropy of the normal cells themselves: the empirical one of many values is too low by their number.
    middle = torch.arange(-9000, 9001, dtype=torch.float64)
    bits = torch.zeros((), dtype=torch.float64)
    for total, count in zip(*(columns[:, None] + rows).unique(return_counts=True), strict=True):
        width = deviation * 2 ** (float(total) / 4) * 2**0.5
        cell = (torch.erf((middle + 0.5) / width) - torch.erf((middle - 0.5) / width)) / 2
        bits += count * torch.special.entr(cell).sum() / np.log(2)
    stream = assert_survives(values, states, rows, columns)
    assert 8 * stream.numel() / codes.numel() - float(bits) / codes.numel() <= 0.018
    assert bits_over_entropy(codes, grids, stream, rows, columns) <= 0.018 + 0.005 * deviation**0.5


def test_true_hints_are_worth_their_bits(generator: torch.Generator) -> None:
    columns = torch.randint(-40, 41, (500,), generator=generator)
    rows = torch.randint(-10, 11, (600,), generator=generator)
    codes = (
        torch.randn(500, 600, generator=generator) * 4 * torch.exp2((columns[:, None] + rows) / 4)
    ).round()
    told = assert_survives(codes.long(), 1, rows, columns).numel()
    untold = assert_survives(codes.long(), 1).numel()
    assert told + 300 <= untold <= told + 1200  # six bits or less per row and column


def test_one_giant_costs_its_own_bits_only(generator: torch.Generator) -> None:
    codes = torch.randn(300, 400, generator=generator).round().long()
    plain = ans_encode(codes, 1, *no_hints(codes)).numel()
    codes[17, 133] = 2**29
    assert ans_encode(codes, 1, *no_hints(codes)).numel() <= plain + 2000


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_bytes_do_not_depend_on_the_dtype(generator: torch.Generator, dtype: torch.dtype) -> None:
    codes = scaled(generator, 40, 50, 3, 0.2).clamp(-127, 127)
    hints = no_hints(codes)
    assert torch.equal(ans_encode(codes.to(dtype), 1, *hints), ans_encode(codes, 1, *hints))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("states", [1, 64])
def test_nothing_depends_on_the_number_of_threads(
    generator: torch.Generator, threads: Callable[[int], None], states: int
) -> None:
    codes = scaled(generator, 1100, 700, 3, 0.5)
    values = trellis(codes)[0] if states == 64 else codes
    streams = []
    for number in (1, 2, 5):
        threads(number)
        streams.append(assert_survives(values, states))
    assert all(torch.equal(stream, streams[0]) for stream in streams)


def test_a_child_forked_after_threads_were_used_uses_them_too(
    generator: torch.Generator, threads: Callable[[int], None]
) -> None:
    """OpenMP's would abort it, or hang."""
    codes = scaled(generator, 300, 900, 3, 0.5)

    def use() -> None:
        hints = no_hints(codes)
        decoded = ans_decode(ans_encode(codes, 1, *hints), 1, *hints)
        assert (decoded.numpy() == codes.numpy()).all()

    threads(2)
    use()
    ended = run_in_fork(use)
    assert ended.returncode == 0, ended.stderr


def test_layers_may_be_coded_at_the_same_time(
    generator: torch.Generator, threads: Callable[[int], None]
) -> None:
    layers = [scaled(generator, 300, 900, deviation, 0.5) for deviation in (1, 2, 3, 4)]
    alone = [assert_survives(codes, 1) for codes in layers]
    threads(2)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda codes: assert_survives(codes, 1), layers))
    assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))


def test_everything_is_compiled_once() -> None:
    """For all dtypes and numbers of states: each further copy of the code takes seconds."""
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        for states in (1, 64):
            assert_survives(torch.eye(9, dtype=dtype) * 100, states)
    for module in (ans_counts, ans_lanes, ans_side):
        copies = {name: len(f.signatures) for name, f in vars(module).items() if hasattr(f, "signatures")}
        assert copies
        assert set(copies.values()) <= {0, 1}, copies  # 0: read from the cache, as a part of another


@pytest.fixture
def damageable(generator: torch.Generator) -> Tensor:
    codes = scaled(generator, 11, 20, 2, 0.5)
    codes[7, 7], codes[3] = 100_000, codes[3] * 1000
    return codes


@pytest.mark.parametrize("states", [1, 64])
def test_any_damage_is_an_error(damageable: Tensor, states: int) -> None:
    """Raw low bits too, which have no redundancy of their own."""
    values = trellis(damageable)[0] if states == 64 else damageable
    hints = no_hints(values)
    stream = ans_encode(values, states, *hints)
    wrong = [stream[:cut] for cut in range(stream.numel())]
    wrong += [torch.cat([stream, more]) for more in (stream[:1], stream, torch.zeros(1, dtype=torch.uint8))]
    for place in range(stream.numel()):
        for flipped in (1, 128, 255):
            damaged = stream.clone()
            damaged[place] ^= flipped
            wrong.append(damaged)
    for damaged in wrong:
        with pytest.raises(ValueError, match=DAMAGED):
            ans_decode(damaged, states, *hints)


@pytest.mark.parametrize("states", [1, 64])
def test_damage_behind_a_checksum_that_fits_is_an_error_or_other_codes_never_a_crash(
    damageable: Tensor, states: int
) -> None:
    values = trellis(damageable)[0] if states == 64 else damageable
    hints, shape = no_hints(values), tuple(values.shape)
    stream = ans_encode(values, states, *hints)
    passed = 0
    for place in range(stream.numel()):
        for flipped in (1, 255):
            damaged = stream.clone()
            damaged[place] ^= flipped
            with suppress(ValueError):
                assert ans_decode(sealed(damaged, shape), states, *hints).shape == values.shape
                passed += 1
    assert passed <= stream.numel()  # of twice as many
    for cut in range(12, stream.numel()):
        with pytest.raises(ValueError, match=DAMAGED):
            ans_decode(sealed(stream[:cut], shape), states, *hints)


@settings(deadline=None)
@given(st.binary(max_size=300), st.sampled_from([1, 64]), st.integers(0, 40), st.integers(0, 40))
def test_any_bytes_are_an_error_or_codes(data: bytes, states: int, rows: int, columns: int) -> None:
    """Behind a header that passes: what counts is that the side information and the words are checked."""
    hints = torch.zeros(rows, dtype=torch.int64), torch.zeros(columns, dtype=torch.int64)
    chunks = int(rows * columns > 0)
    words = len(data) // 2 // 2 if chunks else 0
    head = bytes([1, states, 1, 0]) + (len(data) - 2 * words).to_bytes(4, "little") + bytes(4)
    head += words.to_bytes(4, "little") * chunks
    stream = sealed(torch.tensor(list(head + data), dtype=torch.uint8), (columns, rows))
    with suppress(ValueError):
        assert ans_decode(stream, states, *hints).shape == (columns, rows)


def test_wrong_shapes_and_states_are_errors(generator: torch.Generator) -> None:
    codes = scaled(generator, 20, 30, 2, 0.5)
    rows, columns = no_hints(codes)
    stream = ans_encode(codes, 1, rows, columns)
    for wrong in ((rows[1:], columns), (rows, columns[1:]), (columns, rows), (rows[:0], columns[:0])):
        with pytest.raises(ValueError, match=DAMAGED):
            ans_decode(stream, 1, *wrong)
    nothing = ans_encode(codes[:0], 1, rows, columns[:0])
    with pytest.raises(ValueError, match=DAMAGED):
        ans_decode(nothing, 1, rows[1:], columns[:0])
    with pytest.raises(ValueError, match="1 states"):
        ans_decode(stream, 8, rows, columns)
    with pytest.raises(ValueError, match="hints must be for"):
        ans_encode(codes, 1, rows[1:], columns)
    with pytest.raises(ValueError, match="states must be 1 or 64"):
        ans_encode(codes, 4, rows, columns)


@pytest.mark.parametrize("states", [1, 64])
def test_zeros_of_another_shape_are_an_error_too(states: int) -> None:
    """Nothing but the checksum tells them apart."""
    for columns, rows in ((4, 7), (8, 8), (0, 5), (9, 0)):
        zeros = torch.zeros(columns, rows, dtype=torch.int8)
        stream = ans_encode(zeros, states, *no_hints(zeros))
        for wrong in ((columns + 1, rows), (columns, rows + 1), (rows, columns + 2), (columns + 1, rows + 1)):
            with pytest.raises(ValueError, match="its checksum is not that of"):
                ans_decode(stream, states, *no_hints(torch.zeros(wrong)))


def test_a_chunk_that_does_not_decode_is_named(generator: torch.Generator) -> None:
    codes = scaled(generator, 600, 500, 2, 0.2)
    stream = ans_encode(codes, 1, *no_hints(codes))
    stream[-1000] ^= 4
    with pytest.raises(ValueError, match="damaged: chunk 2 of 3 does not decode"):
        ans_decode(sealed(stream, (600, 500)), 1, *no_hints(codes))


def test_a_small_stream_allocates_little(generator: torch.Generator) -> None:
    """Lengths that the header claims are not believed."""
    codes = scaled(generator, 20, 30, 2, 0.5)
    stream = ans_encode(codes, 1, *no_hints(codes))
    stream[12:16] = 255
    stream = sealed(stream, (20, 30))
    tracemalloc.start()
    with pytest.raises(ValueError, match="bytes, expected"):
        ans_decode(stream, 1, *no_hints(codes))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


def test_values_off_the_grid_of_their_state_are_refused(generator: torch.Generator) -> None:
    values = trellis(scaled(generator, 20, 30, 2, 0.5))[0]
    wrong = torch.tensor([[1, 0]])  # state 0 has even values only
    with pytest.raises(ValueError, match="column 0 has a value off the grid"):
        ans_encode(wrong, 64, *no_hints(wrong))
    with pytest.raises(ValueError, match=r"column \d+ has a value off the grid"):
        ans_encode(values * 2 + 1, 64, *no_hints(values))


@pytest.mark.parametrize("value", [2**30, -(2**30)])
def test_values_beyond_the_format_are_refused(value: int) -> None:
    values = torch.tensor([[value]])
    with pytest.raises(ValueError, match=r"below 2\^30"):
        ans_encode(values, 1, *no_hints(values))
