"""The metric that weight errors are measured in, with its factors, made once for all layers that share
inputs."""

from collections.abc import Callable
from functools import cache, cached_property, partial

import torch
from torch import Tensor

from lrsd.numerics.lowrank import square_root
from lrsd.numerics.rounding import DAMPING, HessianFactor, hessian_factor


class Metric:
    """G (I, I), the mean of x x^T or what stands for it: err(A) = tr((W - A) G (W - A)^T).

    gram: in float64; factor: of (G + damping)^-1, for error feedback, the damping by channel or by their
    mean; root: C with C C^T = G.
    """

    def __init__(
        self,
        gram_II: Tensor,
        factors: tuple[Callable[[], HessianFactor], ...] = (),
        *,
        damps_by_channel: bool = False,
    ) -> None:
        """factors: those of the same metric in float64, which serve here too."""
        self.gram, self.damps_by_channel = gram_II, damps_by_channel
        # No metric refers to itself or to its like: both would stay in memory until a garbage collection.
        self._factors = factors or tuple(
            cache(partial(hessian_factor, gram_II, by_channel=damps_by_channel, together=together))
            for together in (1, 4)
        )

    @property
    def width(self) -> int:
        return len(self.gram)

    @property
    def factor(self) -> HessianFactor:
        """Raises: SolverError."""
        return self._factors[0]()

    @property
    def factor_of_fours(self) -> HessianFactor:
        """The same in an order that keeps every four neighbors together. Raises: SolverError."""
        return self._factors[1]()

    @cached_property
    def shares(self) -> Tensor:
        """(U G U^T)_jj of the factor U, in its order, float32: how much of a column's rounding error counts;
        1 without damping. Raises: SolverError."""
        upper_II, order_I = self.factor.upper_II, self.factor.order_I
        ordered_II = self.single.gram[order_I][:, order_I]
        return ((upper_II @ ordered_II) * upper_II).sum(1).clamp(min=0)

    @cached_property
    def damped(self) -> Tensor:
        """G with a ridge on every channel, float32: for descents, which would follow the sample too far."""
        gram_II = self.single.gram
        return gram_II + (DAMPING * gram_II.diagonal()).diag()

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
        return Metric(self.gram.float(), self._factors, damps_by_channel=self.damps_by_channel)

    def energy(self, W_OI: Tensor) -> float:
        """tr(W G W^T) from products in float32: the mean squared norm of W x per token."""
        W_OI = W_OI.float()
        return float(((W_OI @ self.single.gram) * W_OI).sum().clamp(min=0))
