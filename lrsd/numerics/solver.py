"""One weight into low rank plus column-structured sparse: W ~ L + S."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lrsd.numerics.lowrank import best_low_rank, complement, ridged_cholesky
from lrsd.numerics.metric import Metric
from lrsd.numerics.moments import energy
from lrsd.numerics.rounding import EntropyCodes, GroupCodes, HessianFactor, hessian_factor
from lrsd.numerics.structured import (
    ColumnSplit,
    column_energies,
    fit_with_columns,
    select_columns,
    select_rows,
    split_columns,
)


@dataclass(frozen=True)
class Decomposition:
    """W ~ L + S with L = U V on the free rows and columns, S on the kept ones.

    U_FR (F, r), V_RC (r, C); columns_K, rows_P: kept input columns / output rows, ascending int64,
    never both; values: S on them, (O, K) or (P, I). mask_OK marks the stored entries of a
    thresholded S. codes: integers for all free columns, on top of L.
    error: tr((W - L - S) G (W - L - S)^T) / tr(W G W^T) against the target fitted.
    history: that error after each alternation. status: "exact" for a closed form, "best of n"
    for an alternation. damping: the ridge that a singular metric took, where the usual one did not do.
    """

    shape: tuple[int, int]
    U_FR: Tensor
    V_RC: Tensor
    columns_K: Tensor
    column_values_OK: Tensor
    rows_P: Tensor
    row_values_PI: Tensor
    mask_OK: Tensor | None
    error: float
    history: tuple[float, ...]
    status: str
    codes: EntropyCodes | GroupCodes | None = None
    damping: float = 0.0

    @property
    def rank(self) -> int:
        return self.U_FR.shape[1]

    def dense(self) -> Tensor:
        """L + S, (O, I)."""
        out_features, in_features = self.shape
        W_OI = self.V_RC.new_zeros(self.shape)
        free_F = complement(self.rows_P, out_features)
        thresholded = self.mask_OK is not None  # then L spans all columns
        free_C = complement(self.columns_K[:0] if thresholded else self.columns_K, in_features)
        W_OI[free_F[:, None], free_C] = self.U_FR @ self.V_RC
        if self.codes is not None:
            W_OI[:, free_C] += self.codes.dense().to(W_OI.dtype)
        W_OI[:, self.columns_K] += self.column_values_OK
        W_OI[self.rows_P] = self.row_values_PI
        return W_OI


def decompose(
    W_OI: Tensor,
    gram_II: Tensor,
    *,
    rank: int,
    columns: int = 0,
    rows: int = 0,
    start: Tensor | None = None,
    alternate: bool = True,
) -> Decomposition:
    """Minimise tr((W - L - S) G (W - L - S)^T) over rank L <= `rank` and S on the best columns or rows.

    Exact for the chosen columns (or rows); the choice itself alternates, see `structured`.

    Args: W_OI (O, I) target weight; gram_II (I, I) mean of x x^T; both float64 or float32;
        start: columns or rows to begin from, ascending, where they are known; alternate: whether
        to improve on them.
    Raises: ValueError if both columns and rows are asked for, or a count is out of range.
    """
    out_features, in_features = W_OI.shape
    if columns and rows:
        raise ValueError(f"keep columns or rows, not both: got {columns} columns and {rows} rows")
    if not 0 <= rank <= min(out_features - rows, in_features - columns):
        raise ValueError(
            f"rank must be in 0..{min(out_features - rows, in_features - columns)} with {columns} "
            f"kept columns and {rows} kept rows of a {out_features} x {in_features} weight, got {rank}"
        )
    none = torch.zeros(0, dtype=torch.int64, device=W_OI.device)
    columns_K, rows_P, S_OK, damping = none, none, W_OI[:, none], 0.0
    if rows:
        selection = select_rows(W_OI, gram_II, rank, rows, start, alternate)
        rows_P, U_FR = selection.kept, selection.basis_OR
        V_RC = U_FR.T @ W_OI[complement(rows_P, out_features)]
    else:
        selection = select_columns(W_OI, gram_II, rank, columns, start, alternate)
        columns_K, split = selection.kept, split_columns(gram_II, selection.kept)
        U_FR, V_RC, S_OK = fit_with_columns(W_OI, split, rank, selection.basis_OR)
        damping = split.damping
    found = Decomposition(
        (out_features, in_features), U_FR, V_RC, columns_K, S_OK, rows_P, W_OI[rows_P],
        mask_OK=None, error=0.0, history=(), status="exact", damping=damping,
    )  # fmt: skip
    error = relative_error(W_OI, found.dense(), gram_II)
    return replace(found, error=error, history=(error,))


def decompose_sparse(
    W_OI: Tensor,
    metric: Metric,
    sparse: Callable[[Tensor, Metric], tuple[Tensor, Tensor]],
    *,
    rank: int = 0,
    iterations: int = 1,
) -> Decomposition:
    """Low rank plus entries that are fitted to outputs wherever they are, by alternation.

    S-step: `sparse` of W - L; L-step: best low rank of W - S; S comes first and last, so that it is the
    optimum on its mask for the L that it is stored with. The best iterate is returned, the error of each
    recorded in `history`. Without a rank there is nothing to alternate.

    Args: sparse(target, metric) -> values (O, I) and mask, see `pruning`. Raises: SolverError.
    Source: the alternation of OATS (ICLR 2025) and 3BASiL (2025), S by error feedback and refitted.
    """
    every_I, none = (torch.arange(n, device=W_OI.device) for n in (W_OI.shape[1], 0))
    S_OI, mask_OI = sparse(W_OI, metric)
    U_OR, V_RI = W_OI[:, :0], W_OI[:0]
    best: Decomposition | None = None
    history: list[float] = []
    for _ in range(iterations if rank else 1):
        if rank:
            U_OR, V_RI = best_low_rank(W_OI - S_OI.to(W_OI), metric.gram, rank)
            S_OI, mask_OI = sparse(W_OI - U_OR @ V_RI, metric)
        S_OI = S_OI.to(W_OI)
        error = relative_error(W_OI, U_OR @ V_RI + S_OI, metric.gram)
        history.append(error)
        if best is None or error < best.error:
            best = Decomposition(
                (W_OI.shape[0], W_OI.shape[1]), U_OR, V_RI, every_I, S_OI, none, W_OI[none],
                mask_OK=mask_OI, error=error, history=(), status="pruned", damping=metric.factor.damping,
            )  # fmt: skip
    assert best is not None, "iterations is validated to be at least 1"
    return replace(best, history=tuple(history))


def columns_plus_codes(W_OI: Tensor, metric: Metric, columns: int) -> tuple[ColumnSplit, HessianFactor]:
    """The columns of largest output energy to keep, and the factor for rounding the others."""
    none = torch.zeros(0, dtype=torch.int64, device=W_OI.device)
    columns_K = column_energies(W_OI, metric.gram).topk(columns).indices.sort().values if columns else none
    split = split_columns(metric.gram, columns_K)
    if not columns:
        return split, metric.factor
    return split, hessian_factor(split.schur_CC, by_channel=metric.damps_by_channel)


def decompose_coded(
    W_OI: Tensor,
    gram_II: Tensor,
    quantize: Callable[[Tensor, HessianFactor], EntropyCodes | GroupCodes],
    split: ColumnSplit,
    factor: HessianFactor,
    *,
    rank: int = 0,
    iterations: int = 1,
) -> Decomposition:
    """Low rank plus kept columns plus integer codes Q for the other columns, by alternation.

    Q-step: round W - L with error feedback in the metric that is left once the kept columns are free;
    L-step: best low rank of W - Q, so that L is always the optimum for the codes it is stored with;
    S on the kept columns in closed form at the end. Without a rank there is nothing to alternate.
    The best iterate is returned, the error of each recorded in `history`.

    Args: quantize(W_OC, factor) -> codes; split, factor: see `columns_plus_codes`.
    Source: the alternation of LoSparse and SSD with rounding for S; rounding: GPTQ (ICLR 2023).
    """
    columns_K, none = split.columns_K, split.columns_K[:0]
    W_OC = W_OI[:, split.free_C]
    U_OR, V_RC = best_low_rank(W_OC, split.schur_CC, rank) if rank else (W_OC[:, :0], W_OC[:0])
    best: Decomposition | None = None
    history: list[float] = []
    for _ in range(iterations if rank else 1):
        codes = quantize(W_OC - U_OR @ V_RC, factor)
        Q_OC = codes.dense().to(W_OI.dtype)
        if rank:
            U_OR, V_RC = best_low_rank(W_OC - Q_OC, split.schur_CC, rank)
        lost_OC = W_OC - U_OR @ V_RC - Q_OC
        found = Decomposition(
            (W_OI.shape[0], W_OI.shape[1]), U_OR, V_RC, columns_K,
            W_OI[:, columns_K] + lost_OC @ split.regression_KC.T, none, W_OI[none],
            mask_OK=None, error=0.0, history=(), status="rounded", codes=codes,
            damping=max(split.damping, factor.damping),
        )  # fmt: skip
        history.append(relative_error(W_OI, found.dense(), gram_II))
        if best is None or history[-1] < best.error:
            best = replace(found, error=history[-1])
    assert best is not None, "iterations is validated to be at least 1"
    return replace(best, history=tuple(history))


def relative_error(W_OI: Tensor, approximation_OI: Tensor, gram_II: Tensor) -> float:
    """tr((W - A) G (W - A)^T) / tr(W G W^T); 0 where W has no output energy at all."""
    total = energy(W_OI, gram_II)
    return energy(W_OI - approximation_OI, gram_II) / total if total > 0 else 0.0


def propagated_target(
    W_OI: Tensor, gram_II: Tensor, missing_OI: Tensor, *, damping: float = 1e-4
) -> tuple[Tensor, float]:
    """Weight whose outputs on the compressed prefix's inputs come nearest to W x~ + m.

    W* = argmin E||W x~ + m - W' x~||^2 + damping mean(diag G) ||W' - W||_F^2.

    Args: W_OI the layer's own weight; gram_II G~ = E[x~ x~^T]; missing_OI E[m x~^T].
    Returns: W*, and the damping if it had to be raised, else 0. Raises: SolverError.
    """
    factor, raised = ridged_cholesky(gram_II, damping)
    return W_OI + torch.cholesky_solve(missing_OI.T, factor).T, raised
