"""Baseline: SparseGPT, unstructured pruning with error feedback, stored with a bitmask."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrsd.forms.layer import Layer
from lrsd.forms.masked import Masked
from lrsd.methods.base import LayerProblem, Method, Solution, State, Status, Summand, store
from lrsd.numerics.menu import Choice, Menu
from lrsd.numerics.pruning import largest, prune
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
        error = problem.relative_error(self._pruned(problem, entries)[0])
        return Menu.of(shape.dense_bytes, [empty + entries * (one - empty)], [error], {"entries": [entries]})

    def solve(self, problem: LayerProblem, choice: Choice, *, quick: bool = False) -> Solution:
        values_OI, mask_OI = self._pruned(problem, choice.count("entries"))
        every_I = torch.arange(values_OI.shape[1])
        status = Status(State.PRUNED, damping=problem.metric.factor.damping)
        return store(problem, [Summand(*Masked.of(values_OI, mask_OI, every_I, len(every_I)))], status=status)

    def _pruned(self, problem: LayerProblem, entries: int) -> tuple[Tensor, Tensor]:
        factor = problem.metric.factor
        return prune(problem.W_OI, factor, largest(entries, factor.width), self.block)
