"""The layers that LoSparse trains, U V + S, and the pruning of the rows of S while they are trained."""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lrsd.errors import BudgetError, NumericsError
from lrsd.forms.base import Shape
from lrsd.forms.layer import Layer, assemble
from lrsd.forms.lowrank import LowRank
from lrsd.methods.base import State, Status
from lrsd.methods.losparse import Losparse
from lrsd.model.slots import WeightSlot
from lrsd.numerics.menu import Choice
from lrsd.numerics.schedule import (
    kept_fraction,
    most_important,
    row_importance,
    row_magnitude,
    smoothed,
)
from lrsd.steps.fit import Fitted


class LowRankPlusSparse(nn.Module):
    """y = x (U V + S)^T + b, all of it trained; L = U V from the truncated SVD of W, S = W - L.

    U (O, r) and V (r, I) share the singular values evenly; None at rank 0. S (O, I); None where nothing is
    left for rows of it. Buffers, (O,) each, are what pruning remembers, and so are in every checkpoint:
    importance, its moving average; window, its sum since the last threshold; kept, rows that are not zero.
    """

    U: nn.Parameter | None
    V: nn.Parameter | None
    S: nn.Parameter | None
    importance: Tensor
    window: Tensor
    kept: Tensor

    def __init__(self, W_OI: Tensor, bias_O: Tensor | None, rank: int, *, sparse: bool) -> None:
        super().__init__()
        U_OR, V_RI = truncated_svd(W_OI, rank)
        self.U, self.V = (nn.Parameter(U_OR), nn.Parameter(V_RI)) if rank else (None, None)
        self.S = nn.Parameter(W_OI - U_OR @ V_RI) if sparse else None
        self.bias = None if bias_O is None else nn.Parameter(bias_O.float())
        self.shape = Shape(*W_OI.shape)
        self.rank = rank
        zeros_O = torch.zeros(len(W_OI))
        self.register_buffer("importance", zeros_O)
        self.register_buffer("window", zeros_O.clone())
        self.register_buffer("kept", torch.full((len(W_OI),), sparse))

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        if self.U is not None and self.V is not None:
            parts.append(linear(linear(x, self.V), self.U, self.bias if self.S is None else None))
        if self.S is not None:
            parts.append(linear(x, self.S, self.bias))
        if not parts:  # the bytes hold nothing of it
            zeros = x.new_zeros(*x.shape[:-1], self.shape.out_features)
            return zeros if self.bias is None else zeros + self.bias
        return sum(parts[1:], parts[0])

    @property
    def weight(self) -> Tensor:
        """A tensor of the layer's type and device: models ask a linear layer's weight for these."""
        found = self.V if self.S is None else self.S
        return self.importance if found is None else found

    @property
    def rows_cost(self) -> Tensor:
        return row_costs(self.shape, self.rank)

    @torch.no_grad()
    def observe(self, importance: str) -> None:
        """Add this step's importance of every row to the window; after the backward pass."""
        if self.S is None:
            return
        if importance == "magnitude":
            self.window += row_magnitude(self.S)
        elif self.S.grad is not None:  # an expert that no token of the batch reached has none
            self.window += row_importance(self.S, self.S.grad)

    @torch.no_grad()
    def close_window(self, steps: int, beta: float) -> None:
        self.importance.copy_(smoothed(self.importance, self.window / steps, beta))
        self.window.zero_()

    @torch.no_grad()
    def zero_pruned(self) -> None:
        """Their gradients are not touched: what is zero now may return at the next threshold."""
        if self.S is not None:
            self.S.mul_(self.kept[:, None])

    @torch.no_grad()
    def dense(self) -> Tensor:
        """U V + S, (O, I) in float64 on the host."""
        W_OI = torch.zeros(self.shape.out_features, self.shape.in_features, dtype=torch.float64)
        if self.U is not None and self.V is not None:
            W_OI += self.U.cpu().double() @ self.V.cpu().double()
        return W_OI if self.S is None else W_OI + self.S.cpu().double()


