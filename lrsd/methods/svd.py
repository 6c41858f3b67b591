"""Baselines: truncated singular value decomposition, plain, activation aware, and whitened."""

from dataclasses import dataclass

import torch

from lrsd.methods import low_rank_sparse
from lrsd.methods.base import LayerProblem, Method, Probe, Solution
from lrsd.numerics.menu import Choice, Menu
from lrsd.numerics.metric import Metric
from lrsd.numerics.moments import Moments


@dataclass(frozen=True, kw_only=True)
class SvdLlm(Method):
    """min tr((W - L) G (W - L)^T) over rank L <= r, two factors. Source: SVD-LLM (ICLR 2025), section 3."""

    def offer(self, problem: LayerProblem) -> Menu:
        return low_rank_sparse.offer(problem, (), pivoted=False)

    def solve(self, problem: LayerProblem, choice: Choice, *, quick: bool = False) -> Solution:
        return low_rank_sparse.solve(problem, choice)

    def probe(self, problem: LayerProblem, menu: Menu) -> Probe:
        return low_rank_sparse.probe(problem)


@dataclass(frozen=True, kw_only=True)
class Asvd(SvdLlm):
    """In the diagonal metric (mean |x_j|)^(2 alpha), here E[x_j^2]^alpha with alpha = 0.5. Source: ASVD."""

    def metric(self, moments: Moments) -> Metric:
        return Metric(torch.diag(moments.gram.diagonal().clamp(min=0).sqrt()))


@dataclass(frozen=True, kw_only=True)
class Svd(SvdLlm):
    """Of the weights alone: min ||W - L||_F (Eckart & Young 1936)."""

    def metric(self, moments: Moments) -> Metric:
        gram_II = moments.gram
        return Metric(torch.eye(moments.width, dtype=gram_II.dtype, device=gram_II.device))
