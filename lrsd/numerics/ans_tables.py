"""Classes and frequency tables of `ans`: which numbers share a table, and what is in it.

A class is 4 log2 of a deviation, that is, in quarter octaves. Floats choose; what a reader needs to repeat is
computed in integers.

The side information, integers by `SideCoder` with their kinds in parentheses:
  (0) a center, then (1) for each column: its class is hint + center + the integer, kept within -128 to 127.
      Hints are kept within +-2^20 before.
  (0) and (2) the same of each row.
  (3) the number of groups of classes, then of each its first class, less that of the group before, and of the
      first one less -48. Each group goes on to the next. Numbers of classes below -48 or above 127 belong to
      these.
  For each group and, within it, for each context:
  (4) the number n of magnitudes of the table, less that of the table before, (5) 1 if there are escapes;
  (6) the first step, (7) the others, n - 1 in all, less those expected; if there are escapes,
  (5) the escape's level less the last magnitude's.
The table before is that of the group before in the same context; of the first group's second context, the
first context's; none has n = 0. Its step i times 2^(-w/2), floored, is expected of step i, w being how many
classes the groups begin apart; where it has none, the step i - 1 of this table (0 before the first). The
factor is floored to a multiple of 2^-8.

The level of magnitude 0 is 0, and each step leads from one to the next. All are lifted together so that the
highest, escapes included, is 120, and negative ones become 0. A level l stands for the weight floor(2^(l/8 +
4)). Each symbol of weight w, of S in all, has the frequency floor(2^12 w / S + 1/2), at least 1, and then the
first one of the most frequent takes or gives 1, until they add up to 2^12. Symbols are in the order 0, 1, -1,
2, -2, ..., or if low bits are split off 0, -1, 1, -2, ..., both of a pair having their magnitude's weight;
the escape is last. ceil((c - 16) / 4) low bits are split off in groups with a first class c above 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from lrsd.numerics.ans_side import SideCoder
from lrsd.numerics.compiled import compiled

# Classes of one row or column, and of the two together; further out there is nothing to gain. 2^(-48/4): one
# non-zero in 2^24.
LEAST_PART, LARGEST_PART = -128, 127
LEAST, LARGEST = -48, 127
NUM_CLASSES = LARGEST - LEAST + 1
# Sums of two parts, from the least one.
NUM_SUMS = 2 * (LARGEST_PART - LEAST_PART) + 1
# Frequencies add up to 2^PRECISION. 16 kB of table then stay in a core's second-level cache by the dozen.
PRECISION = 12
TOTAL = 1 << PRECISION
# Above a deviation of 2^(16/4) low bits are as good as random, so they are split off and kept raw.
_SPLIT_ABOVE = 16
# Magnitudes with a symbol of their own: both signs of them fit int8, of which -128 is the escape.
MOST = 127
ESCAPE = -128
# Frequencies are sent in steps of this part of an octave, to 15 octaves below the largest: 2^-PRECISION and
# smaller are all the same.
_STEPS, _OCTAVES = 8, 15
_WEIGHTS = np.array([isqrt(isqrt(isqrt(1 << level + 8 * 4))) for level in range(_STEPS * _OCTAVES + 1)])
# What a magnitude costs in a table, in bits, and a table beside them: measured, on average.
_LEVEL_BITS, _TABLE_BITS = 3.0, 5.0
# What an escaped value costs beyond its symbol: sign, exponent and some bits.
_ESCAPE_BITS = 10.0
# The kinds of integers beside the matrix.
CENTER, COLUMN, ROW, BOUNDS, SIZES, ESCAPES, SLOPES = 0, 1, 2, 3, 4, 5, 6  # two kinds of SLOPES
NUM_MODELS = 8


@dataclass(frozen=True)
class Table:
    """Frequencies of `frequencies.size - 1` symbols in the order of `symbols`, and of the escape, the last.

    `magnitudes` have symbols of their own. They are folded k >> shift: 0, 1, -1, 2, -2, ... when nothing is
    shifted, else 0, -1, 1, -2, ..., each pair equally frequent.
    """

    shift: int
    magnitudes: int
    frequencies: NDArray[np.int64]

    @property
    def symbols(self) -> NDArray[np.int64]:
        return np.append(_symbols(self.magnitudes, self.shift), ESCAPE)


def shift_of(group_class: int) -> int:
    return max(0, -(-(group_class - _SPLIT_ABOVE) // 4))


def code_classes(
    side: SideCoder, model: int, hints: NDArray[np.int64], classes: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Send `classes` of rows or columns as differences from their hints; return what a reader sees."""
    hints = hints.clip(-(2**20), 2**20)
    wrong = classes - hints
    center = side.code_one(CENTER, int(np.median(wrong)) if wrong.size else 0)
    return (hints + center + side.code(model, wrong - center)).clip(LEAST_PART, LARGEST_PART)


