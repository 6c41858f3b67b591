"""Weights of output channels and of tokens: what an error of a layer does to the output of its block.

With s_ti the squared derivative of the block's output by output channel i at token t (`model.derivatives`), a
layer's error E x_t costs about sum_ti s_ti (E x_t)_i^2. Taking s_ti ~ d_i tau_t, that is tr(D E G E^T) with
D = diag(d) and G = E[tau x x^T].
"""

import torch
from torch import Tensor

from lrsd.numerics.rounding import STEPS_PER_OCTAVE

# A channel counts no less than this share of the mean: derivatives are estimated from a sample.
_LEAST = 1e-4


def token_weights(squares_TO: Tensor) -> Tensor:
    """tau (T,) float32, mean 1: the root of a token's mean square; ones where there are no derivatives.

    The mean square itself is what tokens count, but estimated from one sample, and of keys and values all but
    a few tokens in a thousand count for nothing. On SmolLM2's blocks 2, 12 and 25, fitted to some samples and
    measured on others by what tokens count there, the root did best: as well as the squares themselves for
    keys and values, and better for what other layers read.
    """
    root_T = squares_TO.mean(1).sqrt()
    level = root_T.mean()
    if not bool(level > 0) or not bool(level.isfinite()):
        return torch.ones_like(root_T)
    return root_T / level


def row_exponents(sums_O: Tensor) -> Tensor:
    """d_i^(-1/2) in eighths of an octave over the least of them, (O,) uint8: the steps that make rows of
    equal quantization error per unit of d. sums_O: of squared derivatives; all zero: equal rows."""
    level = sums_O.mean()
    if not bool(level > 0) or not bool(level.isfinite()):
        return torch.zeros(sums_O.shape, dtype=torch.uint8, device=sums_O.device)
    weights_O = (sums_O / level).clamp(min=_LEAST)
    eighths_O = (-STEPS_PER_OCTAVE / 2 * weights_O.log2()).round()
    return (eighths_O - eighths_O.min()).to(torch.uint8)


def row_scales(exponents_O: Tensor) -> Tensor:
    """2^(exponent / 8), (O,) float64."""
    return torch.exp2(exponents_O.double() / STEPS_PER_OCTAVE)
