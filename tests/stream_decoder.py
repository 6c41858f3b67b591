"""The streams of `lrsd.numerics.ans`, decoded number by number as documented there; nothing of lrsd."""

import zlib
from bisect import bisect_right
from itertools import accumulate
from math import isqrt

Integers = list[int]


def decoded_stream(data: bytes, states: int, row_hints: Integers, column_hints: Integers) -> list[Integers]:
    """The integers of each column."""
    rows, columns = len(row_hints), len(column_hints)
    shape = columns.to_bytes(8, "little") + rows.to_bytes(8, "little")
    version, kind, _, zero = data[:4]
    length, checksum = number(data[4:8]), number(data[8:12])
    assert (version, kind, zero) == (1, states, 0)
    assert checksum == zlib.crc32(data[:8] + shape + data[12:])
    each = -(-(2**17) // (4 * rows)) * 4 if rows else 1
    chunks = -(-columns // each) if rows else 0
    lengths = [number(data[12 + 4 * i : 16 + 4 * i]) for i in range(chunks)]
    begin = 12 + 4 * chunks
    side = Side(data[begin : begin + length])
    column_classes = side.classes(1, column_hints)
    row_classes = side.classes(2, row_hints)
    starts, tables = read_tables(side, 2 if states > 1 else 1)
    raw = data[begin + length :]
    words = [number(raw[i : i + 2]) for i in range(0, len(raw), 2)]
    order = sorted(range(columns), key=lambda j: column_classes[j])
    found: list[Integers] = [[] for _ in range(columns)]
    for i in range(chunks):
        chunk, words = words[: lengths[i]], words[lengths[i] :]
        members = order[i * each : (i + 1) * each]
        decode_chunk(chunk, members, column_classes, row_classes, starts, tables, found)
    assert not words
    return found


def number(data: bytes) -> int:
    return int.from_bytes(data, "little")


class Side:
    """The adaptively coded integers."""

    def __init__(self, data: bytes) -> None:
        self.low, self.high, self.code = 0, 2**32 - 1, int.from_bytes(data[:4].ljust(4, b"\0"), "big")
        self.rest = iter(data[4:])
        self.counts: dict[tuple[int, str, int], Integers] = {}

    def classes(self, kind: int, hints: Integers) -> Integers:
        center = self.integer(0)
        hints = [min(max(hint, -(2**20)), 2**20) for hint in hints]
        return [min(max(hint + center + self.integer(kind), -128), 127) for hint in hints]

    def integer(self, kind: int) -> int:
        if not self.decide((kind, "not zero", 0)):
            return 0
        sign = -1 if self.decide((kind, "negative", 0)) else 1
        for i in range(1, 17):
            if not self.decide((kind, "larger", i)):
                return sign * i
        exponent = 0
        while exponent < 30 and self.decide((kind, "exponent", exponent)):
            exponent += 1
        excess = 1
        for _ in range(exponent):
            excess = 2 * excess + self.decide(None)
        return sign * (16 + excess)

    def decide(self, about: tuple[int, str, int] | None) -> int:
        counts = self.counts.setdefault(about, [1, 1]) if about else [1, 1]
        share = min(max((counts[1] << 16) // sum(counts), 24), 2**16 - 24)
        middle = self.low + ((self.high - self.low) * share >> 16)
        bit = int(self.code <= middle)
        self.low, self.high = (self.low, middle) if bit else (middle + 1, self.high)
        while self.low >> 24 == self.high >> 24:
            self.low = self.low << 8 & 0xFFFFFFFF
            self.high = self.high << 8 & 0xFFFFFFFF | 255
            self.code = self.code << 8 & 0xFFFFFFFF | next(self.rest, 0)
        counts[bit] += 2
        if sum(counts) > 2**12:
            counts[:] = [(n + 1) // 2 for n in counts]
        return bit


class Table:
    """symbols: k >> shift, None for the escape; frequencies and first slots of each."""

    def __init__(self, side: Side, shift: int, before: Integers, factor: int) -> None:
        self.shift, self.size = shift, side.integer(4) + len(before)
        escapes = side.integer(5)
        self.steps = [0]
        for i in range(1, self.size):
            expected = before[i] * factor >> 8 if i < len(before) else self.steps[-1]
            self.steps.append(expected + side.integer(6 if i == 1 else 7))
        levels = list(accumulate(self.steps))
        if escapes:
            levels.append(levels[-1] + side.integer(5))
        lift = 120 - max(levels)
        # The integer eighth root of 2^(level + 32) is that of 2^(level / 8 + 4), rounded down.
        weights = [isqrt(isqrt(isqrt(2 ** (max(level + lift, 0) + 32)))) for level in levels]
        signs = (lambda m: (m, ~m)) if shift else (lambda m: (m, -m) if m else (m,))
        self.symbols: list[int | None] = [symbol for m in range(self.size) for symbol in signs(m)]
        shares = [weights[m] for m in range(self.size) for _ in signs(m)]
        if escapes:
            self.symbols.append(None)
            shares.append(weights[-1])
        total = sum(shares)
        self.frequencies = [max((2 * 4096 * share + total) // (2 * total), 1) for share in shares]
        while wrong := 4096 - sum(self.frequencies):
            largest = self.frequencies.index(max(self.frequencies))
            self.frequencies[largest] += 1 if wrong > 0 else -1
        self.firsts = [0, *accumulate(self.frequencies[:-1])]


def read_tables(side: Side, contexts: int) -> tuple[Integers, list[list[Table]]]:
    """The first class of each group, and its tables, one per context."""
    count = side.integer(3)
    starts = [start - 48 for start in accumulate(side.integer(3) for _ in range(count))]
    groups: list[list[Table]] = []
    for i, start in enumerate(starts):
        tables: list[Table] = []
        for context in range(contexts):
            before = groups[-1][context].steps if groups else tables[0].steps if tables else []
            # floor(2^8 2^(-w / 2))
            factor = isqrt(2**16 >> (start - starts[max(i - 1, 0)]))
            tables.append(Table(side, max(0, -(-(start - 16) // 4)), before, factor))
        groups.append(tables)
    return starts, groups


def decode_chunk(
    words: Integers, columns: Integers, column_classes: Integers, row_classes: Integers, starts: Integers,
    tables: list[list[Table]], found: list[Integers],
) -> None:  # fmt: skip
    """Append to the columns' lists what is in the words, all of them."""
    x = 0
    source = iter(words)

    def refill() -> None:
        nonlocal x
        if x < 2**16:
            x = x << 16 | next(source)

    def raw(bits: int) -> int:
        nonlocal x
        value = 0
        for part in [bits - 16, 16] if bits > 16 else [bits] if bits else []:
            value = value << part | x % 2**part
            x >>= part
            refill()
        return value

    lanes = [next(source) << 16 | next(source) for _ in columns[:4]]
    for first in range(0, len(columns), 4):
        paths = [0] * 4
        for row_class in row_classes:
            for lane, column in enumerate(columns[first : first + 4]):
                group = bisect_right(starts, min(max(row_class + column_classes[column], -48), 127))
                grid = (paths[lane] >> 1 ^ paths[lane] >> 3) & 1 if len(tables[0]) > 1 else 0
                table = tables[max(group - 1, 0)][grid]
                x = lanes[lane]
                place = bisect_right(table.firsts, x % 4096) - 1
                k = table.symbols[place]
                x = table.frequencies[place] * (x // 4096) + x % 4096 - table.firsts[place]
                refill()
                if k is None:
                    head = raw(6)
                    k = table.size - 1 + 2 ** (head // 2) + raw(head // 2)
                    if head % 2:
                        k = ~k if table.shift else -k
                k = k << table.shift | raw(table.shift)
                lanes[lane] = x
                if len(tables[0]) > 1:
                    sign = (k > 0) - (k < 0)
                    found[column].append(2 * k - grid * sign)
                    paths[lane] = (2 * paths[lane] | (k ^ paths[lane] ^ paths[lane] >> 5) & 1) & 63
                else:
                    found[column].append(k)
    assert all(lane == 2**16 for lane in lanes)
    assert next(source, None) is None
