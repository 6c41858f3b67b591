"""Group-wise integers around zero, as inference engines read them: a width, and a scale per row and group of
columns.

In the metric of the outputs: scales for the weight as it is, codes for these scales with error feedback
(GPTQ), and then by turns scales for these codes, in closed form, and codes for these scales, one column at a
time given all others. Each of these steps lowers the error, but for the rounding of scales to 16 bit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrsd.numerics.rounding import HessianFactor, round_columns

# Scales tried, as fractions of that which brings a group's largest weight just to the end of the range.
_FRACTIONS = tuple(1.15 - 0.05 * i for i in range(14))
# Columns moved between two updates of all others (one matrix product each).
_BLOCK = 64
# Ridge of the scales' normal equations, in units of their diagonal.
_RIDGE = 1e-4


@dataclass(frozen=True)
class SymmetricCodes:
    """W_ij ~ codes_ij scales_ig, g = j // group; codes (O, I) int8, -2^(bits-1) to 2^(bits-1) - 1."""

    codes_OI: Tensor
    scales_OG: Tensor
    bits: int
    group: int

    def dense(self) -> Tensor:
        """(O, I) float32."""
        return (_grouped(self.codes_OI.float(), self.group) * self.scales_OG.float()[..., None]).flatten(1)


def round_symmetric(
    W_OI: Tensor,
    factor: HessianFactor,
    gram_II: Tensor,
    bits: int,
    group: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    alternations: int = 1,
) -> SymmetricCodes:
    """min tr((W - Q s) G (W - Q s)^T) over codes Q and scales s, which are stored in `dtype`.

    Args: gram (I, I): G; `group` must divide I; alternations: rounds of refitting scales and codes.
    Source: error feedback: GPTQ (ICLR 2023). With the codes fixed each row's scales are a linear least
        squares problem in as many unknowns as there are groups; coordinate descent over columns: QuantEase
        (arXiv 2309.01885).
    """
    W_OI, gram_II = W_OI.float(), gram_II.float()
    variances_I = torch.empty_like(W_OI[0])
    variances_I[factor.order_I] = factor.upper_II.diagonal().float() ** -2
    scales_OG = fitted_scales(W_OI, variances_I, bits, group).to(dtype)
    codes_OI = _rounded_with_feedback(W_OI, factor, scales_OG, bits, group)
    codes = SymmetricCodes(codes_OI, scales_OG, bits, group)
    for _ in range(alternations):
        scales_OG = _refitted(codes, W_OI, gram_II).to(dtype)
        codes = _descended(SymmetricCodes(codes.codes_OI, scales_OG, bits, group), W_OI, gram_II)
    return codes


def weighted_error(W_OI: Tensor, variances_I: Tensor, bits: int, group: int) -> float:
    """sum_ij e_ij^2 variances_j of plain rounding: with variances 1 / U_jj^2 what error feedback is left
    with, as far as the weights that it moves are like those it began with."""
    scales_OG = fitted_scales(W_OI, variances_I, bits, group)
    W_OGJ = _grouped(W_OI, group)
    lost_OGJ = _rounded(W_OGJ, scales_OG[..., None], bits) * scales_OG[..., None] - W_OGJ
    return float((lost_OGJ**2 * variances_I.view(-1, group)).sum(dtype=torch.float64))


def fitted_scales(W_OI: Tensor, variances_I: Tensor, bits: int, group: int) -> Tensor:
    """Scales (O, G) of least squared error, channels weighed by `variances`, among a few clippings.

    A scale takes the sign that gives the largest weight of its group the longer end of the range.
    """
    W_OGJ, variances_GJ = _grouped(W_OI, group), variances_I.view(-1, group)
    largest_OG = W_OGJ.gather(-1, W_OGJ.abs().argmax(-1, keepdim=True)).squeeze(-1)
    whole_OG = largest_OG / -(2 ** (bits - 1))
    whole_OG = torch.where(whole_OG == 0, torch.ones_like(whole_OG), whole_OG)
    best_OG, scales_OG = torch.full_like(whole_OG, torch.inf), whole_OG
    for fraction in _FRACTIONS:
        tried_OG1 = (fraction * whole_OG)[..., None]
        lost_OGJ = _rounded(W_OGJ, tried_OG1, bits) * tried_OG1 - W_OGJ
        error_OG = (lost_OGJ.square_() * variances_GJ).sum(-1)
        better_OG = error_OG < best_OG
        best_OG = torch.where(better_OG, error_OG, best_OG)
        scales_OG = torch.where(better_OG, tried_OG1[..., 0], scales_OG)
    return scales_OG


