"""Random layers for the numerical tests: a weight, the tokens it reads, and their second moments."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrsd.methods import METHODS

# Methods that make offers for a layer and solve it, of which the contracts are. Those that train the whole
# model have neither menu nor solution; what they promise is in tests/training.
SOLVING = [name for name, kind in METHODS.items() if not kind.trains]

# What can be odd about a layer. "plain": nothing; "singular": fewer tokens than input channels;
# "dead": two silent input channels, two equal ones and a zero output row; "heavy": input channels of
# very different scale; "zero": no weight at all; "silent": no input at all.
KINDS = ("plain", "singular", "dead", "heavy")
DEGENERATE = ("zero", "silent")


@dataclass(frozen=True)
class RandomLayer:
    """W (O, I) and x (T, I), both float64."""

    W_OI: Tensor
    x_TI: Tensor

    @property
    def gram(self) -> Tensor:
        return self.x_TI.T @ self.x_TI / len(self.x_TI)

    def error(self, approximation_OI: Tensor) -> float:
        """E||(W - A) x||^2 / E||W x||^2, straight from the tokens."""
        total = (self.x_TI @ self.W_OI.T).square().sum()
        lost = (self.x_TI @ (self.W_OI - approximation_OI).T).square().sum()
        return float(lost / total) if total > 0 else 0.0


def random_layer(
    generator: torch.Generator, out_features: int, in_features: int, kind: str = "plain"
) -> RandomLayer:
    """Correlated inputs with a mean, and a weight of decaying spectrum; `kind` as in KINDS, DEGENERATE."""

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    tokens = max(1, in_features // 2) if kind == "singular" else 4 * in_features
    mixing_II = torch.eye(in_features, dtype=torch.float64) + 0.5 * normal(in_features, in_features)
    x_TI = (normal(tokens, in_features) + 0.3) @ mixing_II / in_features**0.5
    decay_I = torch.arange(1, in_features + 1, dtype=torch.float64) ** -0.5
    W_OI = normal(out_features, in_features) * decay_I @ normal(in_features, in_features) / in_features
    if kind == "dead":
        x_TI[:, 1:3] = 0
        x_TI[:, 3:4] = x_TI[:, 4:5]
        W_OI[1:2] = 0
    elif kind == "heavy":
        x_TI *= (1.5 * normal(in_features)).exp()
    elif kind == "zero":
        W_OI.zero_()
    elif kind == "silent":
        x_TI.zero_()
    return RandomLayer(W_OI, x_TI)


def planted_layer(generator: torch.Generator, size: int, rank: int) -> RandomLayer:
    """Low rank plus a remainder of heavy-tailed column and row scales, on weakly correlated inputs."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    remainder_OI = normal(size, size) * normal(size).exp() * normal(size, 1).exp()
    x_TI = normal(8 * size, size) * (0.5 * normal(size)).exp()
    return RandomLayer(normal(size, rank) @ normal(rank, size) + remainder_OI, x_TI)
