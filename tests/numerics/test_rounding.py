"""Rounding: error feedback pays, codes are as cheap as theory says, degenerate layers are harmless."""

import math
from functools import partial

import pytest
import torch
from layers import DEGENERATE, KINDS, RandomLayer, random_layer
from torch import Tensor

from lrsd.forms.base import Shape
from lrsd.forms.groupwise import Groupwise
from lrsd.forms.trellis import Trellis
from lrsd.methods.coded import quantizer
from lrsd.numerics.lowrank import spectrum
from lrsd.numerics.menu import Choice
from lrsd.numerics.metric import Metric
from lrsd.numerics.moments import energy
from lrsd.numerics.rates import entropy_coded_rates
from lrsd.numerics.rounding import (
    EntropyCodes,
    GroupCodes,
    column_steps,
    gaussian_table,
    hessian_factor,
    round_columns,
    round_entropy_coded,
    round_groupwise,
)
from lrsd.numerics.solver import columns_plus_codes, decompose_coded, relative_error

every_kind = pytest.mark.parametrize("kind", [*KINDS, *DEGENERATE])


def typical_step(layer: RandomLayer, deviations: float) -> float:
    """A step at which the middle column's weights have this deviation in steps."""
    factor = hessian_factor(layer.gram)
    whitened_I = layer.W_OI.float().std(0)[factor.order_I] / factor.upper_II.diagonal()
    return float(whitened_I.clamp(min=1e-9).log().mean().exp()) / deviations


@every_kind
@pytest.mark.parametrize("states", [1, 64])
@pytest.mark.parametrize("deviations", [0.3, 2, 30])
def test_rounding_any_layer_gives_finite_weights_of_bounded_error(
    generator: torch.Generator, kind: str, deviations: float, states: int
) -> None:
    layer = random_layer(generator, 40, 24, kind)
    factor = hessian_factor(layer.gram)
    entropy_coded = round_entropy_coded(layer.W_OI, factor, typical_step(layer, deviations), states)
    for codes in (entropy_coded, round_groupwise(layer.W_OI, factor, 3, 7)):
        assert codes.dense().isfinite().all()
        assert layer.error(codes.dense().double()) <= 1.1


@pytest.mark.parametrize("kind", KINDS)
def test_error_feedback_beats_rounding_each_weight_alone(generator: torch.Generator, kind: str) -> None:
    layer = random_layer(generator, 64, 48, kind)
    codes = round_groupwise(layer.W_OI, hessian_factor(layer.gram), 3, 16)
    fed_back = layer.error(codes.dense().double())
    alone = layer.error(
        round_groupwise(layer.W_OI, hessian_factor(torch.eye(48).double()), 3, 16).dense().double()
    )
    assert fed_back < 0.8 * alone


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "deviations", [3, pytest.param(0.7, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.slow)]
)
def test_water_filled_steps_beat_one_step_for_all_columns_at_equal_entropy(
    generator: torch.Generator, kind: str, deviations: float
) -> None:
    layer = random_layer(generator, 96, 48, kind)
    factor = hessian_factor(layer.gram)
    filled = round_entropy_coded(layer.W_OI, factor, typical_step(layer, deviations), 1)
    error, size = layer.error(filled.dense().double()), entropy(filled.codes_OI)

    def flat(step: float) -> tuple[Tensor, Tensor]:
        def quantize(j: int, w_O: Tensor) -> tuple[Tensor, Tensor]:
            code_O = (w_O / step).round()
            return code_O.int(), code_O * step

        return round_columns(layer.W_OI, factor, quantize)

    low, high = 1e-9, 1e3
    for _ in range(60):  # the step at which the flat rounding has the same entropy
        middle = math.sqrt(low * high)
        low, high = (middle, high) if entropy(flat(middle)[0]) > size else (low, middle)
    assert error < layer.error(flat(high)[1].double())


def entropy(codes_OI: Tensor) -> float:
    """Bits of all codes, each column by its own frequencies."""
    total = 0.0
    for column in codes_OI.T:
        shares = column.unique(return_counts=True)[1].double() / column.numel()
        total -= float((shares * shares.log2()).sum()) * column.numel()
    return total


@pytest.mark.parametrize("deviation", [0.1, 0.4, 1, 2.5, 16, 100])
def test_the_table_of_a_rounded_normal_variable_is_what_sampling_gives(
    generator: torch.Generator, deviation: float
) -> None:
    w = torch.randn(2_000_000, generator=generator, dtype=torch.float64) * deviation
    codes, table = w.round(), gaussian_table()
    shares = codes.unique(return_counts=True)[1].double() / w.numel()
    x = torch.tensor(deviation)
    nearest = 2 ** (round(16 * math.log2(deviation)) / 16)  # the table has 16 entries per octave
    slack = abs(nearest / deviation - 1)
    assert float(table.entropy(x)) == pytest.approx(
        float(-(shares * shares.log2()).sum()), abs=0.01 + 2 * slack, rel=0.01
    )
    shrink = float((codes @ w) / (codes @ codes)) if bool(codes.any()) else 1.0
    if deviation > 0.3:
        assert float(table.shrink(x)) == pytest.approx(shrink, rel=0.01 + 2 * slack)
    error = float(((w - shrink * codes) ** 2).mean())
    assert float(table.error(x)) == pytest.approx(error, rel=0.02 + 3 * slack)


