"""Dependent quantization: a column of a weight as a path through a trellis of two interleaved integer grids.

A state is the last six bits of a path. In state s the grid is c = (s >> 1 ^ s >> 3) & 1: the even integers 2k
on grid 0; the odd ones and zero, 2k - sgn k, on grid 1. The next bit is the parity of k ^ s ^ s >> 5. A path
is chosen as a whole (Viterbi 1967), so that its points pack space more densely than the integers: at equal
entropy the error of a Gaussian column falls by what 0.19 bit are worth. Decoding is integer arithmetic.

Source: Marcellin & Fischer, "Trellis coded quantization of memoryless and Gauss-Markov sources", 1990; the
code of 64 states is Ungerboeck's of parity checks 103 and 24, octal ("Channel coding with
multilevel/phase signals", 1982); the grids are those of the 8 states of VVC (ITU-T H.266, section 8.7.3;
Schwarz et al., "Quantization and entropy coding in the Versatile Video Coding standard", 2021).
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from lrsd.numerics.compiled import compiled

# Numbers of states: of a plain grid, and of the trellis. Of 8, 16, 32 and 64 each doubling is worth 0.01 bit,
# see `scripts/bench_trellis.py`; 64 fill the registers of an ordinary processor.
STATES = (1, 64)
# Parity checks of codes by their number of states, the latest bit lowest: what k's parity and the grid are
# made of.
CHECKS = {1: (0, 0), 8: (0o5, 0o2), 16: (0o11, 0o2), 32: (0o22, 0o4), 64: (0o41, 0o12)}
# Magnitudes |k| whose bits are tabulated; longer codes are taken to cost as much as the last of them.
_TABULATED = 256
# Squared grid steps that a bit may cost. On a Gaussian source 0.6 is 0.01 bit better at 2 to 4 bits; but
# errors that follow the weights add up where inputs are nearly dependent: 0.6 lost 0.1 bit in SmolLM2's first
# block.
_BIT_COST = 0.3
# Deviations in grid steps at which bits, entropy and error are measured: quarter octaves from 1/4 to 64.
_LOW, _HIGH, _DENSITY = -2, 6, 4
# Samples of each, and rounds in which bits and path settle.
_SAMPLES, _ROUNDS = 16384, 3
DEVIATIONS_LOG2 = np.arange((_HIGH - _LOW) * _DENSITY + 1) / _DENSITY + _LOW


@compiled
def _costs(u, bits_CK):  # type: ignore[no-untyped-def]
    """Least costs of |u| on grid 0 with k even and odd, on grid 1 with k even and odd; and those k."""
    quarter, half, one = np.float32(0.25), np.float32(0.5), np.float32(1)
    last = bits_CK.shape[1] - 1
    k00 = 2 * int(u * quarter + half)
    k01 = 2 * int(u * quarter) + 1
    k10 = 2 * int((u + one) * quarter + half) if u >= np.float32(1.5) else 0
    k11 = 2 * int(max(u - one, np.float32(0)) * quarter + half) + 1
    e00, e01 = u - np.float32(2 * k00), u - np.float32(2 * k01)
    e10, e11 = u - np.float32(2 * k10 - (1 if k10 > 0 else 0)), u - np.float32(2 * k11 - 1)
    c00, c01 = e00 * e00 + bits_CK[0, min(k00, last)], e01 * e01 + bits_CK[0, min(k01, last)]
    c10, c11 = e10 * e10 + bits_CK[1, min(k10, last)], e11 * e11 + bits_CK[1, min(k11, last)]
    nothing = u * u
    if nothing + bits_CK[0, 0] < c00:
        c00, k00 = nothing + bits_CK[0, 0], 0
    if nothing + bits_CK[1, 0] < c10:
        c10, k10 = nothing + bits_CK[1, 0], 0
    return c00, c01, c10, c11, k00, k01, k10, k11


@compiled
def _encode(w_O, scale, bits_CK, parity_S, grid_S, taken_OS, tried_O4, values_O):  # type: ignore[no-untyped-def]
    """The cheapest path for one column in units of 1 / scale; values in grid steps.

    taken, tried: memory for the decisions, by state, and for the candidates.
    """
    states = parity_S.size
    half = states // 2
    costs_S, sums_S = np.full(states, 1e30, np.float32), np.empty(states, np.float32)
    costs_S[0] = 0
    straight, crossed = np.empty(half, np.float32), np.empty(half, np.float32)
    for t in range(w_O.size):
        c00, c01, c10, c11, k00, k01, k10, k11 = _costs(abs(w_O[t] * scale), bits_CK)
        tried_O4[t, 0], tried_O4[t, 1], tried_O4[t, 2], tried_O4[t, 3] = k00, k01, k10, k11
        # States m and m + half share a grid and have opposite parities; both lead to 2m and 2m + 1.
        for m in range(half):
            even, odd = (c10, c11) if grid_S[m] else (c00, c01)
            straight[m], crossed[m] = (odd, even) if parity_S[m] else (even, odd)
        taken_S = taken_OS[t]
        for m in range(half):
            a0, b0 = costs_S[m] + straight[m], costs_S[m + half] + crossed[m]
            a1, b1 = costs_S[m] + crossed[m], costs_S[m + half] + straight[m]
            taken_S[m], taken_S[m + half] = b0 < a0, b1 < a1
            sums_S[2 * m], sums_S[2 * m + 1] = min(a0, b0), min(a1, b1)
        least = sums_S[0]
        for n in range(states):
            least = min(least, sums_S[n])
        for n in range(states):
            costs_S[n] = sums_S[n] - least
    state = 0
    for n in range(1, states):
        if costs_S[n] < costs_S[state]:
            state = n
    for t in range(w_O.size - 1, -1, -1):
        m, step = state >> 1, state & 1
        before = m + half * taken_OS[t, m + half * step]
        grid = grid_S[before]
        k = tried_O4[t, 2 * grid + (step ^ parity_S[before])]
        value = 2 * k - (1 if grid and k > 0 else 0)
        values_O[t] = value if w_O[t] >= 0 else -value
        state = before


@compiled
def round_block(  # type: ignore[no-untyped-def]
    w_BO, upper_BB, steps_B, shrunk_B, classes_B, bits_QCK, parity_S, grid_S, values_BO, errors_BO
):
    """Round the columns of a block one after the other, each column's error moving those after it.

    w_BO is changed: what is left of it is what each column was when it was rounded.
    """
    columns, rows = w_BO.shape
    taken_OS, tried_O4 = np.empty((rows, parity_S.size), np.uint8), np.empty((rows, 4), np.int32)
    for i in range(columns):
        if parity_S.size == 1:
            for t in range(rows):
                values_BO[i, t] = np.int32(np.rint(w_BO[i, t] / steps_B[i]))
        else:
            _encode(
                w_BO[i], np.float32(1) / steps_B[i], bits_QCK[classes_B[i]], parity_S, grid_S, taken_OS,
                tried_O4, values_BO[i],
            )  # fmt: skip
        for t in range(rows):
            errors_BO[i, t] = (w_BO[i, t] - np.float32(values_BO[i, t]) * shrunk_B[i]) / upper_BB[i, i]
        for other in range(i + 1, columns):
            factor = upper_BB[i, other]
            for t in range(rows):
                w_BO[other, t] -= factor * errors_BO[i, t]


@compiled
def grids(values_IO, parity_S, grid_S):  # type: ignore[no-untyped-def]
    """The grid, 0 or 1, and the k of every value of a path; uint8 and int32 (I, O)."""
    grids_IO, k_IO = np.zeros(values_IO.shape, np.uint8), values_IO.copy()
    if parity_S.size == 1:
        return grids_IO, k_IO
    for i in range(values_IO.shape[0]):
        state = 0
        for t in range(values_IO.shape[1]):
            grid, v = grid_S[state], values_IO[i, t]
            sign = (v > 0) - (v < 0)
            k = (v + sign * grid) // 2
            grids_IO[i, t], k_IO[i, t] = grid, k
            state = ((state << 1) | ((k ^ parity_S[state]) & 1)) & (parity_S.size - 1)
    return grids_IO, k_IO


@dataclass(frozen=True)
class Measured:
    """A Gaussian source of deviation 2^(LOW + q / DENSITY) grid steps, by q: bits of every |k| on either grid
    times their cost, (Q, 2, K); entropy in bits; mean squared error in grid steps squared, once values are
    multiplied by `shrinks`, which makes it least."""

    bits_QCK: np.ndarray
    entropies_Q: np.ndarray
    errors_Q: np.ndarray
    shrinks_Q: np.ndarray

    def above_bound(self, bits: float) -> float:
        """By how many bits an entropy of `bits` exceeds log2(deviation^2 / error) / 2, the least there is; a
        plain grid by 0.254 at high rates."""
        place = int(np.flatnonzero(np.diff(self.entropies_Q > bits))[-1])
        places = [place, place + 1]
        found = self.entropies_Q + np.log2(self.errors_Q) / 2 - DEVIATIONS_LOG2
        return float(np.interp(bits, self.entropies_Q[places], found[places]))


@cache
def code(states: int) -> tuple[np.ndarray, np.ndarray]:
    """What a state adds to the parity of k, and its grid; (S,) uint8 each."""
    checks = [[(state & check).bit_count() & 1 for state in range(states)] for check in CHECKS[states]]
    return np.array(checks[0], np.uint8), np.array(checks[1], np.uint8)


@cache
def measured(states: int) -> Measured:
    """By quantizing samples, the same ones for every deviation."""
    z = np.random.default_rng(0).standard_normal(_SAMPLES).astype(np.float32)
    count = (_HIGH - _LOW) * _DENSITY + 1
    bits_QCK = np.zeros((count + 1, 2, _TABULATED), np.float32)  # the last: beyond the table, no bits
    rows = np.zeros((count, 3))
    for q in range(count):
        w = z * np.float32(2 ** (_LOW + q / _DENSITY))
        for _ in range(_ROUNDS):
            grids_O, k_O = (a[0] for a in grids(quantized(w, bits_QCK[q], states)[None], *code(states)))
            bits_QCK[q] = _BIT_COST * _bits(grids_O, np.abs(k_O), bits_QCK.shape[2])
        values = quantized(w, bits_QCK[q], states)
        grids_O, k_O = (a[0] for a in grids(values[None], *code(states)))
        cross, square = float(w @ values), float(values @ values.astype(np.float64))
        shrink = cross / square if square > 0 else 1.0
        rows[q] = _entropy(grids_O, k_O), float(np.mean((w - shrink * values) ** 2)), shrink
    return Measured(bits_QCK, *rows.T)


def quantized(w_O: np.ndarray, bits_CK: np.ndarray, states: int) -> np.ndarray:
    """The cheapest path for a column in grid steps. bits: of every |k| on either grid, times their cost."""
    values_O = np.empty(w_O.size, np.int32)
    memory = np.empty((w_O.size, states), np.uint8), np.empty((w_O.size, 4), np.int32)
    _encode(w_O, np.float32(1), bits_CK, *code(states), *memory, values_O)
    return values_O


def _bits(grids_O: np.ndarray, magnitudes_O: np.ndarray, size: int) -> np.ndarray:
    """-log2 P(k) of either grid by |k|; of those never seen as if seen a quarter of a time."""
    bits_CK = np.zeros((2, size), np.float32)
    for grid in (0, 1):
        counts = np.bincount(magnitudes_O[grids_O == grid], minlength=size)[:size] + 0.25
        shares = counts / counts.sum()
        shares[1:] /= 2  # either sign
        bits_CK[grid] = -np.log2(shares)
    return bits_CK


def _entropy(grids_O: np.ndarray, k_O: np.ndarray) -> float:
    """Bits per value of k given its grid."""
    bits = 0.0
    for grid in (0, 1):
        _, counts = np.unique(k_O[grids_O == grid], return_counts=True)
        bits -= float((counts * np.log2(counts / counts.sum())).sum())
        bits += max(len(counts) - 1, 0) / (
            2 * math.log(2)
        )  # Miller (1955): what a sample's entropy is short by
    return bits / k_O.size


def deviation_classes(deviations_I: Tensor) -> np.ndarray:
    """Which tabulated deviation comes nearest, int64; beyond the table the row without bits."""
    places = (deviations_I.double().clamp(min=2.0**_LOW).log2() - _LOW) * _DENSITY
    last = (_HIGH - _LOW) * _DENSITY
    places = places.round().long()
    return torch.where(places > last, last + 1, places).cpu().numpy()
