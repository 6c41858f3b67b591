"""Metrics and weights that break naive solvers: every solver gives a finite result no worse than nothing, and
says what damping it took; what has no solution at all is a SolverError.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from lrsd.errors import SolverError
from lrsd.numerics.lowrank import ridged_cholesky, spectrum, spectrum_errors
from lrsd.numerics.metric import Metric
from lrsd.numerics.pruning import sparse_blocks, sparse_pairs
from lrsd.numerics.rounding import DAMPING, hessian_factor, round_entropy_coded, round_groupwise
from lrsd.numerics.solver import (
    Decomposition,
    columns_plus_codes,
    decompose,
    decompose_coded,
    decompose_sparse,
    propagated_target,
    relative_error,
)
from lrsd.numerics.structured import split_columns

OUT, IN = 24, 32


def orthogonal(generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(IN, IN, generator=generator, dtype=torch.float64))[0]


def gram_of(x_TI: Tensor) -> Tensor:
    return x_TI.T @ x_TI / len(x_TI)


def tokens(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, IN, generator=generator, dtype=torch.float64)


def dead(generator: torch.Generator) -> Tensor:
    x_TI = tokens(200, generator)
    x_TI[:, ::3] = 0
    return gram_of(x_TI)


def outliers(generator: torch.Generator) -> Tensor:
    x_TI = tokens(200, generator)
    x_TI[0, 5] = 1e6
    x_TI[:, 7] *= 1e4
    return gram_of(x_TI)


def conditioned(generator: torch.Generator) -> Tensor:
    Q_II = orthogonal(generator)
    return (Q_II * torch.logspace(0, -16, IN, dtype=torch.float64)) @ Q_II.T


def indefinite(generator: torch.Generator) -> Tensor:
    """As float32 sums leave it: some eigenvalues slightly negative."""
    Q_II = orthogonal(generator)
    values_I = torch.linspace(1, 0, IN, dtype=torch.float64)
    values_I[-6:] = -1e-7
    return (Q_II * values_I) @ Q_II.T


METRICS: dict[str, Callable[[torch.Generator], Tensor]] = {
    "all zero": lambda generator: torch.zeros(IN, IN, dtype=torch.float64),
    "rank 1": lambda generator: gram_of(tokens(1, generator)),
    "fewer tokens than channels": lambda generator: gram_of(tokens(5, generator)),
    "dead channels": dead,
    "huge outliers": outliers,
    "condition 1e16": conditioned,
    "indefinite": indefinite,
    "tiny": lambda generator: gram_of(tokens(200, generator)) * 1e-30,
    "vast": lambda generator: gram_of(tokens(200, generator)) * 1e30,
}


def coded(W_OI: Tensor, gram_II: Tensor, quantize: Callable[..., object], columns: int) -> Decomposition:
    split, factor = columns_plus_codes(W_OI, Metric(gram_II), columns)
    return decompose_coded(W_OI, gram_II, quantize, split, factor)


SOLVERS: dict[str, Callable[[Tensor, Tensor], Decomposition]] = {
    "low rank": lambda W, G: decompose(W, G, rank=6),
    "columns": lambda W, G: decompose(W, G, rank=4, columns=5),
    "rows": lambda W, G: decompose(W, G, rank=4, rows=5),
    "2:4": lambda W, G: decompose_sparse(W, Metric(G), sparse_pairs, rank=4, iterations=2),
    "blocks": lambda W, G: decompose_sparse(W, Metric(G), partial(sparse_blocks, blocks=3, size=4), rank=2),
    "entropy coded": lambda W, G: coded(W, G, lambda w, factor: round_entropy_coded(w, factor, 1e-3), 0),
    "group-wise": lambda W, G: coded(W, G, lambda w, factor: round_groupwise(w, factor, bits=4, group=8), 4),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("weight", ["plain", "zero rows", "all zero", "outliers"])
def test_every_solver_ends_finite_and_no_worse_than_nothing(
    solver: str, metric: str, weight: str, generator: torch.Generator
) -> None:
    W_OI = torch.randn(OUT, IN, generator=generator, dtype=torch.float64)
    if weight == "zero rows":
        W_OI[::2] = 0
    elif weight == "all zero":
        W_OI.zero_()
    elif weight == "outliers":
        W_OI[3, 4] = 1e5
    gram_II = METRICS[metric](generator)
    found = SOLVERS[solver](W_OI, gram_II)
    assert bool(torch.isfinite(found.dense()).all())
    error = relative_error(W_OI, found.dense(), gram_II)
    # A step far above all outputs rounds to nothing; float32 codes add their own rounding.
    assert 0 <= error <= 1 + 1e-5, found.status


@pytest.mark.parametrize("metric", METRICS)
def test_propagated_targets_stay_finite_and_near_the_weight(metric: str, generator: torch.Generator) -> None:
    W_OI = torch.randn(OUT, IN, generator=generator, dtype=torch.float64)
    gram_II = METRICS[metric](generator)
    # W* = 1.1 W, as far as the inputs tell.
    target_OI, damping = propagated_target(W_OI, gram_II, 0.1 * W_OI @ gram_II)
    step_OI = target_OI - W_OI
    assert float(step_OI.norm()) <= 0.1001 * float(W_OI.norm())
    expected = 0.1 * float((W_OI @ gram_II @ W_OI.T).trace())
    assert float((step_OI @ gram_II @ W_OI.T).trace()) == pytest.approx(expected, rel=0.05)
    assert damping == 0.0  # the usual one does for all of these


def test_damping_is_raised_by_its_steps_and_reported(generator: torch.Generator) -> None:
    gram_II = indefinite(generator)
    assert ridged_cholesky(gram_II, 1e-4)[1] == 0.0
    assert ridged_cholesky(gram_II, 1e-10)[1] == pytest.approx(1e-6)  # two steps of a hundred
    worse_II = gram_II - 0.02 * torch.eye(IN, dtype=torch.float64)
    assert hessian_factor(gram_II).damping == 0.0
    assert hessian_factor(worse_II).damping == pytest.approx(10 * DAMPING)
    ones_OI = torch.ones(OUT, IN, dtype=torch.float64)
    found = coded(ones_OI, worse_II, lambda w, factor: round_entropy_coded(w, factor, 1e-3), 0)
    assert found.damping == pytest.approx(10 * DAMPING)
    kept = torch.arange(IN // 2, IN)
    assert split_columns(gram_II, kept).damping == ridged_cholesky(gram_II[kept][:, kept], 1e-10)[1]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_has_no_solution_is_an_error(value: float, generator: torch.Generator) -> None:
    gram_II = gram_of(tokens(100, generator))
    gram_II[4, 4] = value
    W_OI = torch.randn(OUT, IN, generator=generator, dtype=torch.float64)
    tall_OI = torch.cat([W_OI, W_OI])
    for solve in (
        lambda: ridged_cholesky(gram_II, 1e-4),
        lambda: hessian_factor(gram_II),
        lambda: spectrum(W_OI, gram_II),
        lambda: spectrum(tall_OI, gram_II),
        lambda: spectrum_errors(W_OI, gram_II),
        lambda: spectrum_errors(tall_OI, gram_II),
        lambda: Metric(gram_II).factor,
        lambda: Metric(gram_II).single.root,
    ):
        with pytest.raises(SolverError):
            solve()
