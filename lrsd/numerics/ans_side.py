"""The few integers that describe an entropy-coded matrix, at close to their own entropy.

A binary arithmetic coder with counted probabilities (Krichevsky & Trofimov 1981, the estimator; the carryless
32-bit coder is that of lpaq, Mahoney 2007). There are only some thousand integers per matrix, so what counts
is how fast the probabilities are learnt and that there is no table to send. Integers only: the same bytes
everywhere.

To read: low = 0, high = 2^32 - 1, code = the first 4 bytes, high one first; behind the end bytes are zero. A
decision is 1 if code <= middle = low + floor((high - low) p / 2^16), and then high = middle, else low =
middle + 1. While low and high have the same upper byte, it is dropped from all three, and high takes 255,
code the next byte, low zero as its lowest. p = floor(2^16 ones / (zeros + ones)), kept within 24 and 2^16 -
24, by the counts of that decision so far: both begin at 1, each decision adds 2 to its own, and once they add
up to more than 2^12 each n becomes floor((n + 1) / 2). Raw bits have p = 2^15.

An integer of a kind is, each with counts of its own by kind: not zero? negative? then for i = 1 to 16: larger
than i? until it is not. What exceeds 16, r >= 1, follows as e = floor(log2 r): for i = 0 to 29: e > i? until
it is not; then the e bits of r below its highest, raw, high ones first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lrsd.numerics.compiled import compiled

# Decisions per model: zero?, sign, then "larger than i?" for small magnitudes, then an exponent in unary.
_SIGN, _UNARY, _NUM_UNARY, _EXPONENT = 1, 2, 16, 18
# Largest exponent, so that no integer reaches 2^31 beyond the unary part.
_MAX_EXPONENT = 30
_DECISIONS = _EXPONENT + _MAX_EXPONENT + 1
# A probability is kept this far from 0 and 1 (of 2^16), and counts are halved at the limit: the start of a
# vector is forgotten slowly.
_LEAST, _COUNT_LIMIT = 24, 1 << 12
# No integer takes more: at most 80 decisions, at most 12 bits each.
_MOST_BYTES = 128
# Fields of the coder's state.
_LOW, _HIGH, _CODE, _PLACE, _READING = 0, 1, 2, 3, 4
# The context of a bit that is as often 0 as 1.
_FAIR = np.int64(-1)


class SideCoder:
    """Writes integers, or reads them back: `code` is the same sequence of calls for both.

    Args: `data` the bytes to read, None to write; `models` how many kinds of integers there are, each with
        probabilities of its own.
    """

    def __init__(self, models: int, data: NDArray[np.uint8] | None = None) -> None:
        self._counts = np.ones((models * _DECISIONS, 2), np.int64)
        self._state = np.array([0, 0xFFFFFFFF, 0, 0, int(data is not None)], np.int64)
        self._data = np.zeros(0, np.uint8) if data is None else data
        for _ in range(4 if data is not None else 0):
            self._state[_CODE] = self._state[_CODE] << 8 | _byte(self._data, self._state)

    def code(self, model: int, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Write `values` and return them, or read as many (their contents are then of no account)."""
        values = np.array(values, np.int64)
        if not self._state[_READING]:
            spare = int(self._state[_PLACE]) + _MOST_BYTES * (values.size + 1) - self._data.size
            if spare > 0:  # doubling, so that many short calls copy little
                self._data = np.concatenate([self._data, np.zeros(spare + self._data.size, np.uint8)])
        _integers(self._state, self._counts, model * _DECISIONS, values, self._data)
        return values

    def code_levels(
        self, model: int, guess: NDArray[np.int64], size: int, counts: NDArray[np.float64] | None,
        signs: NDArray[np.int64], fineness: int,
    ) -> NDArray[np.int64]:  # fmt: skip
        """Steps between `fineness` log2 of `size` neighboring counts, the first of them 0; (size,).

        Written are differences, from `guess` or behind its end from the last step: the first one with
        `model`, the others with the next model. Chosen are those that cost the fewest bits together with
        what is lost by the counts' errors. `signs` symbols share each count.
        """
        differences = np.zeros(size, np.int64)
        if counts is not None:
            _choose_steps(guess, counts, signs, fineness, differences)
        steps = np.zeros(size, np.int64)
        steps[1:2] = self.code(model, differences[1:2])
        steps[2:] = self.code(model + 1, differences[2:])
        known = guess[:size]
        steps[: known.size] += known
        last = max(known.size, 1) - 1
        steps[last:] = np.cumsum(steps[last:])
        return steps

    def code_one(self, model: int, value: int = 0) -> int:
        return int(self.code(model, np.array([value]))[0])

    def written(self) -> bytes:
        """All bytes; nothing can be written after that. The last one suffices since zeros follow it."""
        place = int(self._state[_PLACE])
        return self._data[:place].tobytes() + bytes([int(self._state[_HIGH]) >> 24])

    def read_exactly(self) -> bool:
        """Whether the integers read so far are those of the data, to its last byte."""
        return int(self._state[_PLACE]) == self._data.size + 3


