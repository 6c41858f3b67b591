"""What integer codes would cost a layer and how much they would err, without rounding it."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from lrsd.numerics.allocate import Codes, LayerPlan, Shape, grid_bytes
from lrsd.numerics.lowrank import Spectrum
from lrsd.numerics.quantize import (
    STEPS_PER_OCTAVE,
    Feedback,
    GridCodes,
    LatticeCodes,
    gaussian_table,
    round_to_grid,
    round_to_lattice,
)
from lrsd.numerics.solver import columns_beside_codes, decompose_coded

# What the entropy coder takes beyond the entropy: bytes for its first table, and bits per weight, which in a
# small layer come to no less than so many bytes: its alphabet has hardly been seen when it ends.
_CODER_BYTES, _CODER_BITS, _CODER_LEAST = 60, 0.03, 180
# Finest and coarsest step of a ladder in weights' deviations: 14 bits per weight, and next to none.
_FINEST, _COARSEST = -13, 3
# Widest codes that are tried out; a bit more quarters the error.
_MEASURED_BITS = 4


def quantiser(codes: Codes) -> Callable[[Tensor, Feedback], LatticeCodes | GridCodes]:
    """The rounding that a plan's codes ask for."""
    if codes.bits is None:
        return partial(round_to_lattice, step=codes.step)
    return partial(round_to_grid, bits=codes.bits, group=codes.group)


def lattice_plans(
    W_OI: Tensor, carry: Feedback, whole: Spectrum | None, total: float, ranks: Sequence[int]
) -> tuple[LayerPlan, ...]:
    """Entropy-coded codes beside each of these ranks, over a ladder of steps.

    A column is taken as normally distributed: with x_j its deviation in steps, bytes are the mean over
    columns of the entropy of round(x_j z), z ~ N(0, 1), and the error is the sum of its mean squared
    errors times O step^2 / tr(W G W^T). The error comes out too high where massive activations make the
    damping inside the feedback count. What is left of a column after rank r comes from the spectrum.

    Args: carry: feedback of the layer's metric; whole: spectrum of W in it, None if only rank 0 is
        asked for; total: tr(W G W^T).
    """
    shape = Shape(*W_OI.shape)
    diagonal_I = torch.empty(carry.width, device=W_OI.device)
    diagonal_I[carry.order_I] = carry.upper_II.diagonal()
    energies_I = (W_OI.float() ** 2).sum(0)
    explained_RI = None
    if whole is not None:
        explained_RI = ((whole.basis_OR.T[: max(ranks)].float() @ W_OI.float()) ** 2).cumsum(0)
    table = gaussian_table(str(W_OI.device))
    beyond = max(_CODER_BITS * W_OI.numel() / 8, _CODER_LEAST)
    plans = []
    for rank in ranks:
        left_I = energies_I if rank == 0 or explained_RI is None else energies_I - explained_RI[rank - 1]
        whitened_I = (left_I.clamp(min=0) / shape.out_features).sqrt() / diagonal_I
        middle = float(whitened_I.clamp(min=torch.finfo(torch.float32).tiny).log2().mean())
        ladder = torch.arange(_FINEST * STEPS_PER_OCTAVE, _COARSEST * STEPS_PER_OCTAVE + 1).flip(0)
        steps_S = torch.exp2(middle + ladder.to(W_OI.device) / STEPS_PER_OCTAVE)
        deviations_SI = whitened_I / steps_S[:, None]
        bits_S = table.entropy(deviations_SI).mean(1).tolist()
        errors_S = (table.error(deviations_SI).sum(1) * steps_S**2 * shape.out_features / total).tolist()
        for step, bits, error in zip(steps_S.tolist(), bits_S, errors_S, strict=True):
            size = int(bits * W_OI.numel() / 8 + beyond) + shape.in_features + _CODER_BYTES
            plans.append(LayerPlan(rank, error=error, codes=Codes(size, step=step)))
    return tuple(sorted(plans, key=lambda plan: plan.nbytes(shape)))


def grid_plans(
    W_OI: Tensor,
    gram_II: Tensor,
    carry: Feedback,
    *,
    widths: Sequence[int],
    group: int,
    columns: Sequence[int] = (0,),
) -> tuple[LayerPlan, ...]:
    """Fixed-width codes beside each number of kept columns, rounded at 2, 3 and 4 bit to see the error;
    wider ones quarter it per bit.
    """
    shape = Shape(*W_OI.shape)
    plans = []
    for kept in columns:
        split, beside = columns_beside_codes(W_OI, gram_II, kept, carry)
        measured: dict[int, float] = {}
        for bits in sorted(widths):
            tried = min(bits, _MEASURED_BITS)
            if tried not in measured:
                quantise = quantiser(Codes(0, bits=tried, group=group))
                measured[tried] = decompose_coded(W_OI, gram_II, quantise, split, beside).error
            size = grid_bytes(shape.out_features, shape.in_features - kept, bits, group)
            error = measured[tried] / 4 ** (bits - tried)
            plans.append(LayerPlan(0, kept, error=error, codes=Codes(size, bits=bits, group=group)))
    return tuple(sorted(plans, key=lambda plan: plan.nbytes(shape)))
