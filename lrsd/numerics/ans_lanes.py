"""The inner loops of `ans`: several rANS states at a time over one stream of words."""

from __future__ import annotations

import numpy as np

from lrsd.numerics.ans_counts import fold, grid_of, next_state, scan
from lrsd.numerics.ans_tables import ESCAPE, PRECISION, TOTAL
from lrsd.numerics.compiled import compiled

# Enough lanes to hide the latency of a table; each costs 16 bits per chunk.
LANES = 4
# Words that one row of lanes can take at most: per lane one for the symbol, one for sign and exponent, two
# for the distance, two for low bits. So many zeros follow the last word, and are checked only once a row.
SPARE = 6 * LANES
START = 1 << 16
# Numbers of raw bits, as the compiler is to see them: plain ones would each have a copy of the code.
_HEAD, _HALF = np.int64(6), np.int64(16)


@compiled
def _put(state, value, bits, words, place):  # type: ignore[no-untyped-def]
    """Raw bits into a state."""
    if state >> (32 - bits):
        place -= 1
        words[place] = state & 0xFFFF
        state >>= 16
    return state << bits | value, place


@compiled
def _put_long(state, value, bits, words, place):  # type: ignore[no-untyped-def]
    """Up to 32 raw bits; written backward, so that the high ones are read first."""
    if bits > 16:
        state, place = _put(state, value & 0xFFFF, _HALF, words, place)
        value >>= 16
        bits -= 16
    if bits:
        state, place = _put(state, value, bits, words, place)
    return state, place


