"""Paths through the trellis: valid, cheapest, and worth what is said of them."""

import itertools
import math

import numpy as np
import pytest
import torch
from layers import KINDS, random_layer
from numpy.typing import NDArray

from lrsd.numerics.rounding import column_steps, gaussian_table, hessian_factor, round_entropy_coded
from lrsd.numerics.trellis import code, grids, measured, quantized

NO_BITS = np.zeros((2, 256), np.float32)


def next_state(state: int, k: int) -> int:
    return 2 * state % 64 + (k % 2 ^ state % 2 ^ state // 32)


def grid_of(state: int) -> int:
    return (state // 2 + state // 8) % 2


def value(state: int, k: int) -> int:
    return 2 * k - ((k > 0) - (k < 0)) * grid_of(state)


def normal(count: int, seed: int, deviation: float = 1.0) -> NDArray[np.float32]:
    return (deviation * np.random.default_rng(seed).standard_normal(count)).astype(np.float32)


@pytest.mark.parametrize("deviation", [0.3, 1, 4, 300])
def test_every_column_is_a_path(deviation: float) -> None:
    values = np.stack([quantized(normal(97, seed, deviation), NO_BITS, 64) for seed in range(5)])
    grids_IO, k_IO = grids(values, *code(64))
    for column, grid_O, k_O in zip(values, grids_IO, k_IO, strict=True):
        state = 0
        for v, grid, k in zip(column.tolist(), grid_O.tolist(), k_O.tolist(), strict=True):
            assert (grid, v) == (grid_of(state), value(state, k))
            state = next_state(state, k)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_no_other_path_is_cheaper(seed: int, rate: float) -> None:
    """Of all of five weights with codes from -3 to 3."""
    w = normal(5, seed, 1.7)
    bits_CK = NO_BITS + rate * np.abs(np.random.default_rng(9).standard_normal((2, 256))).cumsum(1)
    bits_CK = bits_CK.astype(np.float32)

    def cost(codes: tuple[int, ...]) -> float:
        state, total = 0, 0.0
        for u, k in zip(w.tolist(), codes, strict=True):
            total += (u - value(state, k)) ** 2 + float(bits_CK[grid_of(state), abs(k)])
            state = next_state(state, k)
        return total

    least = min(map(cost, itertools.product(range(-3, 4), repeat=5)))
    k_O = grids(quantized(w, bits_CK, 64)[None], *code(64))[1][0]
    assert cost(tuple(k_O.tolist())) == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize(
    ("states", "bits", "gap"),
    [
        (8, 2, 0.109), (8, 3, 0.093), (8, 4, 0.083), (32, 2, 0.079), (32, 3, 0.068), (32, 4, 0.06),
        (64, 2, 0.07), (64, 3, 0.06), (64, 4, 0.05),
    ],
)  # fmt: skip
def test_a_gaussian_source_is_as_near_its_bound_as_is_known(states: int, bits: float, gap: float) -> None:
    assert measured(states).above_bound(bits) == pytest.approx(gap, abs=0.012)


@pytest.mark.parametrize("deviation", [1.1, 2, 7])
def test_the_table_holds_for_other_samples(deviation: float) -> None:
    x = torch.tensor(deviation)
    table = gaussian_table(states=64)
    W_OI = torch.from_numpy(normal(20_000 * 4, 1, deviation)).view(20_000, 4)
    codes = round_entropy_coded(W_OI, hessian_factor(torch.eye(4), 1e-9), 1.0, 64)
    error = float((codes.dense() - W_OI).square().mean())
    deviations = W_OI.std() / float(column_steps(codes.offsets_I, codes.exponent)[0])
    assert float(deviations) == pytest.approx(deviation / float(table.shrink(x)), rel=0.05)
    assert error == pytest.approx(float(table.error(x)), rel=0.08)
    k_IO = grids(codes.codes_OI.T.contiguous().numpy(), *code(64))[1]
    assert np.abs(k_IO).mean() > 0.2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("states", [1, 64])
def test_what_a_column_loses_moves_those_after_it(generator: torch.Generator, kind: str, states: int) -> None:
    """W - Q = E U with U the factor: what was rounded in column j is w_j - sum_{i<j} E_i U_ij, and on a plain
    grid its code is the nearest."""
    layer = random_layer(generator, 40, 90, kind)
    factor = hessian_factor(layer.gram)
    whitened_I = layer.W_OI.float().std(0)[factor.order_I] / factor.upper_II.diagonal()
    step = float(whitened_I.clamp(min=1e-9).log().mean().exp()) / 4
    codes = round_entropy_coded(layer.W_OI, factor, step, states)
    lost_OI = (layer.W_OI - codes.dense().double())[:, factor.order_I]
    upper_II = factor.upper_II.double()
    errors_OI = torch.linalg.solve_triangular(upper_II, lost_OI, upper=True, left=False)
    values_OI = codes.dense().double()[:, factor.order_I]
    rounded_OI = values_OI + errors_OI * upper_II.diagonal()
    steps_I = column_steps(codes.offsets_I, codes.exponent).double()[factor.order_I]
    distances_OI = (rounded_OI - values_OI).abs() / steps_I
    # A step is stored shrunk, by a third at most where next to all codes are zero.
    limit = 0.5 * 1.6 if states == 1 else 4.0
    coded = values_OI.abs().amax(0) > 0
    assert coded.any()
    assert float(distances_OI[:, coded].mean()) < limit / 2
    if states == 1:
        most_OI = 0.5 * 1.6 + 0.6 * codes.codes_OI[:, factor.order_I].abs()
        assert (distances_OI <= most_OI)[:, coded].all()


@pytest.mark.parametrize("shape", [(1, 9), (30, 1), (1, 1), (7, 5)])
def test_nothing_is_made_of_nothing(shape: tuple[int, int]) -> None:
    factor = hessian_factor(torch.eye(shape[1]).double())
    zero = round_entropy_coded(torch.zeros(shape), factor, 0.1, 64)
    assert not zero.codes_OI.any()
    W_OI = torch.from_numpy(normal(math.prod(shape), 3)).view(shape)
    found = round_entropy_coded(W_OI, factor, 1e-3, 64)
    assert float((found.dense() - W_OI).abs().max()) < 5e-3


def test_one_massive_channel_damps_no_other_where_each_has_its_own_ridge(generator: torch.Generator) -> None:
    """At about equal entropy: the same steps relative to what each factor holds a column to be worth."""
    layer = random_layer(generator, 200, 48)
    layer.x_TI[:, 7] *= 1000
    lost = {}
    for by_channel in (False, True):
        factor = hessian_factor(layer.gram, by_channel=by_channel)
        whitened_I = layer.W_OI.float().std(0)[factor.order_I] / factor.upper_II.diagonal()
        step = float(whitened_I.log().mean().exp()) / 4
        codes = round_entropy_coded(layer.W_OI, factor, step, 1)
        others = [j for j in range(48) if j != 7]
        E_OI = (layer.W_OI - codes.dense().double())[:, others]
        lost[by_channel] = float(((E_OI @ layer.gram[others][:, others]) * E_OI).sum())
    assert lost[True] < 0.7 * lost[False]
