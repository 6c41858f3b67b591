"""Rounding a weight to integer codes with error feedback: each column's error moves the columns still to
come.

Two kinds of codes: entropy-coded scalar quantization (ECSQ), one step per column and no bound on the codes,
whose bytes are what an entropy coder needs; and group-wise codes of 2^b levels, whose bytes are known
beforehand.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from lrsd.errors import SolverError
from lrsd.numerics.lowrank import cholesky
from lrsd.numerics.trellis import DEVIATIONS_LOG2, STATES, code, deviation_classes, measured, round_block

# Ridge on G in units of its diagonal: of the mean, the GPTQ default, or of every channel's own.
DAMPING = 0.01
# Least ridge of a channel, in units of the mean diagonal: of one that hardly ever moves.
_LEAST_RIDGE = 1e-6
# Columns rounded between two updates of all later ones (one matrix product each).
_BLOCK = 64
# Steps lie on this many values per octave, so that a column's step is one byte: being off the ideal
# step by up to 4 % costs 0.003 bit, a 16-bit step would cost more than twice that.
STEPS_PER_OCTAVE = 8
_STEP_RANGE = 255
# Clipping of a group's range tried for a fixed-width grid, as fractions of it.
_SHRINKS = tuple(1 - i / 20 for i in range(11))
# Weights whose groups are fitted at once: few enough for a CPU's cache, many for an accelerator.
_FITTED = 2**20


@dataclass(frozen=True)
class HessianFactor:
    """The factor by which error feedback moves the later columns, for one metric G.

    order_I: columns as they are rounded, G_jj descending; upper_II: U with U^T U = (G + damping)^-1 in
    that order, float32. 1 / U_jj^2 is the variance of x_j that the columns after it cannot explain. damping:
    the ridge if it had to be raised, else 0.
    Source: GPTQ (ICLR 2023), section 3, with its activation order.
    """

    order_I: Tensor
    upper_II: Tensor
    damping: float = 0.0

    @property
    def width(self) -> int:
        return self.order_I.numel()

    @cached_property
    def on_host(self) -> "HessianFactor":
        """The same in a CPU's memory: copied once for all that is rounded with it."""
        return HessianFactor(self.order_I.cpu(), self.upper_II.cpu(), self.damping)


def hessian_factor(
    gram_II: Tensor, damping: float = DAMPING, *, by_channel: bool = False, together: int = 1
) -> HessianFactor:
    """Factor a metric; the ridge is raised tenfold while G + ridge is not positive definite.

    by_channel: every channel's ridge in units of its own G_jj instead of their mean, by which one massive
    channel would damp the feedback of all. together: neighbors that the order keeps together. Raises:
    SolverError.
    """
    first = damping
    gram_II = gram_II.double()
    diagonal_I = gram_II.diagonal()
    groups_G = diagonal_I.view(-1, together).sum(1).argsort(descending=True, stable=True)
    order_I = (together * groups_G[:, None] + torch.arange(together, device=groups_G.device)).flatten()
    backward_I = order_I.flip(0)
    scale = float(diagonal_I.mean()) or 1.0
    ridge_I = torch.full_like(diagonal_I, scale)
    if by_channel:
        ridge_I = diagonal_I[order_I].clamp(min=_LEAST_RIDGE * scale)
    while True:
        # With R R^T = G + damping and R upper triangular, U = R^-1: no explicit inverse of G is formed.
        # Of a wide layer every square takes gigabytes: none is held longer than it is needed.
        damped_II = gram_II[backward_I][:, backward_I]
        damped_II.diagonal().add_((damping * ridge_I).flip(0))
        lower_II = cholesky(damped_II)
        del damped_II
        if lower_II is not None and bool(diagonal_I.isfinite().all()):
            R_II = lower_II.flip(0, 1)
            del lower_II
            identity_II = torch.eye(len(R_II), dtype=R_II.dtype, device=R_II.device)
            upper_II = torch.linalg.solve_triangular(R_II, identity_II, upper=True)
            return HessianFactor(order_I, upper_II.float(), damping if damping > first else 0.0)
        if not damping < 1e3 or not bool(
            diagonal_I.isfinite().all()
        ):  # a finite positive semidefinite matrix factors long before
            raise SolverError("the moments of its inputs are not finite or not positive semidefinite")
        damping *= 10
        ridge_I = torch.full_like(diagonal_I, scale)  # where some G_jj are noise their mean is not


