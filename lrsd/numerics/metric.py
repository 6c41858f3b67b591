"""The metric that weight errors are measured in, with its factors, made once for all layers that share
inputs."""

from collections.abc import Callable
from functools import cache, cached_property, partial

import torch
from torch import Tensor

from lrsd.numerics.lowrank import square_root
from lrsd.numerics.rounding import HessianFactor, hessian_factor


class Metric:
    """G (I, I), the mean of x x^T or what stands for it: err(A) = tr((W - A) G (W - A)^T).

    gram: in float64; factor: of (G + damping)^-1, for error feedback; root: C with C C^T = G.
    """

    def __init__(self, gram_II: Tensor, factor: Callable[[], HessianFactor] | None = None) -> None:
        """factor: that of the same metric in float64, which serves here too."""
        self.gram = gram_II
        # No metric refers to itself or to its like: both would stay in memory until a garbage collection.
        self._factor = cache(partial(hessian_factor, gram_II)) if factor is None else factor

    @property
    def width(self) -> int:
        return len(self.gram)

    @property
    def factor(self) -> HessianFactor:
        """Raises: SolverError."""
        return self._factor()

    @cached_property
    def root(self) -> Tensor:
        """Raises: SolverError."""
        return square_root(self.gram)

    @property
    def single(self) -> "Metric":
        """The same in float32, for what is not worth more."""
        return self if self.gram.dtype == torch.float32 else self._single

    @cached_property
    def _single(self) -> "Metric":
        return Metric(self.gram.float(), self._factor)

    def energy(self, W_OI: Tensor) -> float:
        """tr(W G W^T) from products in float32: the mean squared norm of W x per token."""
        W_OI = W_OI.float()
        return float(((W_OI @ self.single.gram) * W_OI).sum().clamp(min=0))
