"""Integers in blocks: what is stored is what is computed, and every number of it is set well."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from layers import random_layer

from lrsd.forms.ggml import BLOCK_TYPES
from lrsd.forms.symmetric import Symmetric
from lrsd.numerics.blocks import (
    BlockCodes,
    Grid,
    nearest_error,
    remaining_variances,
    round_to_blocks,
    rounded_to_nearest,
)
from lrsd.numerics.metric import Metric

GRIDS = {name: kind.grid for name, kind in BLOCK_TYPES.items()}
GRIDS |= {f"{bits} bit": Symmetric(bits, 64).grid for bits in (2, 4, 8)}
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())


def energy(error_OI: torch.Tensor, gram_II: torch.Tensor) -> float:
    return float((error_OI.double() @ gram_II * error_OI).sum())


def assert_storable(found: BlockCodes) -> None:
    """Every number within the range that the grid has for it, and the values those of the formula."""
    grid = found.grid
    assert int(found.codes_OI.max()) < len(grid.levels)
    for values, bounds in ((found.scales_OG, grid.scales), (found.offsets_OG, grid.offsets or (0, 0))):
        assert bounds[0] <= int(values.min()) <= int(values.max()) <= bounds[1]
    i, j = found.codes_OI.shape[0] - 1, found.codes_OI.shape[1] - 1
    g, b = j // grid.group, j // grid.block
    expected = (
        float(found.steps_OB[i, b]) * int(found.scales_OG[i, g]) * grid.levels[int(found.codes_OI[i, j])]
    )
    expected -= float(found.offset_steps_OB[i, b]) * int(found.offsets_OG[i, g])
    assert float(found.dense()[i, j]) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert found.dense().isfinite().all()


@every_grid
def test_feedback_and_descent_lower_the_error_step_by_step(generator: torch.Generator, grid: Grid) -> None:
    layer = random_layer(generator, 24, 256, "plain")
    metric = Metric(layer.gram, damps_by_channel=True)
    damped_II = layer.gram + (0.01 * layer.gram.diagonal()).diag()
    nearest = rounded_to_nearest(layer.W_OI, torch.ones(256), grid)
    assert_storable(nearest)
    errors = [energy(layer.W_OI - nearest.dense(), damped_II)]
    for sweeps in range(4):
        found = round_to_blocks(layer.W_OI, metric.factor, damped_II, grid, sweeps=sweeps)
        assert_storable(found)
        errors.append(energy(layer.W_OI - found.dense(), damped_II))
    assert errors[1] < errors[0]
    assert all(after <= before * 1.0001 for before, after in pairwise(errors[1:])), errors
    assert errors[-1] < 0.97 * errors[1]


@every_grid
def test_a_layer_that_lies_on_the_grid_comes_back(generator: torch.Generator, grid: Grid) -> None:
    """Codes and scales drawn at random, the ends of every range among them: nothing is lost but rounding."""
    codes_OI = torch.randint(len(grid.levels), (6, 256), generator=generator)
    codes_OI[:, :: grid.group], codes_OI[:, 1 :: grid.group] = 0, len(grid.levels) - 1
    ones = torch.full((6, 256 // grid.group), grid.scales[1], dtype=torch.int16)
    low = grid.offsets[1] if grid.offsets else 0
    steps_OB = torch.full((6, 256 // grid.block), 2.0**-9, dtype=torch.float16)
    exact = BlockCodes(grid, codes_OI.to(torch.uint8), ones, torch.full_like(ones, low), steps_OB, steps_OB)
    found = rounded_to_nearest(exact.dense(), torch.ones(256), grid).dense()
    scale = float(exact.dense().abs().max())
    assert float((found - exact.dense()).abs().max()) < 0.005 * scale


@every_grid
def test_nothing_and_a_single_row_and_tiny_weights(grid: Grid, generator: torch.Generator) -> None:
    layer = random_layer(generator, 1, 256, "plain")
    metric = Metric(layer.gram, damps_by_channel=True)
    for W_OI in (torch.zeros(3, 256), layer.W_OI, 1e-9 * layer.W_OI, torch.ones(2, 256)):
        found = round_to_blocks(W_OI, metric.factor, layer.gram, grid, sweeps=2)
        assert_storable(found)
        assert energy(W_OI - found.dense(), layer.gram) <= energy(W_OI.double(), layer.gram) * 1.01 + 1e-12


@every_grid
def test_the_prediction_is_near_what_feedback_leaves(generator: torch.Generator, grid: Grid) -> None:
    layer = random_layer(generator, 64, 256, "plain")
    metric = Metric(layer.gram, damps_by_channel=True)
    predicted = nearest_error(layer.W_OI.float(), remaining_variances(metric.factor), grid)
    found = round_to_blocks(layer.W_OI, metric.factor, layer.gram, grid, sweeps=0)
    assert predicted == pytest.approx(energy(layer.W_OI - found.dense(), layer.gram), rel=0.5)


def test_scales_weigh_channels(generator: torch.Generator) -> None:
    """An outlier in a channel that hardly counts is clipped."""
    W_OI, grid = torch.randn(50, 32, generator=generator), Symmetric(3, 32).grid
    W_OI[:, 3] *= 30
    even_I, least_I = torch.ones(32), torch.ones(32)
    least_I[3] = 1e-6
    clipped, whole = (rounded_to_nearest(W_OI, which_I, grid).steps_OB.abs() for which_I in (least_I, even_I))
    assert clipped.mean() < 0.8 * whole.mean()
    assert nearest_error(W_OI, least_I, grid) < nearest_error(W_OI, even_I, grid)


def test_empty_groups_and_dead_channels_have_finite_scales(generator: torch.Generator) -> None:
    layer = random_layer(generator, 12, 64)
    W_OI, gram_II = layer.W_OI.clone(), layer.gram.clone()
    W_OI[:, :32], W_OI[5] = 0, 0
    gram_II[40], gram_II[:, 40] = 0, 0
    found = round_to_blocks(W_OI, Metric(gram_II).factor, gram_II, Symmetric(4, 32).grid, sweeps=2)
    assert found.steps_OB.isfinite().all()
    assert not found.dense()[5].any()
    assert energy(W_OI - found.dense(), gram_II) < 0.02 * energy(W_OI, gram_II)


@every_grid
def test_a_blocks_own_step_is_the_best_of_its_type(generator: torch.Generator, grid: Grid) -> None:
    """Of the last block's step, or offsets' step, which was set last of all: neither neighbor errs less."""
    layer = random_layer(generator, 8, 256)
    metric = Metric(layer.gram, damps_by_channel=True)
    found = round_to_blocks(layer.W_OI, metric.factor, layer.gram, grid, sweeps=2)
    least = energy(layer.W_OI - found.dense(), layer.gram)
    name = "offset_steps_OB" if grid.offsets else "steps_OB"
    for towards in (-torch.inf, torch.inf):
        steps_OB = getattr(found, name).clone()
        steps_OB[:, -1] = torch.nextafter(steps_OB[:, -1], torch.full_like(steps_OB[:, -1], towards))
        moved = replace(found, **{name: steps_OB})
        assert energy(layer.W_OI - moved.dense(), layer.gram) >= least * (1 - 1e-5)
