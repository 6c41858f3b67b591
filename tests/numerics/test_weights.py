"""Weights of channels and tokens: what is minimized with them is what they say."""

import pytest
import torch
from torch import Tensor

from lrsd.methods import METHODS
from lrsd.methods.base import LayerProblem
from lrsd.numerics.metric import Metric
from lrsd.numerics.moments import CrossMoments, Moments
from lrsd.numerics.weights import row_exponents, row_scales, token_weights


def normal(generator: torch.Generator, *size: int) -> Tensor:
    return torch.randn(*size, generator=generator, dtype=torch.float64)


def test_weighted_moments_are_those_of_repeated_tokens(generator: torch.Generator) -> None:
    x_TI, t_TO = normal(generator, 20, 7), normal(generator, 20, 3)
    times = torch.randint(0, 4, (20,), generator=generator)
    weighted, repeated = Moments(7), Moments(7)
    cross_weighted, cross_repeated = CrossMoments(3, 7), CrossMoments(3, 7)
    weighted.update_(x_TI, times.float())
    repeated.update_(x_TI.repeat_interleave(times, 0))
    cross_weighted.update_(t_TO, x_TI, times.float())
    cross_repeated.update_(t_TO.repeat_interleave(times, 0), x_TI.repeat_interleave(times, 0))
    for found, expected in (
        (weighted.gram, repeated.gram), (cross_weighted.mean, cross_repeated.mean),
        # What a bias restores is the mean over all tokens alike.
        (weighted.mean, x_TI.mean(0)), (cross_weighted.target_mean, t_TO.mean(0)),
    ):  # fmt: skip
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert weighted.count == 20
    again = Moments.from_state((weighted + weighted).state())
    torch.testing.assert_close(again.gram, weighted.gram, rtol=1e-6, atol=1e-6)


def test_a_token_counts_by_the_root_of_its_mean_square(generator: torch.Generator) -> None:
    squares_TO = normal(generator, 500, 6).square().float()
    squares_TO[3] *= 100
    found_T = token_weights(squares_TO)
    assert float(found_T.mean()) == pytest.approx(1)
    expected_T = squares_TO.mean(1)
    torch.testing.assert_close(found_T**2 / found_T[0] ** 2, expected_T / expected_T[0])
    even_T = token_weights(torch.ones(500, 6))
    torch.testing.assert_close(even_T, torch.ones(500))


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_without_derivatives_all_count_alike(value: float) -> None:
    assert torch.equal(token_weights(torch.full((5, 3), value)), torch.ones(5))
    assert torch.equal(row_exponents(torch.full((5,), value)), torch.zeros(5, dtype=torch.uint8))


def test_scales_are_inverse_roots_in_eighths_of_an_octave(generator: torch.Generator) -> None:
    sums_O = normal(generator, 300).square() * 1e-9
    exponents_O = row_exponents(sums_O)
    assert int(exponents_O.min()) == 0
    kept_O = sums_O > 1e-4 * sums_O.mean()
    scaled_O = (row_scales(exponents_O) * sums_O.sqrt())[kept_O]
    assert float(scaled_O.log2().max() - scaled_O.log2().min()) <= 1 / 8 + 1e-9
    # The floor: a channel of no derivative counts a ten-thousandth of the mean.
    lowest = row_scales(row_exponents(torch.tensor([0.0, *[1.0] * 9999])))
    assert float(lowest[0] / lowest[1]) == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize(
    "options",
    [{"bits": "16", "structure": s} for s in ("none", "column", "row", "unstructured")] + [{}],
    ids=str,
)
def test_a_solution_minimizes_the_weighted_error(options: dict[str, str], generator: torch.Generator) -> None:
    """Heavy rows err less and light ones more than where all count alike, and the sum is less."""
    W_OI, x_TI = normal(generator, 48, 40), normal(generator, 400, 40)
    sums_O = torch.exp(2 * normal(generator, 48))
    rows_O = row_exponents(sums_O)
    weights_O = row_scales(rows_O) ** -2
    metric = Metric(x_TI.T @ x_TI / 400)
    method = METHODS["lrsd"](**options)
    lost: dict[bool, float] = {}
    for weighted in (True, False):
        problem = LayerProblem(W_OI, metric, torch.float32, 48 * 40 * 2 / 2.5)
        problem = problem.weighted(rows_O if weighted else None)
        menu = method.offer(problem)
        choice = menu.choice(menu.within(problem.share) or 0)
        solution = method.solve(problem, choice)
        difference_OI = W_OI - solution.W_OI.double()
        errors_O = ((difference_OI @ metric.gram) * difference_OI).sum(1)
        energies_O = ((W_OI @ metric.gram) * W_OI).sum(1)
        lost[weighted] = float(weights_O @ errors_O) / float(weights_O @ energies_O)
        if weighted:
            assert solution.error == pytest.approx(lost[True], rel=0.01)
            assert solution.error < 1.1 * choice.error  # as offered
            probe = method.probe(problem, menu)
            difference_OI = W_OI - probe.W_OI.double()
            errors_O = ((difference_OI @ metric.gram) * difference_OI).sum(1)
            assert probe.error == pytest.approx(
                float(weights_O @ errors_O) / float(weights_O @ energies_O), rel=0.01
            )
    assert lost[True] < 0.95 * lost[False]
