"""Matrices of integers as bytes, close to the entropy of each given the deviations of its row and column.

Asymmetric numeral systems with a range of 32 bits (Duda 2013, arXiv 1311.2540, rANS), several of them at a
time over one stream of words (Giesen 2014, arXiv 1402.3392). Numbers with about the same predicted deviation
share a table. Format and decoder use integers only, so all machines read and write the same bytes.

A stream, little endian:
  4 bytes      the format's number (1), states (1 or 64), log2 of the bytes per decoded value (0 to 2), zero
  4 bytes      length of the side information
  4 bytes      CRC-32 (RFC 1952) of the 8 bytes above, the numbers of columns and of rows (8 bytes each) and
               all the bytes below: any change of up to 32 bits in a row is noticed, and another shape is too
  4 bytes each words of each chunk; how many chunks there are follows from the shape
  side         adaptively coded (`ans_side`): what `ans_tables` lists
  2 bytes each the words of one chunk after the other

Columns are put in the order of their classes, ties as they were. A chunk is the next so many of them that it
has about 2^17 numbers: ceil(2^17 / (4 rows)) times 4. 4 of them, the lanes, are decoded at a time, row by row
and in a row lane by lane; then the next 4; the last ones may be fewer. A chunk begins with the state x of
each lane, two words each, the high one first.

A number takes the table of its class, that of its row plus that of its column, and of its context c, see
`ans_encode`. Of frequencies f that add up to 2^12 each symbol owns so many slots; that of slot x mod 2^12,
with first slot b, is next, and x becomes f floor(x / 2^12) + x mod 2^12 - b. Whenever x falls below 2^16 it
becomes 2^16 x + the next word. At the end of a chunk every x is 2^16 and no word is left.

The symbol is k >> shift, or an escape: then come 6 raw bits, 2 e + (1 if negative), and e raw bits d; with n
magnitudes in the table the magnitude is n - 1 + 2^e + d. (Negative ones mean -m, or ~m if the table has a
shift.) Last come the `shift` low bits of k, raw. n raw bits are x mod 2^n, and x becomes floor(x / 2^n); if
they are more than 16, those above the lower 16 come first, on their own.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrsd.numerics.ans_counts import choose_classes, count_magnitudes
from lrsd.numerics.ans_lanes import LANES, SPARE, decode_chunk, encode_chunk
from lrsd.numerics.ans_side import SideCoder
from lrsd.numerics.ans_tables import (
    COLUMN,
    LEAST_PART,
    NUM_MODELS,
    ROW,
    choose_groups,
    code_classes,
    code_tables,
    decode_slots,
    encode_slots,
)
from lrsd.numerics.compiled import in_threads
from lrsd.numerics.trellis import STATES

_VERSION = 1
_HEADER = struct.Struct("<BBBBI")
_CHECKSUM = struct.Struct("<I")
# Columns, then rows, as they enter the checksum.
_SHAPE = struct.Struct("<QQ")
_DTYPES = (torch.int8, torch.int16, torch.int32)
# Numbers per chunk: its lanes and length cost 0.001 bit for each, and small layers still fill two cores.
CHUNK = 1 << 17
# Larger ones do not fit the format.
_LIMIT = 1 << 30


class _Model(NamedTuple):
    """What a reader knows before the first word."""

    order_I: NDArray[np.int64]
    column_I: NDArray[np.int64]  # classes from LEAST_PART on
    row_O: NDArray[np.int64]
    group: NDArray[np.int64]  # by the sum of both, the shift in its upper 32 bits
    magnitudes: NDArray[np.int64]  # per table


def ans_encode(values_IO: Tensor, states: int, row_hints_O: Tensor, column_hints_I: Tensor) -> Tensor:
    """Integers as bytes, near the least -sum log2 p(k | context, class of the row + class of the column).

    Args: values_IO (I, O), I columns of O rows; `states` 1: k is the value itself; 64: trellis-coded,
        the state s of each column beginning at 0: v = 2k on grid c = (s >> 1 ^ s >> 3) & 1 = 0,
        v = 2k - sign(k) on grid 1, and s' = (2s | (k ^ s ^ s >> 5) & 1) & 63. c is the context. Hints (O,)
        and (I,) int64 guess 4 log2 of the deviations up to a constant; the stream corrects them.
    Returns: uint8 (n,), on the device of the values. The same for any number of threads.
    Raises: ValueError for values of 2^30 and more, or off the grid of their state.
    Source: Duda 2013, section 2.3; the trellis: see `numerics.trellis`.
    """
    values, rows, columns, largest = _inputs(values_IO, states, row_hints_O, column_hints_I)
    trellis = states > 1
    row, column = choose_classes(values, trellis)
    side = SideCoder(NUM_MODELS)
    column = code_classes(side, COLUMN, columns, column)
    row = code_classes(side, ROW, rows, row)
    counts = count_magnitudes(values, trellis, row - LEAST_PART, column - LEAST_PART)
    bounds, wanted = choose_groups(counts[:, : 1 + trellis].astype(np.int64))
    group_of, tables = code_tables(side, 1 + trellis, bounds, wanted)
    model = _model(row, column, trellis, group_of, tables)
    slots = encode_slots(tables)
    most = 1 + (tables[-1].shift + 2 * largest.bit_length() + 15) // 16  # words per value

    def one(columns: NDArray[np.int64]) -> bytes:
        block = values[columns].astype(np.int32)
        words = np.empty(most * block.size + 2 * LANES, np.uint16)
        begin = encode_chunk(
            block, int(trellis), model.column_I[columns], model.row_O, model.group, model.magnitudes, slots,
            words,
        )  # fmt: skip
        return words[begin:].astype("<u2").tobytes()

    chunks = in_threads(one, _chunks(model.order_I, rows.size))
    width = 0 if largest <= 127 else 1 if largest < 1 << 15 else 2
    written = side.written()
    lengths = np.array([len(chunk) // 2 for chunk in chunks], "<u4").tobytes()
    fields = _HEADER.pack(_VERSION, states, width, 0, len(written))
    content = b"".join([lengths, written, *chunks])
    checksum = _checksum(fields, values.shape, content)
    data = b"".join([fields, _CHECKSUM.pack(checksum), content])
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(values_IO.device)


def ans_decode(stream: Tensor, states: int, row_hints_O: Tensor, column_hints_I: Tensor) -> Tensor:
    """The values that `ans_encode` was given with the same hints; (I, O), as int8 if all |v| <= 127, else
    int16, else int32.

    Raises: ValueError if the bytes are not such a stream. Memory and time stay O(I O) whatever they are.
    """
    rows, columns = (
        np.ascontiguousarray(hint.cpu().numpy(), np.int64) for hint in (row_hints_O, column_hints_I)
    )
    data = stream.cpu().contiguous().numpy()
    begin = _HEADER.size + _CHECKSUM.size
    if data.size < begin:
        raise _damage(f"cut off after {data.size} bytes")
    fields = data[: _HEADER.size].tobytes()
    version, kind, width, zero, side_bytes = _HEADER.unpack(fields)
    if version != _VERSION:
        raise _damage(f"format {version}, this lrsd reads {_VERSION}")
    (checksum,) = _CHECKSUM.unpack(data[_HEADER.size : begin].tobytes())
    if _checksum(fields, (columns.size, rows.size), data[begin:].data) != checksum:
        raise _damage(
            f"its checksum is not that of {data.size} bytes for {columns.size} columns of {rows.size} rows"
        )
    if kind != states or width >= len(_DTYPES) or zero:
        raise _damage(f"{kind} states, width {width}, expected {states}, 0 to 2")
    chunks = len(_chunks(columns, rows.size))
    side_begin = begin + 4 * chunks
    if data.size < side_begin:
        raise _damage(f"cut off after {data.size} bytes")
    lengths = data[begin:side_begin].copy().view("<u4").astype(np.int64)
    words_begin = side_begin + side_bytes
    if words_begin + 2 * int(lengths.sum()) != data.size:
        raise _damage(f"{data.size} bytes, expected {words_begin + 2 * int(lengths.sum())}")
    side = SideCoder(NUM_MODELS, data[side_begin:words_begin])
    trellis = states > 1
    column = code_classes(side, COLUMN, columns, np.zeros_like(columns))
    row = code_classes(side, ROW, rows, np.zeros_like(rows))
    group_of, tables = code_tables(side, 1 + trellis, [], None)
    if not side.read_exactly():
        raise _damage("the side information does not end where it should")
    model = _model(row, column, trellis, group_of, tables)
    slots = decode_slots(tables)
    words = np.zeros(int(lengths.sum()) + SPARE, np.uint16)
    words[:-SPARE] = data[words_begin:].copy().view("<u2")
    values = torch.empty(columns.size, rows.size, dtype=_DTYPES[width])
    values_IO = values.numpy()

    def one(chunk: tuple[NDArray[np.int64], int, int]) -> bool:
        columns, place, stop = chunk
        block = np.empty((columns.size, rows.size), np.int32)
        good = decode_chunk(
            block, int(trellis), model.column_I[columns], model.row_O, model.group, model.magnitudes, slots,
            words, place, stop,
        )  # fmt: skip
        values_IO[columns] = block
        return good

    ends = np.cumsum(lengths)
    places = zip(_chunks(model.order_I, rows.size), (ends - lengths).tolist(), ends.tolist(), strict=True)
    good = in_threads(one, places)
    if not all(good):
        raise _damage(f"chunk {good.index(False)} of {chunks} does not decode")
    return values.to(stream.device)


def _checksum(fields: bytes, shape: tuple[int, ...], content: bytes | memoryview) -> int:
    """Of everything but itself, and of the shape, which is not in the stream."""
    return zlib.crc32(content, zlib.crc32(fields + _SHAPE.pack(*shape)))


def _damage(what: str) -> ValueError:
    return ValueError(f"entropy-coded stream is damaged: {what}")


def _inputs(
    values_IO: Tensor, states: int, row_hints_O: Tensor, column_hints_I: Tensor
) -> tuple[NDArray, NDArray[np.int64], NDArray[np.int64], int]:
    if states not in STATES:
        raise ValueError(f"states must be 1 or 64, got {states}")
    if values_IO.shape != (column_hints_I.numel(), row_hints_O.numel()):
        got = (column_hints_I.numel(), row_hints_O.numel())
        raise ValueError(f"hints must be for {tuple(values_IO.shape)} columns and rows, got {got}")
    # By numpy: torch's own threads hang in a child forked after their use.
    values = values_IO.cpu().numpy()
    largest = max(int(values.max()), -int(values.min())) if values.size else 0
    if largest >= _LIMIT:
        raise ValueError(f"values must be below 2^30, got {largest}")
    rows, columns = (
        np.ascontiguousarray(hint.cpu().numpy(), np.int64) for hint in (row_hints_O, column_hints_I)
    )
    return values, rows, columns, largest


def _chunks(order_I: NDArray[np.int64], rows: int) -> list[NDArray[np.int64]]:
    """The columns of each chunk."""
    if not order_I.size * rows:
        return []
    each = -(-CHUNK // (rows * LANES)) * LANES
    return [order_I[first : first + each] for first in range(0, order_I.size, each)]


def _model(row, column, trellis, group_of, tables) -> _Model:  # type: ignore[no-untyped-def]
    contexts = 1 + trellis
    shifts = np.array([table.shift for table in tables[::contexts]])
    group = group_of * contexts + (shifts[group_of] << 32)
    magnitudes = np.array([table.magnitudes for table in tables])
    order = np.argsort(column, kind="stable")
    return _Model(order, column - LEAST_PART, row - LEAST_PART, group, magnitudes)
