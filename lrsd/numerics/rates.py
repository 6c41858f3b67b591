"""Rate-distortion curves of integer codes: what they would cost a layer and how much they would err."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrsd.numerics.lowrank import Spectrum
from lrsd.numerics.rounding import STEPS_PER_OCTAVE, HessianFactor, gaussian_table

# What the entropy coder takes beyond the entropy: bytes for its first table, and bits per weight, which in a
# small layer come to no less than so many bytes: its alphabet has hardly been seen when it ends.
_CODER_BYTES, _CODER_BITS, _CODER_LEAST = 60, 0.03, 180
# Finest and coarsest step of a ladder in weights' deviations: 14 bits per weight, and next to none.
_FINEST, _COARSEST = -13, 3


@dataclass(frozen=True)
class EcsqRates:
    """Entropy-coded codes on top of ranks, over a ladder of steps: one entry per rank and step.

    streams_N: bytes of the codes; errors_N: relative output errors.
    """

    ranks_N: Tensor
    steps_N: Tensor
    streams_N: Tensor
    errors_N: Tensor


def ecsq_rates(
    W_OI: Tensor, factor: HessianFactor, whole: Spectrum | None, total: float, ranks: Sequence[int]
) -> EcsqRates:
    """Entropy-coded codes on top of each of these ranks, over a ladder of steps.

    A column is taken as normally distributed: with x_j its deviation in steps, bytes are the mean over
    columns of the entropy of round(x_j z), z ~ N(0, 1), and the error is the sum of its mean squared
    errors times O step^2 / tr(W G W^T). The error comes out too high where massive activations make the
    damping inside the feedback count. What is left of a column after rank r comes from the spectrum.

    Args: factor: of the layer's metric; whole: spectrum of W in it, None if only rank 0 is
        asked for; total: tr(W G W^T).
    """
    out_features = W_OI.shape[0]
    diagonal_I = torch.empty(factor.width, device=W_OI.device)
    diagonal_I[factor.order_I] = factor.upper_II.diagonal()
    energies_I = (W_OI.float() ** 2).sum(0)
    explained_RI = None
    if whole is not None:
        explained_RI = ((whole.basis_OR.T[: max(ranks)].float() @ W_OI.float()) ** 2).cumsum(0)
    table = gaussian_table(str(W_OI.device))
    beyond = max(_CODER_BITS * W_OI.numel() / 8, _CODER_LEAST)
    ladder = torch.arange(_FINEST * STEPS_PER_OCTAVE, _COARSEST * STEPS_PER_OCTAVE + 1).flip(0)
    columns: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for rank in ranks:
        left_I = energies_I if rank == 0 or explained_RI is None else energies_I - explained_RI[rank - 1]
        whitened_I = (left_I.clamp(min=0) / out_features).sqrt() / diagonal_I
        middle = float(whitened_I.clamp(min=torch.finfo(torch.float32).tiny).log2().mean())
        steps_S = torch.exp2(middle + ladder.to(W_OI.device) / STEPS_PER_OCTAVE)
        deviations_SI = whitened_I / steps_S[:, None]
        bits_S = table.entropy(deviations_SI).mean(1).double()
        errors_S = table.error(deviations_SI).sum(1) * steps_S**2 * out_features / total
        streams_S = (bits_S * W_OI.numel() / 8 + beyond).floor() + _CODER_BYTES
        columns.append((torch.full_like(steps_S, rank), steps_S, streams_S, errors_S))
    ranks_N, steps_N, streams_N, errors_N = (
        torch.cat(parts).double().cpu() for parts in zip(*columns, strict=True)
    )
    return EcsqRates(ranks_N.long(), steps_N, streams_N.long(), errors_N)
