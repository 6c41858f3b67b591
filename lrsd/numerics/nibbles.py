"""Codes in memory at about five bits each, and products that read them in place, on a CPU.

A trellis-coded value v is kept as its code k (see `numerics.ans`): the grid of each follows from the parities
of the codes above it in its column. So a product walks down the rows with the paths of all columns side by
side, and k needs half the range of v. What four bits do not hold:
  columns for which that takes less room have a byte per code;
  any other code has in its place the nearest one of its parity that fits, so that the path stays, and half
  the difference goes into a list, row by row, four bits for it and a byte for its column;
  half differences that four bits do not hold go into a list of their own, at full width.

Columns are taken in regions of 1024: first those of four bits, then those of a byte. A region lies row by
row, filled up with codes of zero to a multiple of 64 columns. Differences are counted by row and block of
256.

| tensor  | size           | what                                                                     |
|---------|----------------|--------------------------------------------------------------------------|
| sizes   | (2,) int64     | rows, and how many columns are of four bits                              |
| order   | (I,) int32     | the columns as they lie                                                  |
| nibbles | uint8          | k + 8, the first half of a region's columns in the lower four bits       |
| bytes   | int8           | k                                                                        |
| counts  | (B, O) uint8   | how many differences there are in each row of each block of nibbles      |
| begins  | (R + 1,) int64 | where those of each region begin, row by row and block by block          |
| places  | (E,) uint8     | their columns within the block                                           |
| halves  | uint8          | the differences, halved, + 8, the first of two in the lower bits         |
| far     | (F, 3) int32   | row, column as they lie, difference halved                               |
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrsd.numerics.compiled import compiled, reordered, side_by_side

_REGION, _BLOCK = 1024, 256
# Regions are filled up to vectors of 32 bytes, and columns of a byte are so many at a time.
_FILL_NIBBLES, _BYTES = 64, 32
# Bits of a difference, and of a far one.
_NEAR_BITS, _FAR_BITS = 12, 96
# Multiplications that are worth another thread, which takes some 50 microseconds to start.
_LEAST_WORK = 1 << 21
NIBBLES = ("sizes", "order", "nibbles", "bytes", "counts", "begins", "places", "halves", "far")
# 2^(i / 8), as `rounding.column_steps` has it.
_STEPS = np.ldexp(np.array([2.0 ** (i % 8 / 8) for i in range(256)], np.float32), np.arange(256) // 8)

Packed = Mapping[str, Tensor]


class _Arrays(NamedTuple):
    """What the loops read."""

    order: NDArray[np.int32]
    nibbles: NDArray[np.uint8]
    whole: NDArray[np.int8]
    counts: NDArray[np.uint8]
    begins: NDArray[np.int64]
    places: NDArray[np.uint8]
    halves: NDArray[np.uint8]
    far: NDArray[np.int32]
    rows: int
    narrow: int

    @staticmethod
    def of(packed: Packed) -> _Arrays:
        arrays = (packed[name].numpy() for name in NIBBLES[1:])
        return _Arrays._make([*arrays, *packed["sizes"].tolist()])

    @property
    def regions(self) -> int:
        return len(self.begins) - 1 + -(-(self.order.size - self.narrow) // _REGION)


def pack_nibbles(values_IO: Tensor, states: int) -> dict[str, Tensor]:
    """Integers, column by column (I, O), as the tensors above, |v| < 2^30.

    states: 1: k is v; 64: v must be on the grid of its path, k = (v + (v mod 2) sign(v)) / 2.
    """
    v_IO = values_IO.numpy()
    columns, rows = v_IO.shape
    trellis = states > 1
    beyond = np.zeros((columns, 3), np.int64)
    for first in range(0, columns, _BLOCK):
        span = slice(first, first + _BLOCK)
        _count(v_IO[span].astype(np.int32), trellis, beyond[span])
    order, narrow = _order(beyond, rows)
    of_nibbles, of_bytes = order[:narrow], order[narrow:]
    nibbles = np.empty(rows * _filled(narrow, _FILL_NIBBLES) // 2, np.uint8)
    whole = np.empty(rows * of_bytes.size, np.int8)
    counts = np.zeros((-(-narrow // _BLOCK), rows), np.uint8)
    begins = np.zeros(-(-narrow // _REGION) + 1, np.int64)
    places = np.empty(int(beyond[of_nibbles, 0].sum()), np.uint8)
    halves = np.zeros(places.size + 1, np.uint8)  # a byte each, for now
    # A row of a block has room for 255 differences: a full one leaves one over.
    giants = beyond[of_nibbles, 1].sum() + beyond[of_bytes, 2].sum()
    far = np.empty((int(giants) + counts.size, 3), np.int32)
    far_used = 0
    for region, first in enumerate(range(0, narrow, _REGION)):
        chosen = order[first : min(first + _REGION, narrow)]
        k = np.zeros((_filled(chosen.size, _FILL_NIBBLES), rows), np.int32)
        k[: chosen.size] = v_IO[chosen]
        part = nibbles[rows * first // 2 :][: k.size // 2].reshape(rows, -1)
        blocks = counts[first // _BLOCK : (first + _REGION) // _BLOCK]
        begin = begins[region]
        lists = places[begin:], halves[begin:], far
        taken, far_used = _pack(k, trellis, first, part, blocks, *lists, far_used)
        begins[region + 1] = begin + taken
    for first in range(narrow, columns, _REGION):
        chosen = order[first : first + _REGION]
        part = whole[rows * (first - narrow) :][: rows * chosen.size].reshape(rows, -1)
        far_used = _pack_bytes(v_IO[chosen].astype(np.int32), trellis, first, part, far, far_used)
    used = int(begins[-1])
    pairs = halves[: used + used % 2].reshape(-1, 2)
    found = (
        np.array([rows, narrow]), order, nibbles, whole, counts, begins, places[:used].copy(),
        pairs[:, 0] | pairs[:, 1] << 4, far[:far_used].copy(),
    )  # fmt: skip
    return dict(zip(NIBBLES, map(torch.from_numpy, found), strict=True))


def region_bounds(packed: Packed) -> list[int]:
    """Where, among the columns as they lie, each region begins, and the number of columns."""
    narrow, columns = int(packed["sizes"][1]), packed["order"].numel()
    return [*range(0, narrow, _REGION), *range(narrow, columns, _REGION), columns]


def unpack_nibbles(packed: Packed, states: int, first: int = 0, last: int | None = None) -> Tensor:
    """The integers (O, columns as they lie) in int32, of regions `first` to `last`, by default all."""
    arrays, bounds = _Arrays.of(packed), region_bounds(packed)
    last = arrays.regions if last is None else last
    values = np.empty((arrays.rows, bounds[last] - bounds[first]), np.int32)
    shares = _shares(first, last, values.size)

    def one(part: int) -> None:
        begin, end = shares[part]
        _unpack(arrays, states > 1, begin, end, bounds[begin], bounds[end], bounds[first], values)

    side_by_side(one, len(shares))
    return torch.from_numpy(values)


def nibble_product(
    x_TI: Tensor, packed: Packed, states: int, steps_I: Tensor, row_steps_O: Tensor, scale: float
) -> Tensor:
    """y = scale (x 2^(steps / 8)) Q^T 2^(row_steps / 8), Q the integers (O, I).

    Args: x (T, I) float32; steps (I,), row_steps (O,) or (0,) uint8. Returns: (T, O) float32.
    """
    arrays = _Arrays.of(packed)
    inputs = x_TI.numpy(), steps_I.numpy(), row_steps_O.numpy(), np.float32(scale)
    shares = _shares(0, arrays.regions, arrays.rows * x_TI.numel())
    sums: list[Any] = [None] * len(shares)

    def one(part: int) -> None:
        sums[part] = _product(arrays, states > 1, *shares[part], *inputs)

    side_by_side(one, len(shares))
    for other in sums[1:]:
        sums[0] += other
    return torch.from_numpy(sums[0])


def _shares(first: int, last: int, work: int) -> list[tuple[int, int]]:
    """First and last region of each thread's share."""
    parts = max(1, min(torch.get_num_threads(), last - first, work // _LEAST_WORK))
    bounds = [first + part * (last - first) // parts for part in range(parts + 1)]
    return list(pairwise(bounds))


def _order(beyond: NDArray[np.int64], rows: int) -> tuple[NDArray[np.int32], int]:
    """The columns as they are to lie, and how many of four bits. beyond: see `_count`."""
    near = beyond[:, 0] - beyond[:, 1]
    gain = _NEAR_BITS * near + _FAR_BITS * (beyond[:, 1] - beyond[:, 2]) - 4 * rows
    by_gain = np.argsort(-gain, kind="stable")
    totals = np.append(0, np.cumsum(gain[by_gain]))[::_BYTES]
    wide = _BYTES * int(totals.argmax())
    return np.append(np.sort(by_gain[wide:]), np.sort(by_gain[:wide])).astype(np.int32), len(beyond) - wide


def _filled(columns: int, block: int) -> int:
    return -(-columns // block) * block


@compiled
def _code(value, trellis):  # type: ignore[no-untyped-def]
    """k of v: odd values are those of grid 1, a step nearer to zero than twice their code."""
    if trellis:
        value = (value + (value & 1) * (np.int32(value > 0) - np.int32(value < 0))) >> 1
    return np.int32(value)


@compiled
def _nearest(code, low):  # type: ignore[no-untyped-def]
    """The nearest number of the same parity from the even `low` to -low - 1."""
    odd = code & 1
    return min(max(code, np.int32(low + odd)), np.int32(-low - 2 + odd))


@compiled
def _count(v, trellis, beyond):  # type: ignore[no-untyped-def]
    """How many codes of each column four bits do not hold, of how many the difference may be far, and that
    from a byte (J, 3)."""
    for j in range(v.shape[0]):
        more, far, most = np.int32(0), np.int32(0), np.int32(0)
        for i in range(v.shape[1]):
            code = _code(v[j, i], trellis)
            more += np.int32(code > 7) | np.int32(code < -8)
            far += np.int32(code > 21) | np.int32(code < -24)
            most += np.int32(code > 127) | np.int32(code < -128)
        beyond[j, 0], beyond[j, 1], beyond[j, 2] = more, far, most


@compiled
def _pack(v, trellis, first, nibbles, counts, places, halves, far, far_used):  # type: ignore[no-untyped-def]
    """One region, column by column. Returns how many differences it has, and how many far ones there are."""
    columns, rows = v.shape
    half, blocks = columns // 2, counts.shape[0]
    beyond = np.zeros((blocks, rows), np.int32)
    for j in range(columns):
        for i in range(rows):
            code = _code(v[j, i], trellis)
            v[j, i] = code
            beyond[j // _BLOCK, i] += np.int32(code > 7) | np.int32(code < -8)
    at, end = np.empty((blocks, rows), np.int64), np.empty((blocks, rows), np.int64)
    used = 0
    for i in range(rows):
        for block in range(blocks):
            counts[block, i] = min(beyond[block, i], np.int32(255))
            at[block, i], used = used, used + counts[block, i]
            end[block, i] = used
    for j in range(columns):
        block = j // _BLOCK
        for i in range(rows):
            code = v[j, i]
            if -8 <= code <= 7:
                continue
            near = _nearest(code, -8)
            v[j, i] = near
            difference, place = (code - near) >> 1, at[block, i]
            if -8 <= difference <= 7 and place < end[block, i]:
                places[place], halves[place] = j % _BLOCK, difference + 8
                at[block, i] += 1
            else:
                far[far_used, 0], far[far_used, 1], far[far_used, 2] = i, first + j, difference
                far_used += 1
    for i in range(rows):  # places that were kept for what turned out to be far
        for block in range(blocks):
            for place in range(at[block, i], end[block, i]):
                places[place], halves[place] = 0, 8
    for top in range(0, rows, 64):
        for j in range(half):
            for i in range(top, min(top + 64, rows)):
                nibbles[i, j] = (v[j, i] + 8) | (v[half + j, i] + 8) << 4
    return used, far_used


@compiled
def _pack_bytes(v, trellis, first, whole, far, far_used):  # type: ignore[no-untyped-def]
    """Columns of a byte for each code. Returns how many far differences there are."""
    columns, rows = v.shape
    for j in range(columns):
        for i in range(rows):
            code = _code(v[j, i], trellis)
            near = _nearest(code, -128)
            whole[i, j] = near
            if near != code:
                far[far_used, 0], far[far_used, 1], far[far_used, 2] = i, first + j, (code - near) >> 1
                far_used += 1
    return far_used


@compiled
def _product(held, trellis, first, last, x, steps, row_steps, scale):  # type: ignore[no-untyped-def]
    """A share of `nibble_product`; far differences belong to that of region 0."""
    tokens, order, narrow, far = x.shape[0], held.order, held.narrow, held.far
    behind = (narrow + _FILL_NIBBLES - 1) // _FILL_NIBBLES * _FILL_NIBBLES
    scaled = np.zeros((tokens, behind + order.size - narrow), np.float32)
    for j in range(order.size):
        step = _STEPS[steps[order[j]]] * scale
        for t in range(tokens):
            scaled[t, j if j < narrow else behind + j - narrow] = x[t, order[j]] * step
    y = np.zeros((tokens, held.rows), np.float32)
    nothing = np.empty((0, 0), np.int32)
    of_nibbles = held.begins.size - 1
    for region in range(first, last):
        if region < of_nibbles:
            _nibbles(held, trellis, region, scaled, y, 0, nothing)
        else:
            _bytes(held, trellis, region - of_nibbles, scaled, behind, y, 0, nothing)
    if first == 0:
        for f in range(far.shape[0]):
            column = far[f, 1] if far[f, 1] < narrow else behind + far[f, 1] - narrow
            for t in range(tokens):
                y[t, far[f, 0]] += np.float32(far[f, 2] * (4 if trellis else 2)) * scaled[t, column]
    for i in range(row_steps.size):
        for t in range(tokens):
            y[t, i] *= _STEPS[row_steps[i]]
    return y


@compiled
def _unpack(held, trellis, first, last, begin, end, origin, out):  # type: ignore[no-untyped-def]
    """A share of `unpack_nibbles`: columns `begin` to `end`, the first of `out` being `origin`."""
    far, of_nibbles = held.far, held.begins.size - 1
    nothing = np.empty((0, 0), np.float32)
    for region in range(first, last):
        if region < of_nibbles:
            _nibbles(held, trellis, region, nothing, nothing, origin, out)
        else:
            _bytes(held, trellis, region - of_nibbles, nothing, 0, nothing, origin - held.narrow, out)
    for f in range(far.shape[0]):
        if begin <= far[f, 1] < end:
            out[far[f, 0], far[f, 1] - origin] += far[f, 2] * (4 if trellis else 2)


@compiled
def _step(code, state):  # type: ignore[no-untyped-def]
    """The sign of a code on grid 1, 0 on grid 0, and the state below. In bytes throughout, so that a vector
    holds as many columns as it has bytes."""
    grid = np.uint8(np.uint8(state >> np.uint8(1)) ^ np.uint8(state >> np.uint8(3))) & np.uint8(1)
    odd = np.uint8(np.uint8(code) ^ state ^ np.uint8(state >> np.uint8(5))) & np.uint8(1)
    sign = np.int8(np.int8(code > 0) - np.int8(code < 0))
    return np.int8(sign & np.int8(-np.int8(grid))), np.uint8(np.uint8(state + state) | odd)


@reordered
def _nibbles(held, trellis, region, x, y, origin, out):  # type: ignore[no-untyped-def]
    """Down the rows of a region: products with x (T, I') added to y (T, O), and the integers into out (O, I),
    whose first column is `origin`, unless it is empty. Without far differences."""
    nibbles, counts, places, halves = held.nibbles, held.counts, held.places, held.halves
    rows, narrow = held.rows, held.narrow
    tokens = x.shape[0]
    scale = np.int8(4 if trellis else 2)
    place, one = np.uint64(held.begins[region]), np.uint64(1)
    # Unsigned, or each index would be asked whether it counts from the end, and nothing vectorized.
    left = np.uint64(region * _REGION)
    known = np.uint64(min(_REGION, narrow - region * _REGION))
    size = (known + np.uint64(_FILL_NIBBLES - 1)) // np.uint64(_FILL_NIBBLES) * np.uint64(_FILL_NIBBLES)
    half = size // np.uint64(2)
    at = np.uint64(rows * region * _REGION // 2)
    first_block = region * (_REGION // _BLOCK)
    blocks = min(_REGION // _BLOCK, counts.shape[0] - first_block)
    column = left - np.uint64(origin)
    v, path = np.empty(_REGION, np.int8), np.zeros(_REGION, np.uint8)
    for i in range(rows):
        for j in range(half):
            v[j] = np.int8(nibbles[at + j] & np.uint8(15)) - np.int8(8)
        for j in range(half):
            v[half + j] = np.int8(nibbles[at + j] >> np.uint8(4)) - np.int8(8)
        at += half
        if trellis:
            for chunk in range(size >> np.uint64(5)):  # of as many columns as a vector has bytes
                base = chunk << np.uint64(5)
                for j in range(np.uint64(32)):
                    sign, path[base + j] = _step(v[base + j], path[base + j])
                    v[base + j] = np.int8(v[base + j] + v[base + j]) - sign
        for block in range(blocks):
            behind = place + np.uint64(counts[first_block + block, i])
            for e in range(place, behind):
                four_bits = halves[e >> one] >> np.uint8((e & one) << np.uint64(2)) & np.uint8(15)
                v[block * _BLOCK + places[e]] += scale * (np.int8(four_bits) - np.int8(8))
            place = behind
        for t in range(tokens):
            total = np.float32(0)
            for j in range(size):
                total += np.float32(v[j]) * x[t, left + j]
            y[t, i] += total
        if out.size:
            for j in range(known):
                out[i, column + j] = v[j]


@reordered
def _bytes(held, trellis, region, x, behind, y, origin, out):  # type: ignore[no-untyped-def]
    """The same for a region of the columns with a byte per code; their x begins at `behind`."""
    whole, rows, wide = held.whole, held.rows, held.order.size - held.narrow
    tokens = x.shape[0]
    left = np.uint64(region * _REGION)
    size = np.uint64(min(_REGION, wide - region * _REGION))
    at, offset = np.uint64(rows * region * _REGION), np.uint64(behind) + left
    column = np.uint64(np.int64(left) - origin)
    v, path = np.empty(_REGION, np.int16), np.zeros(_REGION, np.uint8)
    sign = np.empty(_REGION, np.int8)
    for i in range(rows):
        for chunk in range(size >> np.uint64(5)):
            base = chunk << np.uint64(5)
            if trellis:
                for j in range(np.uint64(32)):
                    sign[base + j], path[base + j] = _step(whole[at + base + j], path[base + j])
                for j in range(np.uint64(32)):
                    code = np.int16(whole[at + base + j])
                    v[base + j] = np.int16(code + code) - np.int16(sign[base + j])
            else:
                for j in range(np.uint64(32)):
                    v[base + j] = whole[at + base + j]
        at += size
        for t in range(tokens):
            total = np.float32(0)
            for j in range(size):
                total += np.float32(v[j]) * x[t, offset + j]
            y[t, i] += total
        if out.size:
            for j in range(size):
                out[i, column + j] = v[j]