def truncated_svd(W_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U sqrt(D) (O, r) and sqrt(D) V (r, I) of the best rank-r fit to W, in its type."""
    U_OR, values_R, V_RI = torch.linalg.svd(W_OI.double(), full_matrices=False)
    roots_R = values_R[:rank].sqrt()
    return (U_OR[:, :rank] * roots_R).to(W_OI.dtype), (roots_R[:, None] * V_RI[:rank]).to(W_OI.dtype)


@cache
def row_costs(shape: Shape, rank: int) -> Tensor:
    """Bytes that a layer takes more with one, two, ... kept rows on top of low rank; (O,) int64. Where that
    would be more than the dense weight takes, this is stored, and further rows are free."""
    sizes = [layer_bytes(shape, rank, rows) for rows in range(shape.out_features + 1)]
    return torch.tensor(sizes).diff()


def layer_bytes(shape: Shape, rank: int, rows: int) -> int:
    """Of low rank with so many kept rows, or dense where that is less."""
    if rank > shape.out_features - rows:  # then the rows alone take what the dense weight does
        return shape.dense_bytes
    return min(int(Layer(terms=(LowRank(rank),), rows=rows).nbytes(shape)), shape.dense_bytes)


def ranks_within(shapes: Mapping[str, Shape], budget: int, share: float) -> dict[str, int]:
    """The rank of every layer: the largest that takes no more than `share` of the layer's part of the budget,
    which is the same part of its dense bytes for all. Where nothing is to be left for rows (share 1), what
    that leaves goes to the first layers."""
    dense = sum(shape.dense_bytes for shape in shapes.values())
    ranks = {}
    for name, shape in shapes.items():
        most = range(min(shape.out_features, shape.in_features) + 1)
        allowed = share * budget * shape.dense_bytes / dense
        ranks[name] = bisect_right(most, allowed, key=lambda r, shape=shape: layer_bytes(shape, r, 0)) - 1  # type: ignore[misc]
    if share < 1:
        return ranks
    left = budget - sum(layer_bytes(shapes[name], rank, 0) for name, rank in ranks.items())
    for name, shape in shapes.items():
        while (
            0 < (more := layer_bytes(shape, ranks[name] + 1, 0) - layer_bytes(shape, ranks[name], 0)) <= left
        ):
            ranks[name], left = ranks[name] + 1, left - more
    return ranks


@dataclass(frozen=True)
class Phases:
    """Steps of the schedule: of all, of the first phase, of the last, and between thresholds."""

    steps: int
    warmup: int
    final: int
    every: int

    @staticmethod
    def of(method: Losparse, steps: int) -> "Phases":
        """Shares of the steps, rounded down; at least one step is left in between."""
        warmup, final = int(method.prune_warmup * steps), int(method.prune_final * steps)
        return Phases(steps, warmup, min(final, steps - warmup - 1), method.prune_every)

    def fixes(self, step: int) -> bool:
        """Whether the rows are those of the end from this step on."""
        return step >= self.steps - self.final

    def thresholds(self, step: int) -> bool:
        """Whether there is a new threshold after this step: every few, and where the last phase begins."""
        if self.fixes(step):
            return step == self.steps - self.final
        return step > self.warmup and step % self.every == 0


class Pruning:
    """One threshold for the rows of all layers, which rises until those kept take the bytes left for them."""

    def __init__(self, layers: Mapping[str, LowRankPlusSparse], budget: int, method: Losparse) -> None:
        """budget: bytes of all layers. Raises: BudgetError if they hold nothing at all."""
        self.layers, self.method = layers, method
        low_rank = sum(layer_bytes(layer.shape, layer.rank, 0) for layer in layers.values())
        self.left = budget - low_rank
        self.all = sum(int(layer.rows_cost.sum()) for layer in layers.values())
        self.is_sparse = any(layer.S is not None for layer in layers.values())
        least = min(int(layer.rows_cost[0]) for layer in layers.values())
        if not any(layer.rank for layer in layers.values()) and (not self.is_sparse or self.left < least):
            raise BudgetError(
                f"{budget:,} bytes hold neither a rank nor a row of any layer; ask for a lower ratio"
            )

    @property
    def last_fraction(self) -> float:
        """p_f: of the bytes that all rows take, those that are left for them."""
        return min(self.left / self.all, 1.0) if self.all else 1.0

    def before_step(self) -> None:
        """Gradients are there; the optimizer has not used them yet."""
        for layer in self.layers.values():
            layer.observe(self.method.importance)

    def after_step(self, step: int, phases: Phases) -> None:
        """step: how many the optimizer has taken. Rows that a threshold prunes are set to zero and then
        trained on: what grows again counts at the next one. From the last phase on they stay zero."""
        if not self.is_sparse:
            return
        if step % phases.every == 0 or phases.thresholds(step):
            for layer in self.layers.values():
                layer.close_window((step - 1) % phases.every + 1, self.method.smoothing)
        if phases.thresholds(step):
            self.choose(step, phases)
        if phases.thresholds(step) or phases.fixes(step):
            for layer in self.layers.values():
                layer.zero_pruned()

    def choose(self, step: int, phases: Phases) -> None:
        fraction = kept_fraction(
            step, phases.steps, warmup=phases.warmup, final=phases.final, last=self.last_fraction
        )
        allowed = self.left if phases.fixes(step) else fraction * self.all
        layers = list(self.layers.values())
        kept, _ = most_important(
            [layer.importance for layer in layers], [x.rows_cost for x in layers], allowed
        )
        for layer, rows in zip(layers, kept, strict=True):
            layer.kept.copy_(rows)


def decomposed(slot: WeightSlot, rank: int, *, sparse: bool) -> LowRankPlusSparse:
    """A linear layer as U V + S, which gives what it gives where S is there."""
    bias_O = slot.bias
    return LowRankPlusSparse(slot.read().cpu(), None if bias_O is None else bias_O.cpu(), rank, sparse=sparse)


def stored(name: str, layer: LowRankPlusSparse, dtype: torch.dtype, *, transposed: bool) -> Fitted:
    """A trained layer as it is stored: its kept rows as they are, low rank on the others.

    Raises: NumericsError for values that are not finite in `dtype`.
    """
    W_OI, shape = layer.dense(), layer.shape
    if not bool(torch.isfinite(W_OI.to(dtype)).all()):
        raise NumericsError(f"{name} is not finite in {dtype} after training; lower --learning-rate")
    kept = layer.kept.cpu()
    bias = None if layer.bias is None else layer.bias.detach().cpu()
    rows = int(kept.sum())
    if layer_bytes(shape, layer.rank, rows) >= shape.dense_bytes:
        weight = W_OI.to(dtype)
        tensors = {"weight": (weight.T if transposed else weight).contiguous()}
        tensors |= {} if bias is None else {"bias": bias.to(dtype)}
        return Fitted(Choice(shape.dense_bytes), 0.0, 0.0, Status(State.TRAINED), tensors=tensors)
    given: dict[str, Tensor] = {} if bias is None else {"bias": bias}
    if rows:
        given |= {"rows": kept.nonzero()[:, 0], "row_values": W_OI[kept]}
    low_rank = LowRank.of(*_full_rank_factors(W_OI[~kept], layer.rank))
    packed, tensors = assemble(shape, [low_rank], given, dtype)
    packed = replace(packed, transposed=transposed)
    nbytes = int(packed.nbytes(shape))
    parameters: dict[str, Any] = {"rank": float(low_rank[0].rank), "rows": float(rows)}
    held_OI = packed.dense(tensors, packed.load(tensors, shape), shape).double()
    energy = W_OI.square().sum()
    error = float((held_OI - W_OI).square().sum() / energy) if energy > 0 else 0.0
    return Fitted(
        Choice(nbytes, 0.0, parameters), error, 0.0, Status(State.TRAINED), (), packed.to_dict(), tensors
    )


def _full_rank_factors(L_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """L of rank `rank` at most as factors of full rank, fewer columns where training has left fewer."""
    U_OR, values_R, V_RI = torch.linalg.svd(L_OI, full_matrices=False)
    # A thousandfold of what rounding leaves of a direction that is not there.
    least = 1e3 * torch.finfo(torch.float64).eps * max(L_OI.shape) * values_R.max() if rank else 0.0
    found = min(rank, int((values_R > least).sum()))
    factors = U_OR[:, :found], values_R[:found, None] * V_RI[:found]
    left_OR, right_RI = (part.clone(memory_format=torch.contiguous_format) for part in factors)
    return left_OR, right_RI
