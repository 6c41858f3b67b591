"""Streaming second moments of a linear layer's input."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lrsd.errors import SolverError
from lrsd.numerics.lowrank import cholesky

# Column blocks in which the upper triangle of x^T x is computed: with 4 blocks 10/16 of the
# multiplications are left, with more the blocks get too narrow for a fast matrix product.
_TRIANGLE_BLOCKS = 4


# Of a part's moments, in units of their diagonal, before its inverse tells how they moved.
_RIDGE = 1e-4
# Sums are of multiples of 2^-30 of the first batch's norms: finer than the float32 products that are added,
# and exact, in whatever order, until a channel's energy is 2^23 times that of the first batch.
_FINENESS = 2.0**-30
# A channel that hardly moves in the first batch is taken to have this share of the channels' median energy.
_LEAST_ENERGY = 2.0**-12
# p + c - c with this many units in c is p rounded to units, in float64.
_ROUNDING = 1.5 * 2.0**52


def grain(x_TI: Tensor) -> Tensor:
    """Powers of two next to the norms of the columns of the first batch, (I,) float64, by which `Moments` are
    rounded: processes that share them come to the same sums, byte by byte, whatever each of them adds."""
    energies_I = x_TI.reshape(-1, x_TI.shape[-1]).float().square().sum(0).to(torch.device("cpu")).double()
    moving = energies_I[energies_I > 0]
    level = float(moving.median()) if moving.numel() else 0.0
    return power_of_two(energies_I.clamp(min=_LEAST_ENERGY * level).sqrt())


def power_of_two(values: Tensor) -> Tensor:
    """One next to each, float64 on the CPU; 1 for what is zero or not finite."""
    values = values.to(torch.device("cpu")).double()
    usable = values.isfinite() & (values > 0)
    _, exponents = torch.frexp(torch.where(usable, values, torch.ones_like(values)))
    return torch.ldexp(torch.ones_like(values), exponents)


def rounded(values: Tensor, grain: Tensor) -> Tensor:
    """R(p) = u round(p / u), u = 2^-30 `grain`, float64, as (p + c) - c with c = 1.5 2^52 u: sums of such
    values are exact, whatever their order, while they stay below 2^53 u. Of entry ij of x^T x the grain is
    that of channel i times that of j."""
    shift = grain * (_FINENESS * _ROUNDING)
    return values.to(shift.device).double().add_(shift).sub_(shift)


@dataclass
class Moments:
    """Sums over calibration tokens of x x^T, each as often as its weight says, of x and 1: float64 sums of
    float32 partial products, rounded so that these sums are exact. The products are made where x is, the sums
    where `device` says, since not every accelerator has float64.

    `a + b` is the moments of both token sets together, so shards merge in any order. count: tokens;
    weight: the sum of their weights.
    Source: rounding to a common unit before adding, Demmel & Nguyen, "Fast reproducible floating-point
    summation", ARITH 2013.
    """

    width: int
    device: torch.device | str = "cpu"
    count: int = 0
    weight: float = 0.0
    _upper_II: Tensor = field(init=False, repr=False)
    _sum_I: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._upper_II = torch.zeros(self.width, self.width, dtype=torch.float64, device=self.device)
        self._sum_I = torch.zeros(self.width, dtype=torch.float64, device=self.device)

    def update_(self, x_TI: Tensor, weights_T: Tensor | None = None, grain_I: Tensor | None = None) -> None:
        """Add the tokens of x (any leading shape, last dimension `width`).

        weights: 1 by default; grain: of the first batch of all, see there, by default of this one.
        """
        x_TI = x_TI.reshape(-1, self.width).float()
        grain_I = (grain(x_TI) if grain_I is None else grain_I).to(self._sum_I.device)
        self.count += len(x_TI)
        self.weight += _weight(x_TI, weights_T)
        self._sum_I += rounded(x_TI.sum(0), grain_I)
        if weights_T is not None:
            x_TI = x_TI * weights_T.to(x_TI).sqrt()[:, None]
        step = max(1, math.ceil(self.width / _TRIANGLE_BLOCKS))
        for start in range(0, self.width, step):
            block_TB = x_TI[:, start : start + step]
            product_BI = block_TB.T @ x_TI[:, start:]
            grain_BI = grain_I[start : start + step, None] * grain_I[start:]
            self._upper_II[start : start + step, start:] += rounded(product_BI, grain_BI)

    def sums(self) -> tuple[Tensor, ...]:
        """What is added up over processes, in place: `restore_counts_` with the last one follows."""
        counts = torch.tensor([self.count, self.weight], dtype=torch.float64, device=self._sum_I.device)
        return self._upper_II, self._sum_I, counts

    def restore_counts_(self, counts: Tensor) -> None:
        self.count, self.weight = int(counts[0]), float(counts[1])

    def __add__(self, other: "Moments") -> "Moments":
        merged = Moments(self.width, self.device, self.count + other.count, self.weight + other.weight)
        merged._upper_II = self._upper_II + other._upper_II
        merged._sum_I = self._sum_I + other._sum_I
        return merged

    def moved(self, before: "Moments", after: "Moments") -> "Moments":
        """What is expected of these tokens from how a part of them moved.

        With Cholesky factors L L^T = G_before and M M^T = G_after: G becomes T G T^T, T = M L^-1. Of all maps
        with T G_before T^T = G_after it is the triangular one, next to 1 where little moved; no direction can
        become negative. The mean moves as the part's does. Exact where the part is all of them.
        Raises: SolverError.
        """
        if before.count == self.count:
            return after
        diagonal_I = before._upper_II.diagonal() / (before.weight or 1.0)
        least = max(_RIDGE * float(diagonal_I.mean()), torch.finfo(torch.float32).tiny)
        ridge_I = _RIDGE * diagonal_I.clamp(min=least)
        L_II, M_II = (_cholesky(part.gram, ridge_I) for part in (before, after))
        T_II = torch.linalg.solve_triangular(L_II, M_II, upper=False, left=False)
        del L_II, M_II
        moved = Moments(self.width, self.device, self.count, self.weight)
        moved._upper_II = (T_II @ self.gram @ T_II.T).mul_(self.weight)
        moved._sum_I += self._sum_I + (after.mean - before.mean) * self.count
        return moved

    def scaled(self, count: int) -> "Moments":
        """The same means as if they were of `count` tokens."""
        times = count / max(self.count, 1)
        scaled = Moments(self.width, self.device, count, self.weight * times)
        scaled._upper_II += self._upper_II * times
        scaled._sum_I += self._sum_I * times
        return scaled

    def state(self) -> dict[str, Tensor]:
        """The sums for storage: the upper triangle of x x^T in float32, which its partial products had."""
        # Row by row: indices of all entries would take twice the memory of these. On the host, where it goes:
        # an accelerator would have a launch for each.
        rows = self._upper_II.float().cpu()
        return {
            "upper": torch.cat([row_I[i:] for i, row_I in enumerate(rows)]),
            "sum": self._sum_I,
            "count": torch.tensor(self.count),
            "weight": torch.tensor(self.weight, dtype=torch.float64),
        }

    def as_stored_(self) -> None:
        """What `from_state` gives of its `state`, in place."""
        self._upper_II.copy_(self._upper_II.float())

    @staticmethod
    def from_state(state: Mapping[str, Tensor], device: torch.device | str = "cpu") -> "Moments":
        """What `state` was taken of, to float32."""
        moments = Moments(state["sum"].numel(), device, int(state["count"]), float(state["weight"]))
        upper_II = torch.zeros(moments.width, moments.width)
        parts = state["upper"].cpu().split(list(range(moments.width, 0, -1)))
        for row_I, stored in zip(upper_II, parts, strict=True):
            row_I[len(row_I) - len(stored) :] = stored
        moments._upper_II.copy_(upper_II)
        moments._sum_I += state["sum"].to(device)
        return moments

    @property
    def gram(self) -> Tensor:
        """G = E[x x^T], (I, I) float64, per unit of weight."""
        gram_II = self._upper_II.triu()
        gram_II += self._upper_II.triu(1).T
        gram_II /= self.weight or 1.0
        return gram_II

    @property
    def mean(self) -> Tensor:
        """E[x], (I,) float64, all tokens alike."""
        return self._sum_I / max(self.count, 1)


@dataclass
class CrossMoments:
    """Sums over tokens of t x^T, weighted, of t and 1, for a target t that is not a function of x alone; on
    `device`, as those of `Moments`."""

    rows: int
    columns: int
    device: torch.device | str = "cpu"
    count: int = 0
    weight: float = 0.0
    _sum_OI: Tensor = field(init=False, repr=False)
    _sum_O: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._sum_OI = torch.zeros(self.rows, self.columns, dtype=torch.float64, device=self.device)
        self._sum_O = torch.zeros(self.rows, dtype=torch.float64, device=self.device)

    def update_(
        self,
        t_TO: Tensor,
        x_TI: Tensor,
        weights_T: Tensor | None = None,
        grains: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Add pairs of tokens; both tensors share their leading shape. weights: 1 by default; grains: of t
        and x, as in `Moments`."""
        t_TO, x_TI = t_TO.reshape(-1, self.rows).float(), x_TI.reshape(-1, self.columns).float()
        grain_O, grain_I = (
            g.to(self._sum_O.device) for g in ((grain(t_TO), grain(x_TI)) if grains is None else grains)
        )
        self.count += len(t_TO)
        self.weight += _weight(t_TO, weights_T)
        self._sum_O += rounded(t_TO.sum(0), grain_O)
        if weights_T is not None:
            t_TO = t_TO * weights_T.to(t_TO)[:, None]
        self._sum_OI += rounded(t_TO.T @ x_TI, grain_O[:, None] * grain_I)

    def sums(self) -> tuple[Tensor, ...]:
        """As `Moments.sums`."""
        counts = torch.tensor([self.count, self.weight], dtype=torch.float64, device=self._sum_O.device)
        return self._sum_OI, self._sum_O, counts

    def restore_counts_(self, counts: Tensor) -> None:
        self.count, self.weight = int(counts[0]), float(counts[1])

    def __add__(self, other: "CrossMoments") -> "CrossMoments":
        merged = CrossMoments(
            self.rows, self.columns, self.device, self.count + other.count, self.weight + other.weight
        )
        merged._sum_OI = self._sum_OI + other._sum_OI
        merged._sum_O = self._sum_O + other._sum_O
        return merged

    @property
    def mean(self) -> Tensor:
        """E[t x^T], (O, I) float64, per unit of weight."""
        return self._sum_OI / (self.weight or 1.0)

    @property
    def target_mean(self) -> Tensor:
        """E[t], (O,) float64, all tokens alike."""
        return self._sum_O / max(self.count, 1)


def _weight(x_TI: Tensor, weights_T: Tensor | None) -> float:
    """The tokens' weights together, in multiples of 2^-20, whose sums are exact."""
    if weights_T is None:
        return float(len(x_TI))
    return round(float(weights_T.double().sum()) * 2.0**20) / 2.0**20


def _cholesky(gram_II: Tensor, ridge_I: Tensor) -> Tensor:
    """Of a metric that is given up for it, with a ridge."""
    gram_II.diagonal().add_(ridge_I)
    if (lower_II := cholesky(gram_II)) is None:
        raise SolverError("the moments of its inputs are not finite or not positive semidefinite")
    return lower_II


def energy(W_OI: Tensor, gram_II: Tensor) -> float:
    """tr(W G W^T): the mean squared norm of W x per token, in output units squared."""
    return float(((W_OI @ gram_II) * W_OI).sum().clamp(min=0))
