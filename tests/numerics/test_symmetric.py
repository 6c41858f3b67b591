"""Integers around zero: each step lowers the error that it says it lowers."""

from itertools import pairwise

import pytest
import torch
from layers import random_layer
from torch import Tensor

from lrsd.numerics.metric import Metric
from lrsd.numerics.symmetric import SymmetricCodes, fitted_scales, round_symmetric, weighted_error


def lost(W_OI: Tensor, codes: SymmetricCodes, gram_II: Tensor) -> float:
    lost_OI = W_OI.double() - codes.dense().double()
    return float(((lost_OI @ gram_II) * lost_OI).sum())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [32, 96])
def test_alternating_lowers_the_error_by_every_round(
    generator: torch.Generator, bits: int, group: int
) -> None:
    """In float32 scales, which are stored as they are found."""
    layer = random_layer(generator, 40, 96)
    metric = Metric(layer.gram)
    found = [
        round_symmetric(
            layer.W_OI, metric.factor, layer.gram, bits, group, dtype=torch.float32, alternations=n
        )
        for n in range(5)
    ]
    errors = [lost(layer.W_OI, codes, layer.gram) for codes in found]
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors)), errors
    assert errors[-1] < 0.97 * errors[0]
    for codes in found:
        assert int(codes.codes_OI.min()) >= -(2 ** (bits - 1))
        assert int(codes.codes_OI.max()) < 2 ** (bits - 1)
        assert codes.scales_OG.shape == (40, 96 // group)


def test_weights_on_a_grid_are_found_again(generator: torch.Generator) -> None:
    codes_OI = torch.randint(-8, 8, (20, 64), generator=generator).to(torch.int8)
    codes_OI[:, ::32] = -8
    scales_OG = torch.rand(20, 2, generator=generator).add(0.5).bfloat16()
    exact = SymmetricCodes(codes_OI, scales_OG, 4, 32)
    gram_II = torch.eye(64, dtype=torch.float64)
    found = round_symmetric(exact.dense(), Metric(gram_II).factor, gram_II, 4, 32, alternations=3)
    torch.testing.assert_close(found.dense(), exact.dense(), rtol=2**-7, atol=0)


def test_scales_weigh_channels(generator: torch.Generator) -> None:
    """An outlier in a channel that hardly counts is clipped."""
    W_OI = torch.randn(50, 32, generator=generator)
    W_OI[:, 3] *= 30
    even_I, least_I = torch.ones(32), torch.ones(32)
    least_I[3] = 1e-6
    clipped_OG, whole_OG = (fitted_scales(W_OI, which_I, 3, 32).abs() for which_I in (least_I, even_I))
    assert clipped_OG.mean() < 0.8 * whole_OG.mean()
    assert weighted_error(W_OI, least_I, 3, 32) < weighted_error(W_OI, even_I, 3, 32)


def test_empty_groups_and_dead_channels_have_finite_scales(generator: torch.Generator) -> None:
    layer = random_layer(generator, 12, 64)
    W_OI, gram_II = layer.W_OI.clone(), layer.gram.clone()
    W_OI[:, :32], W_OI[5] = 0, 0
    gram_II[40], gram_II[:, 40] = 0, 0
    found = round_symmetric(W_OI, Metric(gram_II).factor, gram_II, 4, 32, alternations=2)
    assert found.scales_OG.isfinite().all()
    assert not found.dense()[5].any()
    assert lost(W_OI, found, gram_II) < 0.02 * float(((W_OI @ gram_II) * W_OI).sum())