# A trellis leaves nothing of a column whose deviation is half a step.
@pytest.mark.parametrize(
    ("deviations", "states"), [(0.5, 1), (1, 1), (4, 1), (30, 1), (1, 64), (1.5, 64), (4, 64), (30, 64)]
)
def test_what_entropy_coded_weights_are_said_to_cost_and_lose_is_what_they_do(
    generator: torch.Generator, deviations: float, states: int
) -> None:
    """Normal weights, as the prediction takes them; 3 % of the bytes and 8 % of the error."""
    layer = random_layer(generator, 512, 128)
    W_OI = torch.randn(512, 128, generator=generator, dtype=torch.float64)
    # Well conditioned, so that the damping inside the feedback is no part of the error.
    gram_II = layer.gram + layer.gram.diagonal().mean() * torch.eye(128, dtype=torch.float64)
    metric, total = Metric(gram_II), energy(W_OI, gram_II)
    factor = metric.factor
    step = float((W_OI.std() / factor.upper_II.diagonal()).log().mean().exp()) / deviations
    rates = entropy_coded_rates(W_OI, metric, None, total, [0], states)
    nearest = int((rates.steps_N / step).log().abs().argmin())
    codes = round_entropy_coded(W_OI, factor, float(rates.steps_N[nearest]), states)
    assert int(rates.streams_N[nearest]) + 128 == pytest.approx(stored_bytes(codes), rel=0.03, abs=100)
    lost = relative_error(W_OI, codes.dense().double(), gram_II)
    assert float(rates.errors_N[nearest]) == pytest.approx(lost, rel=0.08)


def stored_bytes(codes: EntropyCodes) -> int:
    """Of the codes, and a step of one byte per column."""
    return sum(tensor.nbytes for tensor in Trellis.of(codes)[1].values())


def test_codes_on_top_of_low_rank_are_said_to_cost_what_they_do(generator: torch.Generator) -> None:
    layer = random_layer(generator, 512, 128)
    noise, left, right = (
        torch.randn(*s, generator=generator).double() for s in ((512, 128), (512, 6), (6, 128))
    )
    W_OI = noise + left @ right
    gram_II = layer.gram + layer.gram.diagonal().mean() * torch.eye(128, dtype=torch.float64)
    metric, total = Metric(gram_II), energy(W_OI, gram_II)
    rates = entropy_coded_rates(W_OI, metric, spectrum(W_OI, gram_II), total, [0, 6], 8)
    sizes_N = rates.streams_N + 128
    distant_N = (sizes_N - 3 * W_OI.numel() / 8).abs() + torch.where(rates.ranks_N == 6, 0.0, math.inf)
    chosen = int(distant_N.argmin())
    step = float(rates.steps_N[chosen])
    rounding = partial(round_entropy_coded, step=step)
    found = decompose_coded(
        W_OI, gram_II, rounding, *columns_plus_codes(W_OI, metric, 0), rank=6, iterations=2
    )
    assert isinstance(found.codes, EntropyCodes)
    assert int(sizes_N[chosen]) == pytest.approx(stored_bytes(found.codes), rel=0.04)
    assert float(rates.errors_N[chosen]) == pytest.approx(found.error, rel=0.15)
    other_N = (rates.steps_N - step).abs() + torch.where(rates.ranks_N == 0, 0.0, math.inf)
    assert int(sizes_N[chosen]) < 0.8 * int(sizes_N[int(other_N.argmin())])