def code_tables(
    side: SideCoder, contexts: int, bounds: list[int], wanted: list[list[NDArray[np.float64]]] | None
) -> tuple[NDArray[np.int64], list[Table]]:
    """Send the tables of each group and context, or read them.

    Args: bounds the first class (from LEAST) of each group; wanted counts of magnitudes, then of escapes.
    Returns: the group of each sum of two parts, and the tables as a reader sees them, contexts innermost.
    """
    groups = side.code_one(BOUNDS, len(bounds))
    if not 1 <= groups <= NUM_CLASSES:
        raise ValueError(f"entropy-coded stream is damaged: {groups} groups of classes")
    first = side.code(BOUNDS, np.diff(np.array([0, *bounds])) if wanted else np.zeros(groups, np.int64))
    starts = np.cumsum(first.clip(0, NUM_CLASSES)).clip(0, NUM_CLASSES - 1)
    sums = np.arange(NUM_SUMS) + 2 * LEAST_PART
    group_of = np.searchsorted(starts[1:], sums.clip(LEAST, LARGEST) - LEAST, side="right")
    tables: list[Table] = []
    steps = [np.zeros(0, np.int64)] * contexts
    for group, start in enumerate(starts):
        wider = int(start - starts[max(group - 1, 0)])
        for context in range(contexts):
            counts = wanted[group][context] if wanted else None
            # The log of a normal density falls with the square of its deviation.
            guess = steps[context] * isqrt(1 << 16 >> wider) >> 8
            if not group and context:
                guess = steps[0]
            table, steps[context] = _code_table(side, shift_of(int(start) + LEAST), counts, guess)
            tables.append(table)
    return group_of, tables


def _code_table(
    side: SideCoder, shift: int, counts: NDArray[np.float64] | None, guess: NDArray[np.int64]
) -> tuple[Table, NDArray[np.int64]]:
    """One table: number of magnitudes, whether there is an escape, and the steps from each to the next."""
    size = side.code_one(SIZES, counts.size - 1 - guess.size if counts is not None else 0) + guess.size
    if not 1 <= size <= MOST:
        raise ValueError(f"entropy-coded stream is damaged: a table of {size} magnitudes")
    escapes = side.code_one(ESCAPES, int(counts[-1] > 0) if counts is not None else 0)
    kept = None if counts is None else counts[:-1]
    steps = side.code_levels(SLOPES, guess, size, kept, _signs(size, shift), _STEPS)
    levels = np.cumsum(steps)
    if escapes:
        last = 0
        if counts is not None:
            first = max(counts[0] / _signs(1, shift)[0], 0.4)
            last = round(_STEPS * float(np.log2(counts[-1] / first))) - int(levels[-1])
        levels = np.append(levels, levels[-1] + side.code_one(ESCAPES, last))
    return Table(shift, size, _frequencies(levels, size, shift)), steps


def _signs(size: int, shift: int) -> NDArray[np.int64]:
    """How many symbols each magnitude has: a zero has no sign unless low bits are split off."""
    signs = np.full(size, 2)
    signs[: shift == 0] = 1
    return signs


def _symbols(size: int, shift: int) -> NDArray[np.int64]:
    pairs = np.empty(2 * size, np.int64)
    pairs[::2] = np.arange(size)
    pairs[1::2] = ~pairs[::2] if shift else -pairs[::2]
    return pairs if shift else pairs[1:]


def _frequencies(levels: NDArray[np.int64], size: int, shift: int) -> NDArray[np.int64]:
    """Levels as frequencies that add up to TOTAL, none of them 0 but the escape's where it has no level."""
    symbols = 2 * size - (shift == 0)
    frequencies = np.zeros(symbols + 1, np.int64)
    _share_out(levels, size, _WEIGHTS, frequencies[: symbols + levels.size - size])
    return frequencies


