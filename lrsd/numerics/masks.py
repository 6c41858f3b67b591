"""Values behind a bitmask, put into place by compiled loops."""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from lrsd.numerics.compiled import compiled, side_by_side

# Bytes of a mask below which a thread of its own does not pay.
_LEAST = 2**13
# Bits that are set in each byte.
_ONES = np.array([byte.bit_count() for byte in range(256)], dtype=np.int64)


def expand(mask: Tensor, entries: Tensor, count: int) -> Tensor:
    """(count,) of the type of `entries`, 16 or 32 bits wide: the next entry where a bit is set, else 0.

    mask: uint8 (ceil(count / 8),), the first bit lowest, as many bits set as there are entries. On a CPU.
    """
    if not entries.numel():
        return entries.new_zeros(count)
    kind = torch.int16 if entries.element_size() == 2 else torch.int32
    bits, values = mask.numpy(), entries.contiguous().view(kind).numpy()
    found = torch.empty(8 * len(bits), dtype=kind)
    out, parts = found.numpy(), max(1, min(torch.get_num_threads(), len(bits) // _LEAST))
    ends = [len(bits) * part // parts for part in range(parts + 1)]
    ones = [int(_ONES[bits[start:end]].sum()) for start, end in pairwise(ends)]
    places = np.cumsum([0, *ones]).tolist()
    side_by_side(lambda part: _expand(bits, values, out, ends[part], ends[part + 1], places[part]), parts)
    return found[:count].view(entries.dtype)


@compiled
def _expand(bits: np.ndarray, values: np.ndarray, out: np.ndarray, start: int, end: int, place: int) -> None:
    last = len(values) - 1
    for i in range(start, end):
        byte = np.int64(bits[i])
        for b in range(8):
            bit = byte >> b & 1
            out[8 * i + b] = values[min(place, last)] * bit
            place += int(bit)
