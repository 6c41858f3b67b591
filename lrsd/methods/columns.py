"""Baseline: structured pruning of input channels."""

from dataclasses import dataclass

from lrsd.methods import low_rank_sparse
from lrsd.methods.base import LayerProblem, Method, Solution
from lrsd.methods.supports import pruned_columns
from lrsd.numerics.menu import Choice, Menu


@dataclass(frozen=True, kw_only=True)
class Columns(Method):
    """As many input channels as fit an equal share, those of largest output energy ||W e_j||^2 G_jj, refitted
    to make up for the others: S_J = W_J + W_c G_cJ G_JJ^-1."""

    def offer(self, problem: LayerProblem) -> Menu:
        return low_rank_sparse.menu_of(problem.shape, [pruned_columns(problem)])

    def solve(self, problem: LayerProblem, choice: Choice, *, quick: bool = False) -> Solution:
        return low_rank_sparse.solve(problem, choice, iterations=1 if quick else 2)