@pytest.mark.parametrize("states", [1, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_a_ladder_of_steps_falls_in_bytes_and_rises_in_error(
    generator: torch.Generator, kind: str, states: int
) -> None:
    """For every rank; and at equal steps a rank takes bytes off the codes."""
    layer = random_layer(generator, 96, 48, kind)
    metric, total = Metric(layer.gram), energy(layer.W_OI, layer.gram)
    rates = entropy_coded_rates(
        layer.W_OI, metric, spectrum(layer.W_OI, layer.gram), total, [0, 4, 16], states
    )
    for rank in (0, 4, 16):
        order = rates.steps_N[rates.ranks_N == rank].argsort()
        streams, errors = rates.streams_N[rates.ranks_N == rank], rates.errors_N[rates.ranks_N == rank]
        assert len(order) > 100
        assert (streams[order].diff() <= 0).all()
        # The table of errors has 16 entries per octave of the deviation.
        assert (errors[order].log().diff() >= -0.05).all()
        assert errors[order[-1]] / errors[order[0]] > 1e4


@pytest.mark.parametrize("states", [1, 64])
def test_finer_steps_and_more_bits_err_less(generator: torch.Generator, states: int) -> None:
    layer = random_layer(generator, 64, 48)
    factor = hessian_factor(layer.gram)
    steps = [typical_step(layer, 2.0**i) for i in range(-2, 6)]
    entropy_coded = [
        layer.error(round_entropy_coded(layer.W_OI, factor, s, states).dense().double()) for s in steps
    ]
    groupwise = [
        layer.error(round_groupwise(layer.W_OI, factor, bits, 16, torch.float32).dense().double())
        for bits in (2, 3, 4, 5, 6, 8)
    ]
    assert entropy_coded == sorted(entropy_coded, reverse=True)
    assert groupwise == sorted(groupwise, reverse=True)
    assert entropy_coded[-1] < 1e-3
    assert groupwise[-1] < 1e-3


def test_steps_are_exact_powers() -> None:
    offsets = torch.arange(256, dtype=torch.uint8)
    for exponent in (-800, -131, 0, 77):
        expected = [2.0 ** ((exponent + i) / 8) for i in range(256)]
        found = column_steps(offsets, exponent)
        torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=1e-7, atol=0)
        whole = found[(-exponent) % 8 :: 8].double().log2()
        assert torch.equal(whole, whole.round())


def test_an_input_that_dwarfs_all_others_gets_finer_codes_not_a_lost_layer(
    generator: torch.Generator,
) -> None:
    layer = random_layer(generator, 64, 48)
    layer.x_TI[:, 5] *= 1e4
    codes = round_entropy_coded(layer.W_OI, hessian_factor(layer.gram), typical_step(layer, 3))
    assert codes.offsets_I[5] == codes.offsets_I.min()
    assert layer.error(codes.dense().double()) < 1e-3


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("columns", [0, 4])
def test_low_rank_and_kept_columns_on_top_of_codes_only_help(
    generator: torch.Generator, rank: int, columns: int
) -> None:
    layer = random_layer(generator, 48, 40, "heavy")
    rounding = partial(round_groupwise, bits=2, group=8)
    plain = decompose_coded(
        layer.W_OI, layer.gram, rounding, *columns_plus_codes(layer.W_OI, Metric(layer.gram), 0)
    )
    beside = columns_plus_codes(layer.W_OI, Metric(layer.gram), columns)
    found = decompose_coded(layer.W_OI, layer.gram, rounding, *beside, rank=rank, iterations=4)
    assert found.error == pytest.approx(layer.error(found.dense()), rel=1e-6)
    assert found.error == min(found.history)
    assert len(found.history) == (4 if rank else 1)
    assert found.error <= plain.error * (0.8 if rank or columns else 1)
    # The kept columns make up for all that they can: the error is orthogonal to their inputs.
    left_OK = (layer.W_OI - found.dense()) @ layer.gram[:, found.columns_K]
    assert float(left_OK.abs().max() if columns else 0) <= 1e-6 * float((layer.W_OI @ layer.gram).abs().max())


def test_the_low_rank_part_is_the_optimum_for_the_codes_below_it(
    generator: torch.Generator,
) -> None:
    """No step of alternating least squares on U or V improves it."""
    layer = random_layer(generator, 32, 24)
    beside = columns_plus_codes(layer.W_OI, Metric(layer.gram), 0)
    found = decompose_coded(
        layer.W_OI, layer.gram, partial(round_groupwise, bits=2, group=8), *beside, rank=4, iterations=3
    )
    rest_OI = layer.W_OI - found.codes.dense().double()
    V = found.V_RC
    U = (rest_OI @ layer.gram @ V.T) @ torch.linalg.pinv(V @ layer.gram @ V.T)
    refitted = layer.error(found.codes.dense().double() + U @ V)
    assert refitted >= found.error * (1 - 1e-9)


def test_a_choice_names_its_rounding(generator: torch.Generator) -> None:
    layer = random_layer(generator, 16, 12)
    factor = hessian_factor(layer.gram)
    step = float(entropy_coded_rates(layer.W_OI, Metric(layer.gram), None, 1.0, [0], 8).steps_N[-1])
    coded = quantizer(Choice(0, parameters={"rank": 0, "step": step, "states": 64}))(layer.W_OI, factor)
    assert isinstance(coded, EntropyCodes)
    assert torch.equal(coded.codes_OI, round_entropy_coded(layer.W_OI, factor, step).codes_OI)
    fixed = quantizer(Choice(0, parameters={"bits": 3, "group": 5}))(layer.W_OI, factor)
    assert isinstance(fixed, GroupCodes)
    assert int(fixed.codes_OI.max()) <= 7
    stored = fixed.scales_OG.numel() * 2 + -(-fixed.zeros_OG.numel() * 3 // 8) + -(-16 * 12 * 3 // 8)
    assert Groupwise(3, 5).nbytes(Shape(16, 12)) == stored
