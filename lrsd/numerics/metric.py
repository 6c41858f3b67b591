"""The metric that weight errors are measured in, with its factors, made once for all layers that share
inputs."""

from functools import cached_property

import torch
from torch import Tensor

from lrsd.numerics.lowrank import square_root
from lrsd.numerics.rounding import HessianFactor, hessian_factor


class Metric:
    """G (I, I), the mean of x x^T or what stands for it: err(A) = tr((W - A) G (W - A)^T).

    gram: in float64; factor: of (G + damping)^-1, for error feedback; root: C with C C^T = G.
    """

    def __init__(self, gram_II: Tensor, exact: "Metric | None" = None) -> None:
        """exact: the same metric in float64, whose factor serves here too."""
        self.gram, self._exact = gram_II, exact

    @property
    def width(self) -> int:
        return len(self.gram)

    @cached_property
    def factor(self) -> HessianFactor:
        """Raises: SolverError."""
        return hessian_factor(self.gram) if self._exact is None else self._exact.factor

    @cached_property
    def root(self) -> Tensor:
        """Raises: SolverError."""
        return square_root(self.gram)

    @cached_property
    def single(self) -> "Metric":
        """The same in float32, for what is not worth more."""
        return self if self.gram.dtype == torch.float32 else Metric(self.gram.float(), self)

    def energy(self, W_OI: Tensor) -> float:
        """tr(W G W^T) from products in float32: the mean squared norm of W x per token."""
        W_OI = W_OI.float()
        return float(((W_OI @ self.single.gram) * W_OI).sum().clamp(min=0))