def _grouped(values_OI: Tensor, group: int) -> Tensor:
    return values_OI.view(values_OI.shape[0], -1, group)


def _rounded(values: Tensor, scales: Tensor, bits: int) -> Tensor:
    return (values / scales).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _rounded_with_feedback(
    W_OI: Tensor, factor: HessianFactor, scales_OG: Tensor, bits: int, group: int
) -> Tensor:
    scales_GO = scales_OG.float().T.contiguous()

    def quantize(j: int, w_O: Tensor) -> tuple[Tensor, Tensor]:
        code_O = _rounded(w_O, scales_GO[j // group], bits)
        return code_O.int(), code_O * scales_GO[j // group]

    return round_columns(W_OI, factor, quantize)[0].to(torch.int8)


def _descended(codes: SymmetricCodes, W_OI: Tensor, gram_II: Tensor) -> SymmetricCodes:
    """One pass over the columns, each rounded to what is best given all others."""
    codes_IO = codes.codes_OI.T.float().contiguous()
    scales_GO = codes.scales_OG.float().T.contiguous()
    pulls_IO = gram_II @ (W_OI - codes.dense()).T
    diagonal_I = gram_II.diagonal().clamp(min=torch.finfo(torch.float32).tiny)
    for start in range(0, len(codes_IO), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(codes_IO)))
        gram_BB, moved_BO = gram_II[block, block], torch.empty_like(codes_IO[block])
        pulls_BO = pulls_IO[block]
        for i in range(len(moved_BO)):
            j, scale_O = start + i, scales_GO[(start + i) // codes.group]
            code_O = _rounded(codes_IO[j] * scale_O + pulls_BO[i] / diagonal_I[j], scale_O, codes.bits)
            moved_BO[i] = (code_O - codes_IO[j]) * scale_O
            codes_IO[j] = code_O
            pulls_BO.addr_(gram_BB[:, i], moved_BO[i], alpha=-1)
        rest = torch.ones(len(codes_IO), dtype=torch.bool, device=W_OI.device)
        rest[block] = False
        pulls_IO[rest] -= gram_II[rest, block] @ moved_BO
    return SymmetricCodes(codes_IO.T.to(torch.int8).contiguous(), codes.scales_OG, codes.bits, codes.group)


def _refitted(codes: SymmetricCodes, W_OI: Tensor, gram_II: Tensor) -> Tensor:
    """Scales (O, G) of least error for the codes; those of a group without any stay as they are."""
    Q_OI, group = codes.codes_OI.float(), codes.group
    right_OG = _grouped(Q_OI * (W_OI @ gram_II), group).sum(-1)
    left = [
        _grouped(Q_OJ @ gram_JI * Q_OI, group).sum(-1)
        for Q_OJ, gram_JI in zip(Q_OI.split(group, 1), gram_II.split(group), strict=True)
    ]
    left_OGG = torch.stack(left, 1).double()
    diagonal_OG = left_OGG.diagonal(dim1=1, dim2=2)
    empty_OG = diagonal_OG <= 0
    left_OGG = left_OGG + torch.diag_embed(_RIDGE * diagonal_OG + empty_OG.double())
    scales_OG = torch.linalg.solve(left_OGG, right_OG.double()).float()
    usable_OG = scales_OG.isfinite() & (scales_OG != 0) & ~empty_OG
    return torch.where(usable_OG, scales_OG, codes.scales_OG.float())