def round_columns(
    W_OI: Tensor, factor: HessianFactor, quantize: Callable[[int, Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Round column by column; what a column loses is made up for by those after it, as far as they can.

    Args: quantize(j, w_O) -> codes (whole numbers of any type) and values of column j, given what feedback
        has made of it.
    Returns: codes (O, I) int32 and values (O, I) float32.
    """
    ordered_IO = W_OI.float().T[factor.order_I].contiguous()
    codes_IO = torch.empty(ordered_IO.shape, dtype=torch.int32, device=W_OI.device)
    values_IO = torch.empty_like(ordered_IO)
    upper_II, columns = factor.upper_II, factor.order_I.tolist()
    for start in range(0, factor.width, _BLOCK):
        stop = min(start + _BLOCK, factor.width)
        # Put together per block: an accelerator has a launch less for each.
        codes, values, errors = list[Tensor](), list[Tensor](), list[Tensor]()
        for i in range(start, stop):
            code_O, value_O = quantize(columns[i], ordered_IO[i])
            error_O = (ordered_IO[i] - value_O) / upper_II[i, i]
            ordered_IO[i + 1 : stop].addr_(upper_II[i, i + 1 : stop], error_O, alpha=-1)
            codes.append(code_O)
            values.append(value_O)
            errors.append(error_O)
        codes_IO[start:stop], values_IO[start:stop] = torch.stack(codes), torch.stack(values)
        ordered_IO[stop:] -= upper_II[start:stop, stop:].T @ torch.stack(errors)
    back_I = factor.order_I.argsort()
    return codes_IO[back_I].T.contiguous(), values_IO[back_I].T.contiguous()


@dataclass(frozen=True)
class EntropyCodes:
    """W_ij ~ codes_ij 2^((exponent + offsets_j) / 8): codes (O, I) int32, offsets_I uint8; every column a
    path through a trellis of so many states, 1 being a plain grid."""

    codes_OI: Tensor
    offsets_I: Tensor
    exponent: int
    states: int = 1

    def dense(self) -> Tensor:
        """(O, I) float32."""
        return self.codes_OI.float() * column_steps(self.offsets_I, self.exponent)


def column_steps(offsets_I: Tensor, exponent: int) -> Tensor:
    """2^((exponent + offset) / 8), float32: a table and a shift, so that all machines agree to the bit."""
    eighths = offsets_I.long() + exponent
    fractions = torch.tensor([2.0 ** (i / STEPS_PER_OCTAVE) for i in range(STEPS_PER_OCTAVE)])
    fractions = fractions.to(offsets_I.device, non_blocking=True)  # a layer's product does not wait for it
    whole = eighths.div(STEPS_PER_OCTAVE, rounding_mode="floor")
    return torch.ldexp(fractions[eighths - whole * STEPS_PER_OCTAVE], whole)


def round_entropy_coded(
    W_OI: Tensor, factor: HessianFactor, step: float, states: int = STATES[-1]
) -> EntropyCodes:
    """Codes of least entropy for a given output error, each column with the step its inputs ask for.

    Column j is rounded to multiples of about step * U_jj, so that every column adds the same error to
    the output (reverse water-filling); a column whose inputs vary little gets short codes or none. The
    step that is stored is the rounding step times the factor that makes code * step the best estimate
    of a normally distributed weight; towards 1 bit and below this saves 0.1 bit and more.

    Args: step: root of the output error's quantum per column, in output units per row; states: see
        `numerics.trellis`.
    Source: WaterSIC (arXiv 2603.04956), water-filling over GPTQ's feedback; cf. Ordentlich & Polyanskiy,
        "Optimal quantization for matrix multiplication", 2024; ECSQ: Gish & Pierce 1968.
    """
    table = gaussian_table(str(W_OI.device), states)
    ideal_I = torch.empty(factor.width, device=W_OI.device)
    ideal_I[factor.order_I] = step * factor.upper_II.diagonal()
    # Above this step a column would round to zero anyway: its codes are as cheap as they can be.
    ceiling = 4 * W_OI.abs().amax().clamp(min=torch.finfo(torch.float32).tiny).float()
    ideal_I = ideal_I.clamp(min=ceiling * 2.0 ** (-_STEP_RANGE / STEPS_PER_OCTAVE), max=ceiling)
    deviations_I = W_OI.float().std(0, unbiased=False)
    shrinks_I = table.shrink(deviations_I / ideal_I)
    eighths_I = (STEPS_PER_OCTAVE * (ideal_I * shrinks_I).log2()).round().long()
    exponent = int(eighths_I.min())
    offsets_I = (eighths_I - exponent).clamp(max=_STEP_RANGE).to(torch.uint8)
    stored_I = column_steps(offsets_I, exponent)
    rounding_I = stored_I / shrinks_I
    codes_OI = _round_paths(W_OI, factor, rounding_I, stored_I, deviations_I, states)
    return EntropyCodes(codes_OI, offsets_I, exponent, states)


def _round_paths(
    W_OI: Tensor,
    factor: HessianFactor,
    rounding_I: Tensor,
    stored_I: Tensor,
    deviations_I: Tensor,
    states: int,
) -> Tensor:
    """Codes (O, I) int32 of `round_columns` on a CPU, by compiled loops. rounding, stored: steps to round
    with and to read back with."""
    factor = factor.on_host
    order_I, upper_II = factor.order_I, factor.upper_II
    ordered_IO = W_OI.float().cpu().T[order_I].contiguous()
    codes_IO = torch.empty(ordered_IO.shape, dtype=torch.int32)
    about_3I = torch.stack([rounding_I.float(), stored_I.float(), deviations_I / rounding_I]).cpu()
    steps_I, shrunk_I, relative_I = about_3I[:, order_I]
    classes_I = deviation_classes(relative_I)
    bits_QCK = (
        measured(states).bits_QCK if states > 1 else np.zeros((len(DEVIATIONS_LOG2) + 1, 2, 1), np.float32)
    )
    for start in range(0, factor.width, _BLOCK):
        here = slice(start, min(start + _BLOCK, factor.width))
        errors_BO = torch.empty_like(ordered_IO[here])
        round_block(
            ordered_IO[here].numpy(), upper_II[here, here].contiguous().numpy(), steps_I[here].numpy(),
            shrunk_I[here].numpy(), classes_I[here], bits_QCK, *code(states), codes_IO[here].numpy(),
            errors_BO.numpy(),
        )  # fmt: skip
        ordered_IO[here.stop :] -= upper_II[here, here.stop :].T @ errors_BO
    return codes_IO[order_I.argsort()].T.contiguous().to(W_OI.device)


@dataclass(frozen=True)
class GaussianTable:
    """A normal variable of deviation x steps, rounded: its entropy in bits, mean squared error in steps
    squared, and the factor on the codes that makes this error least. Indexed by log2 x."""

    entropies: Tensor
    errors: Tensor
    shrinks: Tensor

    def entropy(self, deviation: Tensor) -> Tensor:
        return self.entropies[self._index(deviation)]

    def error(self, deviation: Tensor) -> Tensor:
        return self.errors[self._index(deviation)]

    def shrink(self, deviation: Tensor) -> Tensor:
        return self.shrinks[self._index(deviation)]

    def _index(self, deviation: Tensor) -> Tensor:
        place = (deviation.clamp(min=2.0**_TABLE_LOW).log2() - _TABLE_LOW) * _TABLE_DENSITY
        return place.round().long().clamp(max=self.errors.numel() - 1)


# log2 of the deviations tabulated: from all codes zero to 14 bits; 16 per octave.
_TABLE_LOW, _TABLE_HIGH, _TABLE_DENSITY = -4, 13, 16


@cache
def gaussian_table(device: str = "cpu", states: int = 1) -> GaussianTable:
    """On a plain grid in closed form; of a trellis as `measured`."""
    if states > 1:
        return _trellis_table(device, states)
    rows = []
    for index in range((_TABLE_HIGH - _TABLE_LOW) * _TABLE_DENSITY + 1):
        x = 2.0 ** (_TABLE_LOW + index / _TABLE_DENSITY)
        codes = torch.arange(math.ceil(8 * x) + 2, dtype=torch.float64)
        low, high = (codes - 0.5) / x, (codes + 0.5) / x
        mass = torch.special.ndtr(-low) - torch.special.ndtr(-high)
        first = x * (_density(low) - _density(high))  # E[w; code]
        mass, first = 2 * mass, 2 * first  # both signs
        mass[0], first[0] = mass[0] / 2, 0.0
        halves = torch.cat([mass[:1], mass[1:] / 2, mass[1:] / 2])
        halves = halves[halves > 0]
        entropy = float(-(halves * halves.log2()).sum())
        cross, square = float((codes * first).sum()), float((codes**2 * mass).sum())
        shrink = cross / square if square > 1e-12 else 1.0
        rows.append((entropy, max(x * x - 2 * shrink * cross + shrink**2 * square, 0.0), shrink))
    table = torch.tensor(rows, dtype=torch.float32, device=device)
    return GaussianTable(table[:, 0], table[:, 1], table[:, 2])


def _trellis_table(device: str, states: int) -> GaussianTable:
    """Interpolated between the measured deviations. Below them every code is zero; above them a bit is an
    octave and the error stays."""
    found = measured(states)
    known = DEVIATIONS_LOG2
    wanted = _TABLE_LOW + np.arange((_TABLE_HIGH - _TABLE_LOW) * _TABLE_DENSITY + 1) / _TABLE_DENSITY
    beyond, below = (wanted - known[-1]).clip(min=0), wanted < known[0]
    entropies = np.where(below, 0.0, np.interp(wanted, known, found.entropies_Q) + beyond)
    errors = np.where(below, 4.0**wanted, np.interp(wanted, known, found.errors_Q))
    shrinks = np.interp(wanted, known, found.shrinks_Q)
    return GaussianTable(
        *(torch.tensor(row, dtype=torch.float32, device=device) for row in (entropies, errors, shrinks))
    )


def _density(z: Tensor) -> Tensor:
    return (-z * z / 2).exp() / math.sqrt(2 * math.pi)


@dataclass(frozen=True)
class GroupCodes:
    """W_ij ~ (codes_ij - zeros_ig) scales_ig, g = j // group; codes 0..2^bits - 1."""

    codes_OI: Tensor
    scales_OG: Tensor
    zeros_OG: Tensor
    bits: int
    group: int

    def dense(self) -> Tensor:
        """(O, I) float32."""
        columns = torch.arange(self.codes_OI.shape[1], device=self.codes_OI.device) // self.group
        return (self.codes_OI.float() - self.zeros_OG.float()[:, columns]) * self.scales_OG.float()[
            :, columns
        ]


def nearest_groupwise(W_OI: Tensor, bits: int, group: int, dtype: torch.dtype = torch.bfloat16) -> GroupCodes:
    """The same grid as `round_groupwise`, each weight rounded to the nearest."""
    scales_OG, zeros_OG = _fit_groups(W_OI.float(), bits, group, dtype)
    columns = torch.arange(W_OI.shape[1], device=W_OI.device) // group
    codes_OI = (W_OI / scales_OG[:, columns] + zeros_OG[:, columns]).round().clamp(0, 2**bits - 1)
    return GroupCodes(codes_OI.to(torch.uint8), scales_OG.to(dtype), zeros_OG.to(torch.uint8), bits, group)


def round_groupwise(
    W_OI: Tensor, factor: HessianFactor, bits: int, group: int, dtype: torch.dtype = torch.bfloat16
) -> GroupCodes:
    """Codes of `bits` bits with a scale and a zero per row and group of columns: GPTQ.

    Scales and zeros are fixed beforehand ("static groups"), those of least squared error of the
    weights among eleven clippings of the group's range; scales in `dtype`, as stored.
    """
    scales_OG, zeros_OG = _fit_groups(W_OI.float(), bits, group, dtype)
    top = 2**bits - 1

    def quantize(j: int, w_O: Tensor) -> tuple[Tensor, Tensor]:
        scale_O, zero_O = scales_OG[:, j // group], zeros_OG[:, j // group]
        code_O = (w_O / scale_O + zero_O).round().clamp(0, top)
        return code_O, (code_O - zero_O) * scale_O

    codes_OI, _ = round_columns(W_OI, factor, quantize)
    return GroupCodes(codes_OI.to(torch.uint8), scales_OG.to(dtype), zeros_OG.to(torch.uint8), bits, group)


def _fit_groups(W_OI: Tensor, bits: int, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales and zeros (O, G) float32, many groups at a time; the last one may be shorter."""
    rows, columns = W_OI.shape
    at_once = group * max(1, _FITTED // (rows * group))
    whole = columns // group * group
    parts = [part.reshape(rows, -1, group) for part in W_OI[:, :whole].split(at_once, 1) if whole]
    if whole < columns:
        parts.append(W_OI[:, None, whole:])
    scales, zeros = zip(*(_fit_part(part, 2**bits - 1, dtype) for part in parts), strict=True)
    return torch.cat(scales, 1), torch.cat(zeros, 1)


def _fit_part(W_OGB: Tensor, top: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    low_OG, high_OG = W_OGB.amin(-1).clamp(max=0), W_OGB.amax(-1).clamp(min=0)
    best_OG = torch.full_like(low_OG, math.inf)
    scale_OG, zero_OG = torch.ones_like(low_OG), torch.zeros_like(low_OG)
    for shrink in _SHRINKS:
        tried_OG = ((high_OG - low_OG) * shrink / top).to(dtype).float()
        tried_OG = torch.where(tried_OG > 0, tried_OG, torch.ones_like(tried_OG))
        offset_OG = (-low_OG * shrink / tried_OG).round().clamp(0, top)
        codes_OGB = (W_OGB / tried_OG[..., None] + offset_OG[..., None]).round().clamp(0, top)
        error_OG = (((codes_OGB - offset_OG[..., None]) * tried_OG[..., None] - W_OGB) ** 2).sum(-1)
        better = error_OG < best_OG
        best_OG = torch.where(better, error_OG, best_OG)
        scale_OG, zero_OG = torch.where(better, tried_OG, scale_OG), torch.where(better, offset_OG, zero_OG)
    return scale_OG, zero_OG