@compiled
def encode_chunk(values, trellis, column_I, row_O, group, magnitudes, slots, words):  # type: ignore[no-untyped-def]
    """Backward, so that it reads forward, to the end of `words`. Returns where they begin."""
    columns, rows = values.shape
    place = np.int64(words.size)
    states = np.full(LANES, START, np.int64)
    k = np.empty((LANES, rows), np.int32)
    grid = np.empty((LANES, rows), np.uint8)
    last = (columns - 1) // LANES
    for turn in range(last, -1, -1):
        first = turn * LANES
        active = min(LANES, columns - first)
        for lane in range(active):
            scan(values[first + lane], trellis, k[lane], grid[lane])
        for i in range(rows - 1, -1, -1):
            for lane in range(active - 1, -1, -1):
                entry = group[column_I[first + lane] + row_O[i]]
                shift = entry >> 32
                table = (entry & 0xFFFFFFFF) + grid[lane, i]
                state = states[lane]
                number = np.int64(k[lane, i])
                high = number >> shift
                if shift:
                    state, place = _put_long(state, number & ((1 << shift) - 1), shift, words, place)
                size = magnitudes[table]
                magnitude = fold(number, shift)
                if magnitude >= size:
                    distance = magnitude - size + 1
                    exponent = np.int64(0)
                    while distance >> (exponent + 1):
                        exponent += 1
                    state, place = _put_long(
                        state, distance - (np.int64(1) << exponent), exponent, words, place
                    )
                    state, place = _put(state, exponent << 1 | np.int64(high < 0), _HEAD, words, place)
                    high = np.int64(ESCAPE)
                slot = np.int64(slots[table * 256 + high - ESCAPE])
                frequency = slot & 0xFFFF
                if state >= frequency << (32 - PRECISION):
                    place -= 1
                    words[place] = state & 0xFFFF
                    state >>= 16
                quotient = np.int64(np.uint32(state) // np.uint32(frequency))
                states[lane] = (quotient << PRECISION) + (state - quotient * frequency) + (slot >> 16)
    for lane in range(min(LANES, columns) - 1, -1, -1):
        words[place - 1] = states[lane] & 0xFFFF
        words[place - 2] = states[lane] >> 16
        place -= 2
    return place


@compiled
def _take(state, bits, words, place):  # type: ignore[no-untyped-def]
    value = state & ((np.int64(1) << bits) - 1)
    state >>= bits
    if state < START:
        state = state << 16 | np.int64(words[place])
        place += 1
    return value, state, place


@compiled
def _take_long(state, bits, words, place):  # type: ignore[no-untyped-def]
    value = np.int64(0)
    if bits > 16:
        value, state, place = _take(state, bits - 16, words, place)
        bits = _HALF
    if bits:
        low, state, place = _take(state, bits, words, place)
        value = value << bits | low
    return value, state, place


@compiled
def _advance(state, slot, word):  # type: ignore[no-untyped-def]
    """A state without its symbol, and how many words that took: 0 or 1."""
    state = ((slot >> 8 & (TOTAL - 1)) + 1) * (state >> PRECISION) + (slot >> (8 + PRECISION))
    return (state << 16 | word if state < START else state), np.int64(state < START)


@compiled
def _value(k, path, trellis):  # type: ignore[no-untyped-def]
    """v of k, and the trellis state behind it. Without a trellis its state stays 0 and v is k."""
    sign = np.int64(k > 0) - np.int64(k < 0)
    return (k << trellis) - grid_of(path) * sign, next_state(path, k) * trellis


@compiled
def _decode_row(out, i, trellis, group, columns, row, magnitudes, slots, words, place, states, paths):  # type: ignore[no-untyped-def]
    """Number i of each lane, with escapes and low bits: slow, and short. Returns the place behind."""
    for lane in range(columns.size):
        entry = group[columns[lane] + row]
        shift = entry >> 32
        table = (entry & 0xFFFFFFFF) + grid_of(paths[lane])
        slot = np.int64(slots[table << PRECISION | states[lane] & (TOTAL - 1)])
        k = ((slot & 255) ^ 128) - 128
        state, taken = _advance(states[lane], slot, np.int64(words[place]))
        place += taken
        if k == ESCAPE:
            head, state, place = _take(state, _HEAD, words, place)
            exponent = head >> 1
            low, state, place = _take_long(state, exponent, words, place)
            k = magnitudes[table] - 1 + low + (np.int64(1) << exponent)
            if head & 1:
                k = ~k if shift else -k
        if shift:
            low, state, place = _take_long(state, shift, words, place)
            k = k << shift | low
        states[lane] = state
        out[lane, i], paths[lane] = _value(k, paths[lane], trellis)
    return place


@compiled
def _decode_turn(out, trellis, group, columns, row_O, magnitudes, slots, words, place, end, states):  # type: ignore[no-untyped-def]
    """All rows of some lanes, one column each. Returns the place behind, or -1 past the end."""
    paths = np.zeros(LANES, np.int64)
    if columns.size < LANES:
        for i in range(row_O.size):
            row = row_O[i]
            place = _decode_row(
                out, i, trellis, group, columns, row, magnitudes, slots, words, place, states, paths
            )
            if place > end:
                return np.int64(-1)
        return place
    # All of four lanes in registers. Whatever is out of the ordinary is done over in the slow way.
    c0, c1, c2, c3 = columns[0], columns[1], columns[2], columns[3]
    x0, x1, x2, x3 = states[0], states[1], states[2], states[3]
    s0 = s1 = s2 = s3 = np.int64(0)
    for i in range(row_O.size):
        row = row_O[i]
        e0, e1, e2, e3 = (
            group[np.uint64(c0 + row)],
            group[np.uint64(c1 + row)],
            group[np.uint64(c2 + row)],
            group[np.uint64(c3 + row)],
        )
        q0 = np.int64(slots[np.uint64((e0 + grid_of(s0) & 0xFFFF) << PRECISION | x0 & (TOTAL - 1))])
        q1 = np.int64(slots[np.uint64((e1 + grid_of(s1) & 0xFFFF) << PRECISION | x1 & (TOTAL - 1))])
        q2 = np.int64(slots[np.uint64((e2 + grid_of(s2) & 0xFFFF) << PRECISION | x2 & (TOTAL - 1))])
        q3 = np.int64(slots[np.uint64((e3 + grid_of(s3) & 0xFFFF) << PRECISION | x3 & (TOTAL - 1))])
        k0, k1, k2, k3 = (
            np.int64(np.int8(q0)),
            np.int64(np.int8(q1)),
            np.int64(np.int8(q2)),
            np.int64(np.int8(q3)),
        )
        if (e0 | e1 | e2 | e3) >> 32 or min(min(k0, k1), min(k2, k3)) == ESCAPE:
            states[0], states[1], states[2], states[3] = x0, x1, x2, x3
            paths[0], paths[1], paths[2], paths[3] = s0, s1, s2, s3
            place = _decode_row(
                out, i, trellis, group, columns, row, magnitudes, slots, words, place, states, paths
            )
            x0, x1, x2, x3 = states[0], states[1], states[2], states[3]
            s0, s1, s2, s3 = paths[0], paths[1], paths[2], paths[3]
        else:
            x0, taken = _advance(x0, q0, np.int64(words[np.uint64(place)]))
            place += taken
            x1, taken = _advance(x1, q1, np.int64(words[np.uint64(place)]))
            place += taken
            x2, taken = _advance(x2, q2, np.int64(words[np.uint64(place)]))
            place += taken
            x3, taken = _advance(x3, q3, np.int64(words[np.uint64(place)]))
            place += taken
            out[0, i], s0 = _value(k0, s0, trellis)
            out[1, i], s1 = _value(k1, s1, trellis)
            out[2, i], s2 = _value(k2, s2, trellis)
            out[3, i], s3 = _value(k3, s3, trellis)
        if place > end:
            return np.int64(-1)
    states[0], states[1], states[2], states[3] = x0, x1, x2, x3
    return place


@compiled
def decode_chunk(values, trellis, column_I, row_O, group, magnitudes, slots, words, place, stop):  # type: ignore[no-untyped-def]
    """Words from `place` to `stop` into the rows of `values`. False if they do not end as they should."""
    columns = column_I.size
    lanes = min(LANES, columns)
    states = np.full(LANES, START, np.int64)
    if place + 2 * lanes > stop:
        return False
    for lane in range(lanes):
        states[lane] = np.int64(words[place]) << 16 | np.int64(words[place + 1])
        if states[lane] < START:
            return False
        place += 2
    for first in range(0, columns, LANES):
        after = min(first + LANES, columns)
        place = _decode_turn(
            values[first:after], trellis, group, column_I[first:after], row_O, magnitudes, slots, words,
            place, stop, states,
        )  # fmt: skip
        if place < 0:
            return False
    good = place == stop
    for lane in range(lanes):
        good = good and states[lane] == START
    return good
