"""What the encoder of `ans` counts: deviations of rows and columns, and magnitudes by class and context."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lrsd.numerics.ans_tables import (
    LARGEST,
    LARGEST_PART,
    LEAST,
    LEAST_PART,
    MOST,
    NUM_CLASSES,
    NUM_SUMS,
    shift_of,
)
from lrsd.numerics.compiled import compiled, in_threads

# Every machine is to add floats in the same order: in this many parts, whatever the number of threads.
_PARTS = 16


def choose_classes(values: NDArray, trellis: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """4 log2 of the rows' and columns' deviations: of columns alone, rows given these, columns given rows."""
    columns, rows = values.shape
    nothing_O, nothing_I = np.zeros(rows, np.int64), np.zeros(columns, np.int64)
    column = _to_class(_energies(values, trellis, nothing_O, nothing_I)[1] / max(rows, 1))
    alive = max(int((column > LEAST_PART // 2).sum()), 1)
    row = _to_class(_energies(values, trellis, nothing_O, column)[0] / alive)
    column = _to_class(_energies(values, trellis, row, column)[1] / max(rows, 1))
    return row, column


def _to_class(energies: NDArray) -> NDArray[np.int64]:
    """Half the least class where there is nothing, so that the sum is at the least whatever the other."""
    quarter_octaves = 2 * np.log2(np.maximum(energies, 1e-30))
    classes = np.rint(quarter_octaves).clip(LEAST_PART // 2, LARGEST_PART)
    return np.asarray(classes.astype(np.int64))


def _energies(
    values: NDArray, trellis: bool, row_O: NDArray[np.int64], column_I: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums of k^2: of every row, with the columns' classes divided out, and of every column, with the rows'.

    Raises: ValueError for values off the grid of their state.
    """
    columns, rows = values.shape
    weights_O, weights_I = (np.exp2(classes / -2).astype(np.float32) for classes in (row_O, column_I))
    of_rows = np.zeros((_PARTS, rows), np.float32)
    of_columns, off = np.zeros(columns), np.zeros(columns, np.bool_)

    def one(part: int) -> None:
        span = _span(part, columns)
        _add_energies(
            values[span].astype(np.int32), int(trellis), weights_O, weights_I[span], of_rows[part],
            of_columns[span], off[span],
        )  # fmt: skip

    in_threads(one, range(_PARTS if values.size else 0))
    if off.any():
        raise ValueError(f"column {int(off.argmax())} has a value off the grid of its trellis state")
    return of_rows.astype(np.float64).sum(0), of_columns


def _span(part: int, columns: int) -> slice:
    return slice(part * columns // _PARTS, (part + 1) * columns // _PARTS)


@compiled
def _add_energies(values, trellis, weights_O, weights_I, of_rows, of_columns, off):  # type: ignore[no-untyped-def]
    columns, rows = values.shape
    k = np.empty(rows, np.int32)
    grid = np.empty(rows, np.uint8)
    for j in range(columns):
        off[j] = not scan(values[j], trellis, k, grid)
        weight = weights_I[j]
        energy = 0.0
        for i in range(rows):
            square = np.float32(k[i]) * np.float32(k[i])
            of_rows[i] += square * weight
            energy += square * weights_O[i]
        of_columns[j] = energy


def count_magnitudes(values, trellis, row_O, column_I) -> NDArray[np.int64]:  # type: ignore[no-untyped-def]
    """How often each folded magnitude occurs: (class, context, MOST + 1)."""
    columns, _ = values.shape
    counts = np.zeros((_PARTS, NUM_CLASSES, 2, MOST + 1), np.int64)
    class_of = (np.arange(NUM_SUMS) + 2 * LEAST_PART).clip(LEAST, LARGEST) - LEAST
    shifts = np.array([shift_of(number + LEAST) for number in range(NUM_CLASSES)])

    def one(part: int) -> None:
        span = _span(part, columns)
        block = values[span].astype(np.int32)
        _count(block, int(trellis), row_O, column_I[span], class_of, shifts, counts[part])

    in_threads(one, range(_PARTS if values.size else 0))
    return np.asarray(counts.sum(0))


@compiled
def _count(values, trellis, row_O, column_I, class_of, shift_of_class, counts):  # type: ignore[no-untyped-def]
    columns, rows = values.shape
    k = np.empty(rows, np.int32)
    grid = np.empty(rows, np.uint8)
    for j in range(columns):
        scan(values[j], trellis, k, grid)
        for i in range(rows):
            number = class_of[row_O[i] + column_I[j]]
            magnitude = min(fold(np.int64(k[i]), shift_of_class[number]), MOST)
            counts[number, grid[i], magnitude] += 1


@compiled
def grid_of(state):  # type: ignore[no-untyped-def]
    return (state >> 1 ^ state >> 3) & 1


@compiled
def next_state(state, k):  # type: ignore[no-untyped-def]
    return (state << 1 | (k ^ state ^ state >> 5) & 1) & 63


@compiled
def scan(column, trellis, k, grid):  # type: ignore[no-untyped-def]
    """k and grid of each value of a column. False if one is off the grid of its state."""
    if not trellis:
        for i in range(column.size):
            k[i] = column[i]
            grid[i] = 0
        return True
    state = np.int64(0)
    off = np.int64(0)
    for i in range(column.size):
        value = np.int64(column[i])
        c = grid_of(state)
        sign = np.int64(value > 0) - np.int64(value < 0)
        twice = value + c * sign
        off |= twice & 1
        found = twice >> 1
        k[i] = found
        grid[i] = c
        state = next_state(state, found)
    return off == 0


@compiled
def fold(k, shift):  # type: ignore[no-untyped-def]
    """Magnitude of the part that is not raw: |k|, or that of k >> shift where -1 mirrors 0."""
    high = k >> shift
    if shift == 0:
        return abs(high)
    return high ^ high >> 63
