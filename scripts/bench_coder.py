"""Size and speed of the entropy coder, beside, where installed, constriction.

Bits are those over the entropy of normal numbers rounded, so that 0 is what a perfect coder takes. Speeds are
the best of three, in million numbers per second: by the clock on all cores, and per processor second on one.

Example:
  python scripts/bench_coder.py --size 4096 --bits 4
"""

import argparse
import importlib.util
import math
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lrsd.numerics.ans import ans_decode, ans_encode


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--size", type=int, default=4096, help="rows and columns")
    options.add_argument("--bits", type=float, nargs="+", default=[1.5, 2, 3, 4], help="entropies")
    args = options.parse_args()
    for bits in args.bits:
        deviation = deviation_of(bits)
        generator = torch.Generator().manual_seed(0)
        codes = (torch.randn(args.size, args.size, generator=generator) * deviation).round()
        values = codes.clamp(-127, 127).to(torch.int8)
        hints = torch.zeros(args.size, dtype=torch.int64)
        report(
            "ans",
            bits,
            values,
            partial(_encode, hints=hints),
            partial(_decode, hints=hints),
        )
        if importlib.util.find_spec("constriction"):
            report("constriction", bits, values, *constriction(deviation, values))


def _encode(values: Tensor, hints: Tensor) -> Any:
    return ans_encode(values, 1, hints, hints)


def _decode(stream: Any, hints: Tensor) -> Tensor:
    return ans_decode(stream, 1, hints, hints)


def entropy_of(deviation: float) -> float:
    """Bits of a normal number rounded."""
    edges = (torch.arange(-2000, 2001, dtype=torch.float64) - 0.5) / (deviation * math.sqrt(2))
    return float(torch.special.entr(torch.erf(edges).diff() / 2).sum()) / math.log(2)


def deviation_of(bits: float) -> float:
    low, high = 0.05, 500.0
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if entropy_of(middle) < bits else (low, middle)
    return high


def constriction(deviation: float, values: Tensor) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """Its ANS coder with the true distribution, which is not in the stream, in one thread."""
    import constriction
    import numpy as np

    model = constriction.stream.model.QuantizedGaussian(-127, 127, 0.0, deviation)

    def encode(values: Tensor) -> Any:
        coder = constriction.stream.stack.AnsCoder()
        coder.encode_reverse(values.flatten().int().numpy(), model)
        return coder.get_compressed()

    def decode(words: Any) -> Tensor:
        coder = constriction.stream.stack.AnsCoder(words)
        found = np.asarray(coder.decode(model, values.numel()))
        return torch.from_numpy(found).view(values.shape)

    return encode, decode


def report(
    name: str, bits: float, values: Tensor, encode: Callable[[Tensor], Any], decode: Callable[[Any], Tensor]
) -> None:
    stream = encode(values)
    decoded = decode(stream).view(values.shape)
    if not torch.equal(decoded.int(), values.int()):
        raise SystemExit(f"{name} did not return what it was given")
    size = stream.nbytes if hasattr(stream, "nbytes") else len(stream)
    over = 8 * size / values.numel() - bits
    speeds = []
    for call in (lambda: encode(values), lambda: decode(stream)):
        torch.set_num_threads(os.cpu_count() or 1)
        by_clock = values.numel() / 1e6 / best_of_three(call, time.perf_counter)
        torch.set_num_threads(1)
        speeds += [by_clock, values.numel() / 1e6 / best_of_three(call, time.process_time)]
    print(
        f"{name:13s} {bits:4g} bits {over:+.4f} over entropy; M/s by the clock and per processor second: "
        f"encode {speeds[0]:6.1f} {speeds[1]:6.1f}, decode {speeds[2]:6.1f} {speeds[3]:6.1f}",
        flush=True,
    )


def best_of_three(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    times = []
    for _ in range(3):
        start = clock()
        call()
        times.append(clock() - start)
    return min(times)


if __name__ == "__main__":
    main()
