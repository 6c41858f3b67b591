"""Kept columns and rows: which to keep, and the exact low-rank part on top of them.

A kept input column j adds a free column to S, at O numbers; a kept output row i adds a free row
to S, at I numbers. ("Column" in the prose of the source paper means an output channel, a row here.)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lrsd.numerics.lowrank import Spectrum, complement, ridged_cholesky, spectrum

# Ridge on the kept columns' own block, relative to its mean diagonal: it makes duplicate or dead
# columns solvable and shifts the error by the same relative amount, far below a 16-bit rounding.
_RIDGE = 1e-10
# Rounds of re-scoring at most; the design's figure, each costs one spectrum.
_ROUNDS = 3


def column_energies(residual_OI: Tensor, gram_II: Tensor) -> Tensor:
    """Output energy of each column alone, ||R e_j||^2 G_jj, (I,): Wanda's score summed over a column.

    The error removed by freeing column j alone, ||R G e_j||^2 / G_jj, looks better founded but counts
    again what other columns and L can also explain; on the layers of SmolLM2-135M the sets it chose
    lost to the best of 50 random ones on 10 of 21; `tests/test_real.py` holds this score to 95 %.
    """
    return (residual_OI**2).sum(0) * gram_II.diagonal().clamp(min=0)


def row_gains(residual_OI: Tensor, gram_II: Tensor) -> Tensor:
    """Error of each output row: (R G R^T)_ii, (O,). A kept row has none."""
    return ((residual_OI @ gram_II) * residual_OI).sum(1).clamp(min=0)


@dataclass(frozen=True)
class ColumnSplit:
    """The geometry of a kept column set J and the free columns c.

    schur: G_cc - G_cJ G_JJ^-1 G_Jc, the metric in which L on c is fitted once S is free on J.
    regression_KC: G_JJ^-1 G_Jc, which hands L's remaining error to the kept columns. damping: the ridge on
    G_JJ if it had to be raised, else 0.
    """

    columns_K: Tensor
    free_C: Tensor
    schur_CC: Tensor
    regression_KC: Tensor
    damping: float = 0.0


def split_columns(gram_II: Tensor, columns_K: Tensor) -> ColumnSplit:
    """Eliminate the kept columns from the metric."""
    free_C = complement(columns_K, gram_II.shape[0])
    gram_CC = gram_II[free_C][:, free_C]
    if columns_K.numel() == 0:
        return ColumnSplit(columns_K, free_C, gram_CC, gram_II[columns_K][:, free_C])
    gram_KC = gram_II[columns_K][:, free_C]
    factor, damping = ridged_cholesky(gram_II[columns_K][:, columns_K], _RIDGE)
    half_KC = torch.linalg.solve_triangular(factor, gram_KC, upper=False)
    regression_KC = torch.linalg.solve_triangular(factor.T, half_KC, upper=True)
    return ColumnSplit(columns_K, free_C, gram_CC - half_KC.T @ half_KC, regression_KC, damping)


def columns_spectrum(W_OI: Tensor, split: ColumnSplit) -> Spectrum:
    """Spectrum of the low-rank part on top of freely kept columns: one curve for every rank."""
    return spectrum(W_OI[:, split.free_C], split.schur_CC)


def fit_with_columns(
    W_OI: Tensor, split: ColumnSplit, rank: int, basis_OR: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Exact optimum of min tr((W - L - S) G (W - L - S)^T), rank L <= r, S free on J and 0 elsewhere.

    L_c is the best rank-r fit to W_c in the Schur metric, S_J = W_J + (W_c - L_c) G_cJ G_JJ^-1,
    and L_J = 0 without loss of generality.

    Args: basis_OR: the leading directions of `columns_spectrum`, where they are known.
    Returns: U (O, r), V (r, C) over the free columns, S_J (O, K).
    """
    W_OC = W_OI[:, split.free_C]
    U_OR = spectrum(W_OC, split.schur_CC).basis_OR[:, :rank] if basis_OR is None else basis_OR
    V_RC = U_OR.T @ W_OC
    S_OK = W_OI[:, split.columns_K] + (W_OC - U_OR @ V_RC) @ split.regression_KC.T
    return U_OR, V_RC, S_OK


