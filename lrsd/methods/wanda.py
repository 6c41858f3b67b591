"""Baseline: Wanda, unstructured pruning by weight times input, stored with a bitmask."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrsd.forms.layer import Layer
from lrsd.forms.masked import Masked
from lrsd.methods.base import LayerProblem, Method, Solution, State, Status, Summand, store
from lrsd.numerics.menu import Choice, Menu


@dataclass(frozen=True, kw_only=True)
class Wanda(Method):
    """Keep as many entries of every output channel as fit an equal share, those of largest |w_ij| ||x_j||, as
    they are. Source: Wanda (ICLR 2024), section 3."""

    def offer(self, problem: LayerProblem) -> Menu:
        shape = problem.shape
        empty, one = (Layer(terms=(Masked(shape.in_features, n),)).nbytes(shape) for n in (0, 1))
        per_row = int((problem.share - empty) // ((one - empty) * shape.out_features))
        if per_row < 1:
            return Menu.of(shape.dense_bytes)
        entries = per_row * shape.out_features
        error = problem.relative_error(problem.W_OI * _largest(problem, per_row))
        return Menu.of(shape.dense_bytes, [empty + entries * (one - empty)], [error], {"entries": [entries]})

    def solve(self, problem: LayerProblem, choice: Choice, *, quick: bool = False) -> Solution:
        mask_OI = _largest(problem, choice.count("entries") // problem.shape.out_features)
        every_I = torch.arange(mask_OI.shape[1], device=mask_OI.device)
        summand = Summand(*Masked.of(problem.W_OI, mask_OI, every_I, len(every_I)))
        return store(problem, [summand], status=Status(State.PRUNED))


def _largest(problem: LayerProblem, per_row: int) -> Tensor:
    scores_OI = problem.W_OI.abs() * problem.metric.gram.diagonal().clamp(min=0).sqrt()
    mask_OI = torch.zeros_like(scores_OI, dtype=torch.bool)
    return mask_OI.scatter(1, scores_OI.topk(per_row, dim=1).indices, True)
