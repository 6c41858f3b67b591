"""Baseline: SparseGPT, unstructured pruning with error feedback, stored with a bitmask."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrsd.forms.layer import Layer
from lrsd.forms.masked import Masked
from lrsd.methods.base import LayerProblem, Method, Solution, State, Status, Summand, store
from lrsd.numerics.menu import Choice, Menu
from lrsd.numerics.rounding import HessianFactor
from lrsd.settings import check_options, option


@dataclass(frozen=True, kw_only=True)
class SparseGpt(Method):
    """Keep as many entries as fit an equal share; what a column loses moves the columns after it.

    Within each block of columns those entries go whose loss w_ij^2 / U_jj^2 is least, U of the inverse
    Hessian's Cholesky factor. Source: SparseGPT (ICML 2023), algorithm 1, with columns in activation order.
    """

    block: int = option(128, "Columns among which SparseGPT chooses the entries to drop.", least=1)

    def __post_init__(self) -> None:
        check_options(self)

    def offer(self, problem: LayerProblem) -> Menu:
        shape = problem.shape
        empty, one = (Layer(terms=(Masked(shape.in_features, n),)).nbytes(shape) for n in (0, 1))
        entries = int((problem.share - empty) // (one - empty))
        if entries < 1:
            return Menu.of(shape.dense_bytes)
        error = problem.relative_error(prune(problem.W_OI, problem.metric.factor, entries, self.block)[0])
        return Menu.of(shape.dense_bytes, [empty + entries * (one - empty)], [error], {"entries": [entries]})

    def solve(self, problem: LayerProblem, choice: Choice, *, quick: bool = False) -> Solution:
        values_OI, mask_OI = prune(problem.W_OI, problem.metric.factor, choice.count("entries"), self.block)
        every_I = torch.arange(values_OI.shape[1])
        status = Status(State.PRUNED, damping=problem.metric.factor.damping)
        return store(problem, [Summand(*Masked.of(values_OI, mask_OI, every_I, len(every_I)))], status=status)


def prune(W_OI: Tensor, factor: HessianFactor, entries: int, block: int) -> tuple[Tensor, Tensor]:
    """The values (O, I) float32 that stay, 0 elsewhere, and the mask of the `entries` that do."""
    ordered_IO = W_OI.float().T[factor.order_I].contiguous()
    mask_IO = torch.zeros(ordered_IO.shape, dtype=torch.bool, device=W_OI.device)
    values_IO = torch.zeros_like(ordered_IO)
    upper_II, width = factor.upper_II, factor.width
    for start in range(0, width, block):
        stop = min(start + block, width)
        scores_BO = (ordered_IO[start:stop] / upper_II.diagonal()[start:stop, None]) ** 2
        kept = entries * stop // width - entries * start // width
        chosen = scores_BO.flatten().topk(kept).indices
        mask_IO[start:stop].view(-1)[chosen] = True
        errors_BO = torch.empty_like(scores_BO)
        for i in range(start, stop):
            values_IO[i] = ordered_IO[i] * mask_IO[i]
            errors_BO[i - start] = (ordered_IO[i] - values_IO[i]) / upper_II[i, i]
            ordered_IO[i + 1 : stop].addr_(upper_II[i, i + 1 : stop], errors_BO[i - start], alpha=-1)
        ordered_IO[stop:] -= upper_II[start:stop, stop:].T @ errors_BO
    back_I = factor.order_I.argsort()
    return values_IO[back_I].T.contiguous(), mask_IO[back_I].T.contiguous()