@compiled
def _byte(data, state):  # type: ignore[no-untyped-def]
    place = state[_PLACE]
    state[_PLACE] = place + 1
    return np.int64(data[place]) if place < data.size else np.int64(0)


@compiled
def _decide(state, counts, context, bit, data):  # type: ignore[no-untyped-def]
    """One decision, 0 or 1, by its counts; _FAIR has none."""
    low, high = state[_LOW], state[_HIGH]
    share = np.int64(1 << 15)
    if context >= 0:
        zeros, ones = counts[context, 0], counts[context, 1]
        share = min(max((ones << 16) // (zeros + ones), np.int64(_LEAST)), np.int64((1 << 16) - _LEAST))
    middle = low + ((high - low) * share >> 16)
    if state[_READING]:
        bit = np.int64(state[_CODE] <= middle)
    if bit:
        high = middle
    else:
        low = middle + 1
    while (low ^ high) >> 24 == 0:
        if state[_READING]:
            state[_CODE] = (state[_CODE] << 8 | _byte(data, state)) & 0xFFFFFFFF
        else:
            data[state[_PLACE]] = high >> 24
            state[_PLACE] += 1
        low = low << 8 & 0xFFFFFFFF
        high = (high << 8 | 255) & 0xFFFFFFFF
    state[_LOW], state[_HIGH] = low, high
    if context >= 0:
        counts[context, bit] += 2
        if counts[context, 0] + counts[context, 1] > _COUNT_LIMIT:
            counts[context, 0] = (counts[context, 0] + 1) >> 1
            counts[context, 1] = (counts[context, 1] + 1) >> 1
    return bit


@compiled
def _integers(state, counts, first, values, data):  # type: ignore[no-untyped-def]
    """Each integer as decisions: zero?, sign, small magnitudes in unary, the others by exponent and bits."""
    for i in range(values.size):
        magnitude = abs(values[i])
        if not _decide(state, counts, first, np.int64(magnitude > 0), data):
            values[i] = 0
            continue
        negative = _decide(state, counts, first + _SIGN, np.int64(values[i] < 0), data)
        size = np.int64(1)
        while size <= _NUM_UNARY and _decide(
            state, counts, first + _UNARY + size - 1, np.int64(magnitude > size), data
        ):
            size += 1
        if size > _NUM_UNARY:
            rest = magnitude - _NUM_UNARY  # from 1
            exponent = np.int64(0)
            while exponent < _MAX_EXPONENT and _decide(
                state, counts, first + _EXPONENT + exponent, np.int64(rest >> (exponent + 1) > 0), data
            ):
                exponent += 1
            found = np.int64(1)
            for place in range(exponent - 1, -1, -1):
                found = found << 1 | _decide(state, counts, _FAIR, rest >> place & 1, data)
            size = _NUM_UNARY + found
        values[i] = -size if negative else size


@compiled
def _choose_steps(guess, counts, signs, fineness, differences):  # type: ignore[no-untyped-def]
    least = 0.4  # what stands for a count of nothing
    level = fineness * np.log2(max(counts[0] / signs[0], least))
    step = np.int64(0)
    for i in range(1, counts.size):
        expected = guess[i] if i < guess.size else step
        count = counts[i]
        aim = round(fineness * np.log2(max(count / signs[i], least)) - level - expected)
        best = np.inf
        for tried in range(min(aim, 0), max(aim, 0) + 1):
            bits = 1.5 + 2 * np.log2(1.0 + abs(tried)) if tried else 0.7
            # Bits lost by a wrong frequency: by its numbers, less what all the others gain.
            got = signs[i] * 2.0 ** ((level + expected + tried) / fineness)
            bits += (got - count) / np.log(2) + count * np.log2(max(count, least) / got)
            if bits < best:
                best, differences[i] = bits, tried
        step = expected + differences[i]
        level += step
