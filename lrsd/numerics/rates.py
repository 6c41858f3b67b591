"""Rate-distortion curves of integer codes: what they would cost a layer and how much they would err."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrsd.numerics.lowrank import Spectrum
from lrsd.numerics.metric import Metric
from lrsd.numerics.rounding import STEPS_PER_OCTAVE, gaussian_table

# Bytes that the entropy coder takes beyond the entropy: for header and tables, and for each row and column,
# whose classes it stores. Of normally distributed weights; a real layer's are measured, see `methods.coded`.
_CODER_BYTES, _CHANNEL_BYTES = 40, 0.25
# Finest and coarsest step of a ladder in weights' deviations: 14 bits per weight, and next to none.
_FINEST, _COARSEST = -13, 3


@dataclass(frozen=True)
class EntropyCodedRates:
    """Entropy-coded codes on top of ranks, over a ladder of steps: one entry per rank and step.

    streams_N: bytes of the codes; errors_N: relative output errors.
    """

    ranks_N: Tensor
    steps_N: Tensor
    streams_N: Tensor
    errors_N: Tensor


def entropy_coded_rates(
    W_OI: Tensor, metric: Metric, whole: Spectrum | None, total: float, ranks: Sequence[int], states: int
) -> EntropyCodedRates:
    """Entropy-coded codes on top of each of these ranks, over a ladder of steps.

    A weight is taken as normally distributed with deviation a_i x_j in steps, the row's times the column's:
    bytes are the mean of the entropy of a_i x_j z as it is quantized, z ~ N(0, 1), and the error is the sum
    over columns of its mean squared error times (U G U^T)_jj, O step^2 / tr(W G W^T) as a whole: what
    feedback leaves of rounding errors E is E U, with U of the damped metric. What is left of a column after
    rank r comes from the spectrum.

    Args: whole: spectrum of W in the metric, None if only rank 0 is asked for; total: tr(W G W^T);
        states: of the trellis.
    """
    factor = metric.factor
    out_features = W_OI.shape[0]
    diagonal_I = torch.empty(factor.width, device=W_OI.device)
    diagonal_I[factor.order_I] = factor.upper_II.diagonal()
    shares_I = torch.empty_like(diagonal_I)
    shares_I[factor.order_I] = metric.shares
    energies_I = (W_OI.float() ** 2).sum(0)
    explained_RI = None
    if whole is not None:
        explained_RI = ((whole.basis_OR.T[: max(ranks)].float() @ W_OI.float()) ** 2).cumsum(0)
    table = gaussian_table(str(W_OI.device), states)
    classes = _CHANNEL_BYTES * (W_OI.shape[0] + W_OI.shape[1])
    ladder = torch.arange(_FINEST * STEPS_PER_OCTAVE, _COARSEST * STEPS_PER_OCTAVE + 1).flip(0)
    scales_C, shares_C = _row_classes(W_OI)
    columns: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for rank in ranks:
        left_I = energies_I if rank == 0 or explained_RI is None else energies_I - explained_RI[rank - 1]
        whitened_I = (left_I.clamp(min=0) / out_features).sqrt() / diagonal_I
        middle = float(whitened_I.clamp(min=torch.finfo(torch.float32).tiny).log2().mean())
        steps_S = torch.exp2(middle + ladder.to(W_OI.device) / STEPS_PER_OCTAVE)
        deviations_SI = whitened_I / steps_S[:, None]
        bits_S, errors_S = torch.zeros_like(steps_S), torch.zeros_like(steps_S)
        for scale, share in zip(scales_C, shares_C, strict=True):
            bits_S += share * table.entropy(deviations_SI * scale).mean(1)
            errors_S += share * (table.error(deviations_SI * scale) @ shares_I)
        bits_S, errors_S = bits_S.double(), errors_S * steps_S**2 * out_features / total
        # Next to none where nearly every code is zero.
        beyond_S = classes * (4 * bits_S).clamp(max=1)
        streams_S = (bits_S * W_OI.numel() / 8 + beyond_S).floor() + _CODER_BYTES
        columns.append((torch.full_like(steps_S, rank), steps_S, streams_S, errors_S))
    ranks_N, steps_N, streams_N, errors_N = torch.stack(
        [torch.cat(parts).double() for parts in zip(*columns, strict=True)]
    ).cpu()
    return EntropyCodedRates(ranks_N.long(), steps_N, streams_N.long(), errors_N)


def _row_classes(W_OI: Tensor) -> tuple[list[float], list[float]]:
    """Deviations of rows over those of their columns, in quarter octaves, and the share of rows of each."""
    squares_OI = W_OI.float() ** 2
    tiny = torch.finfo(torch.float32).tiny
    rows_O = (squares_OI / squares_OI.mean(0).clamp(min=tiny)).mean(1).clamp(min=tiny)
    quarters, counts = (2 * rows_O.log2()).round().unique(return_counts=True)
    return (quarters / 4).exp2().tolist(), (counts / len(rows_O)).tolist()
