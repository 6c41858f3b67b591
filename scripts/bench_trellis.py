"""What more states of the trellis are worth: bits above the bound on a Gaussian source, and time.

The bound is the rate-distortion function; a plain grid is 0.254 bit above it at high rates. Times are those
of one core; compare them within one run only.

Example:
  python scripts/bench_trellis.py
"""

import argparse
import time

import numpy as np

from lrsd.numerics.trellis import CHECKS, measured, quantized

# Rows of the column that is timed, and how often.
_ROWS, _TURNS = 1536, 100


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--states", type=int, nargs="+", default=[8, 16, 32, 64], choices=sorted(CHECKS)[1:])
    options.add_argument("--bits", type=float, nargs="+", default=[2, 3, 4], help="entropies")
    args = options.parse_args()
    print("states", *(f"{bits:g} bits" for bits in args.bits), "ns per weight", sep="\t")
    for states in args.states:
        gaps = [measured(states).above_bound(bits) for bits in args.bits]
        print(states, *(f"{found:.3f}" for found in gaps), f"{nanoseconds(states):.0f}", sep="\t")


def nanoseconds(states: int) -> float:
    column = 4 * np.random.default_rng(1).standard_normal(_ROWS).astype(np.float32)
    bits_CK = np.zeros((2, 256), np.float32)
    quantized(column, bits_CK, states)
    start = time.perf_counter()
    for _ in range(_TURNS):
        quantized(column, bits_CK, states)
    return (time.perf_counter() - start) / _TURNS / _ROWS * 1e9


if __name__ == "__main__":
    main()
