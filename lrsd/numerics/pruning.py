"""Single entries kept of a matrix: which, by what dropping them costs, and their values, in the metric of the
outputs."""

from collections.abc import Callable

import torch
from torch import Tensor

from lrsd.numerics.lowrank import complement
from lrsd.numerics.metric import Metric
from lrsd.numerics.rounding import HessianFactor

# Columns among which the entries to drop are chosen, as SparseGPT does; smaller ones lose a little less.
BLOCK = 64
# Rounds of refitting what is kept: the first takes 17 % of the error away, three 23 %, all there is 26 %.
_SWEEPS = 3
# Columns refitted between two updates of all others.
_TOGETHER = 64

# Which entries of a block of columns stay, (B, O) booleans: from what dropping each would lose, (B, O), and
# the place of the block's first column in the factor's order.
Rule = Callable[[Tensor, int], Tensor]


def prune(W_OI: Tensor, factor: HessianFactor, rule: Rule, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """The values (O, I) float32 that stay, 0 elsewhere, and the mask of the entries that do.

    The rule sees the loss w_ij^2 / U_jj^2 of every entry of a block of columns, U of the inverse Hessian's
    Cholesky factor; what a column loses moves the columns after it.
    Source: SparseGPT (ICML 2023), algorithm 1, with columns in the factor's order.
    """
    ordered_IO = W_OI.float().T[factor.order_I].contiguous()
    mask_IO = torch.zeros(ordered_IO.shape, dtype=torch.bool, device=W_OI.device)
    values_IO = torch.zeros_like(ordered_IO)
    upper_II, width = factor.upper_II, factor.width
    for start in range(0, width, block):
        stop = min(start + block, width)
        scores_BO = (ordered_IO[start:stop] / upper_II.diagonal()[start:stop, None]) ** 2
        mask_IO[start:stop] = rule(scores_BO, start)
        errors_BO = torch.empty_like(scores_BO)
        for i in range(start, stop):
            torch.mul(ordered_IO[i], mask_IO[i], out=values_IO[i])
            error_O = torch.sub(ordered_IO[i], values_IO[i], out=errors_BO[i - start])
            error_O /= upper_II[i, i]
            ordered_IO[i + 1 : stop].addr_(upper_II[i, i + 1 : stop], error_O, alpha=-1)
        ordered_IO[stop:] -= upper_II[start:stop, stop:].T @ errors_BO
    back_I = factor.order_I.argsort()
    return values_IO[back_I].T.contiguous(), mask_IO[back_I].T.contiguous()


def largest(entries: int, width: int) -> Rule:
    """So many entries of all `width` columns, every block its share of them."""

    def rule(scores_BO: Tensor, start: int) -> Tensor:
        kept = entries * (start + len(scores_BO)) // width - entries * start // width
        return _largest(scores_BO, kept)

    return rule


def two_of_four(scores_BO: Tensor, start: int) -> Tensor:
    """Two of every four neighbors; the factor's order must keep fours together."""
    scores_Q4O = scores_BO.view(-1, 4, scores_BO.shape[1])
    mask_Q4O = torch.zeros_like(scores_Q4O, dtype=torch.bool)
    return mask_Q4O.scatter(1, scores_Q4O.topk(2, dim=1).indices, True).view_as(scores_BO)


def exactly(mask_OI: Tensor, factor: HessianFactor) -> Rule:
    """What a mask says, whatever is lost."""
    ordered_IO = mask_OI.T[factor.order_I]
    return lambda scores_BO, start: ordered_IO[start : start + len(scores_BO)]


def best_blocks(W_OI: Tensor, factor: HessianFactor, blocks: int, size: int) -> Tensor:
    """The mask (O, I) of the `size` x `size` blocks of largest loss sum_ij w_ij^2 / (H^-1)_jj: what dropping
    an entry costs once all others have made up for it, as far as they can.

    Source: Optimal Brain Surgeon (Hassibi & Stork, 1992), summed over a block.
    """
    inverse_I = (factor.upper_II**2).sum(0)[factor.order_I.argsort()]
    scores_OI = W_OI.float() ** 2 / inverse_I
    rows, columns = (side // size for side in W_OI.shape)
    kept_RC = _largest(scores_OI.view(rows, size, columns, size).sum((1, 3)), blocks)
    return kept_RC.repeat_interleave(size, 0).repeat_interleave(size, 1)


def _largest(scores: Tensor, count: int) -> Tensor:
    keep = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    keep[scores.flatten().topk(count).indices] = True
    return keep.view_as(scores)


def refit_entries(
    W_OI: Tensor, values_OI: Tensor, mask_OI: Tensor, gram_II: Tensor, sweeps: int = _SWEEPS
) -> Tensor:
    """Values (O, I) float32 nearer to the optimum on the mask, by coordinate descent: one column at a time,
    each of its kept entries set to the best value given all others, so that every step lowers the error."""
    gram_II = gram_II.float()
    values_IO, mask_IO = values_OI.float().T.contiguous(), mask_OI.T
    pulls_IO = gram_II @ (W_OI.float().T - values_IO)
    diagonal_I = gram_II.diagonal().clamp(min=torch.finfo(torch.float32).tiny)
    every_I = torch.arange(len(values_IO), device=W_OI.device)
    for _ in range(sweeps):
        for start in range(0, len(values_IO), _TOGETHER):
            block = slice(start, min(start + _TOGETHER, len(values_IO)))
            gram_BB, pulls_BO = gram_II[block, block], pulls_IO[block]
            moved_BO = torch.empty_like(pulls_BO)
            for i in range(len(moved_BO)):
                moved_O = torch.div(pulls_BO[i], diagonal_I[start + i], out=moved_BO[i])
                moved_O *= mask_IO[start + i]
                pulls_BO.addr_(gram_BB[:, i], moved_O, alpha=-1)
            values_IO[block] += moved_BO
            rest = complement(every_I[block], len(every_I))
            pulls_IO[rest] -= gram_II[rest, block] @ moved_BO
    return values_IO.T.contiguous()


def sparse_entries(W_OI: Tensor, metric: Metric, entries: int) -> tuple[Tensor, Tensor]:
    """Values (O, I) of `entries` single entries, and their mask. Raises: SolverError."""
    return _refitted(W_OI, metric, *prune(W_OI, metric.factor, largest(entries, metric.width)))


def sparse_pairs(W_OI: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """Values (O, I) of two of every four columns of a row, and their mask. Raises: SolverError."""
    return _refitted(W_OI, metric, *prune(W_OI, metric.factor_of_fours, two_of_four))


def sparse_blocks(W_OI: Tensor, metric: Metric, blocks: int, size: int) -> tuple[Tensor, Tensor]:
    """Values (O, I) of `blocks` blocks, and their mask. Raises: SolverError."""
    rule = exactly(best_blocks(W_OI, metric.factor, blocks, size), metric.factor)
    return _refitted(W_OI, metric, *prune(W_OI, metric.factor, rule))


def _refitted(W_OI: Tensor, metric: Metric, values_OI: Tensor, mask_OI: Tensor) -> tuple[Tensor, Tensor]:
    return refit_entries(W_OI, values_OI, mask_OI, metric.damped), mask_OI