@dataclass(frozen=True)
class Selection:
    """Kept columns or rows, ascending int64; leading output directions of what is free."""

    kept: Tensor
    basis_OR: Tensor


def select_columns(
    W_OI: Tensor, gram_II: Tensor, rank: int, count: int, start: Tensor | None = None, alternate: bool = True
) -> Selection:
    """Choose `count` input columns to keep on top of a rank-`rank` part.

    start: a set to begin from, where one is known; alternate: whether to improve on it.
    """

    def refit(columns_K: Tensor) -> tuple[float, Tensor, Tensor]:
        split = split_columns(gram_II, columns_K)
        free_spectrum = columns_spectrum(W_OI, split)
        U_OR = free_spectrum.basis_OR[:, :rank]
        residual_OI = W_OI.clone()
        residual_OI[:, split.free_C] -= U_OR @ (U_OR.T @ W_OI[:, split.free_C])
        return _error_at(free_spectrum, rank), residual_OI, U_OR

    return _alternate(W_OI, gram_II, rank, count, start, _ROUNDS if alternate else 1, column_energies, refit)


def select_rows(
    W_OI: Tensor, gram_II: Tensor, rank: int, count: int, start: Tensor | None = None, alternate: bool = True
) -> Selection:
    """Choose `count` output rows to keep on top of a rank-`rank` part.

    start: a set to begin from, where one is known; alternate: whether to improve on it.
    """

    def refit(rows_P: Tensor) -> tuple[float, Tensor, Tensor]:
        free_F = complement(rows_P, W_OI.shape[0])
        free_spectrum = spectrum(W_OI[free_F], gram_II)
        U_FR = free_spectrum.basis_OR[:, :rank]
        V_RI = U_FR.T @ W_OI[free_F]
        # All rows against the span found on the free ones: a kept row has to earn its place again.
        return _error_at(free_spectrum, rank), W_OI - _project_rows(W_OI, V_RI, gram_II), U_FR

    return _alternate(W_OI, gram_II, rank, count, start, _ROUNDS if alternate else 1, row_gains, refit)


def _alternate(
    W_OI: Tensor,
    gram_II: Tensor,
    rank: int,
    count: int,
    start: Tensor | None,
    rounds: int,
    gains: Callable[[Tensor, Tensor], Tensor],
    refit: Callable[[Tensor], tuple[float, Tensor, Tensor]],
) -> Selection:
    """Alternate scoring on W - L with the exact L on top of the chosen set; the set of least error wins.

    Without a start there are two: L first (scores on the residual of the best low rank) and S first
    (scores on W itself).
    """
    if count == 0:
        none = torch.zeros(0, dtype=torch.int64, device=W_OI.device)
        return Selection(none, spectrum(W_OI, gram_II).basis_OR[:, :rank])
    if start is not None:
        firsts = [start]
    else:
        U_OR = spectrum(W_OI, gram_II).basis_OR[:, :rank]
        residuals = (W_OI - U_OR @ (U_OR.T @ W_OI), W_OI)
        firsts = [_top(gains(residual_OI, gram_II), count) for residual_OI in residuals]
    best_error, best = torch.inf, None
    for chosen in firsts:
        for _ in range(rounds):
            error, residual_OI, basis_OR = refit(chosen)
            if error < best_error:
                best_error, best = error, Selection(chosen, basis_OR)
            previous, chosen = chosen, _top(gains(residual_OI, gram_II), count)
            if torch.equal(chosen, previous):
                break
    assert best is not None, "non-finite error: inputs are checked before they come here"
    return best


def _top(gains: Tensor, count: int) -> Tensor:
    return gains.topk(count).indices.sort().values


def _error_at(free_spectrum: Spectrum, rank: int) -> float:
    errors = free_spectrum.errors()
    return float(errors[min(rank, errors.numel() - 1)])


def _project_rows(W_OI: Tensor, V_RI: Tensor, gram_II: Tensor) -> Tensor:
    """Best fit to W with rows in the span of V, in the metric G."""
    normal_RR = V_RI @ gram_II @ V_RI.T
    return (W_OI @ gram_II @ V_RI.T) @ torch.linalg.pinv(normal_RR, hermitian=True) @ V_RI