@compiled
def _share_out(levels, size, weights, frequencies):  # type: ignore[no-untyped-def]
    """TOTAL by the weights of levels; of the first `size`, each has two symbols, the first one the rest."""
    lift = weights.size - 1 - levels.max()
    both = frequencies.size - (levels.size - size)
    place = total = np.int64(0)
    for i in range(levels.size):
        weight = weights[max(levels[i] + lift, 0)]
        symbols = 1 if i >= size else 2 if i else 2 - (2 * size - both)
        for _ in range(symbols):
            frequencies[place] = weight
            place += 1
            total += weight
    left = np.int64(TOTAL)
    for i in range(frequencies.size):
        frequencies[i] = max(1, (2 * frequencies[i] * TOTAL + total) // (2 * total))
        left -= frequencies[i]
    while left:  # one by one from the most frequent, the first of them
        step = np.int64(1 if left > 0 else -1)
        frequencies[frequencies.argmax()] += step
        left -= step


def decode_slots(tables: list[Table]) -> NDArray[np.uint32]:
    """For each table, for each of TOTAL slots: symbol (8 bits), frequency - 1 (12), place within it (12)."""
    slots = np.empty((len(tables), TOTAL), np.uint32)
    for entry, table in zip(slots, tables, strict=True):
        _fill_slots(table.symbols, table.frequencies, entry)
    return slots.flatten()


@compiled
def _fill_slots(symbols, frequencies, slots):  # type: ignore[no-untyped-def]
    slot = 0
    for i in range(symbols.size):
        entry = np.uint32(symbols[i] & 255 | frequencies[i] - 1 << 8)
        for place in range(frequencies[i]):
            slots[slot] = entry | np.uint32(place << 8 + PRECISION)
            slot += 1


def encode_slots(tables: list[Table]) -> NDArray[np.uint32]:
    """For each table, for each symbol from ESCAPE on: frequency (16 bits), first slot (16)."""
    slots = np.zeros((len(tables), 256), np.uint32)
    for entry, table in zip(slots, tables, strict=True):
        first = np.cumsum(table.frequencies) - table.frequencies
        entry[table.symbols - ESCAPE] = table.frequencies | first << 16
    return slots.flatten()


def choose_groups(counts: NDArray[np.int64]) -> tuple[list[int], list[list[NDArray[np.float64]]]]:
    """Which adjacent classes share tables, for the fewest bits of numbers and tables together.

    Args: counts (classes, contexts, MOST + 1) of folded magnitudes, the last being all the larger ones.
    Returns: the first class of each group, and for each group and context what `code_tables` takes.
    """
    used = np.flatnonzero(counts.sum((1, 2)))
    if not used.size:
        return [0], [[np.array([1.0, 0.0])] * counts.shape[1]]
    sums = np.concatenate([np.zeros_like(counts[:1]), counts[used]]).cumsum(0)
    shifts = np.array([shift_of(int(place) + LEAST) for place in used])
    best, back = np.zeros(used.size + 1), np.zeros(used.size + 1, np.int64)
    for end in range(1, used.size + 1):
        begin = int(np.searchsorted(shifts, shifts[end - 1]))
        total = best[begin:end] + _cost(sums[end] - sums[begin:end])
        back[end] = begin + total.argmin()
        best[end] = total.min()
    ends = [used.size]
    while ends[-1]:
        ends.append(int(back[ends[-1]]))
    ends.reverse()
    groups = []
    for begin, end in pairwise(ends):
        groups.append([_cut(pooled, int(shifts[begin])) for pooled in sums[end] - sums[begin]])
    return [int(used[end]) for end in ends[:-1]], groups


def _cost(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Bits of pooled counts (..., contexts, magnitudes) with a table each, roughly; (...)."""
    total = counts.sum(-1)
    bits = _times_log(total) - _times_log(counts).sum(-1)
    bits += _LEVEL_BITS * (counts > 0).sum(-1) + _TABLE_BITS * (total > 0)
    return np.asarray(bits.sum(-1))


def _cut(counts: NDArray[np.int64], shift: int) -> NDArray[np.float64]:
    """Counts of the magnitudes worth a symbol, then of the escapes.

    A rare magnitude is not if its symbols' least frequencies cost the others more than its escapes do.
    """
    total = max(int(counts.sum()), 1)
    sizes = np.arange(1, MOST + 1)
    escaped = counts.sum() - np.cumsum(counts[:-1])
    shares = np.maximum(counts[:-1] / total, _signs(MOST, shift) / TOTAL)
    rest = np.maximum(escaped / total, (escaped > 0) / TOTAL)
    bits = total * np.log2(np.cumsum(shares) + rest) - np.cumsum(counts[:-1] * np.log2(shares))
    bits -= escaped * np.log2(np.maximum(rest, 1 / TOTAL)) - _ESCAPE_BITS * escaped
    size = int(sizes[(bits + _LEVEL_BITS * (sizes + (escaped > 0))).argmin()])
    return np.append(counts[:size], escaped[size - 1]).astype(np.float64)


def _times_log(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.asarray(counts * np.log2(np.maximum(counts, 1)))
