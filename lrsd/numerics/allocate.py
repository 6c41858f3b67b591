"""Who gets how many bytes: error curves and a budget in, a plan out. The only place that counts bytes.

Bytes are those of 16-bit values, integer codes with their steps or scales, indices and bit masks as
`model.linear` stores them; a weight left dense costs O x I values. Biases the model already had stand
on neither side of the ratio. What entropy-coded codes take is known only once a layer is rounded: until
then a plan holds the bytes predicted, and the fit steers towards their sum.
"""

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lrsd.errors import BudgetError

VALUE_BYTES = 2
# Points per error curve handed to the hull; single ranks are filled in afterwards.
_CURVE_POINTS = 64


@dataclass(frozen=True)
class Shape:
    """Output and input channels of one linear weight."""

    out_features: int
    in_features: int

    @property
    def dense_bytes(self) -> int:
        return VALUE_BYTES * self.out_features * self.in_features


@dataclass(frozen=True, slots=True)
class Codes:
    """The base tier of S: integer codes for every column that is not kept at 16 bit.

    bits: width of a code; None: entropy coded, on a lattice of `step` (see `quantize`). group: columns
    that share a scale and a zero, at a fixed width. nbytes: of codes, steps, scales and zeros together.
    """

    nbytes: int
    bits: int | None = None
    group: int = 0
    step: float = 0.0


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer's point of the family. rank None: the weight stays dense.

    entries: stored values of a thresholded S, counted over all kept columns; None: columns are whole.
    pivoted: factors on pivot rows, r(O + I - r) numbers, instead of r(O + I). codes: the columns beside
    the kept ones as integers, on top of L. error: the relative output error predicted for it.
    """

    rank: int | None
    columns: int = 0
    rows: int = 0
    entries: int | None = None
    pivoted: bool = True
    bias: bool = False
    error: float = 0.0
    codes: Codes | None = None

    @property
    def is_dense(self) -> bool:
        return self.rank is None

    def nbytes(self, shape: Shape) -> int:
        """Bytes stored for this layer; the packed tensors have exactly this size."""
        if self.rank is None:
            return shape.dense_bytes
        thresholded = self.entries is not None
        low_rank_out = shape.out_features - self.rows
        low_rank_in = shape.in_features - (0 if thresholded else self.columns)
        values = self.rank * (low_rank_out + low_rank_in - (self.rank if self.pivoted else 0))
        values += self.entries if self.entries is not None else self.columns * shape.out_features
        values += self.rows * shape.in_features + (shape.out_features if self.bias else 0)
        indices = index_bytes(shape.in_features) * (0 if self.every_column(shape) else self.columns)
        indices += index_bytes(shape.out_features) * (self.rows + (self.rank if self.pivoted else 0))
        mask = -(-self.columns * shape.out_features // 8) if thresholded else 0
        return VALUE_BYTES * values + indices + mask + (self.codes.nbytes if self.codes else 0)

    def every_column(self, shape: Shape) -> bool:
        """S spans all columns (unstructured S), so that no column index is stored."""
        return self.columns == shape.in_features


def grid_bytes(out_features: int, columns: int, bits: int, group: int) -> int:
    """Bytes of fixed-width codes for `columns` columns, their 16-bit scales and their zeros."""
    groups = out_features * -(-columns // group)
    return -(-out_features * columns * bits // 8) + VALUE_BYTES * groups + -(-groups * bits // 8)


def index_bytes(size: int) -> int:
    """Bytes of one index into `size` channels: int16 where it fits, else int32."""
    return 2 if size <= torch.iinfo(torch.int16).max + 1 else 4


@dataclass(frozen=True)
class Support:
    """A number of kept columns or rows, and the relative error at every rank beside them.

    errors_R: float64, non-increasing, from rank 0 to the highest possible one. kept: the columns or
    rows it was measured with, ascending.
    """

    columns: int
    rows: int
    errors_R: Tensor
    entries: int | None = None
    kept: Tensor | None = None


@dataclass(frozen=True)
class LayerCurve:
    """Everything one layer offers: its shape, one error curve per support size at 16 bit, and the
    points with integer codes."""

    shape: Shape
    supports: tuple[Support, ...]
    pivoted: bool = True
    bias: bool = False
    coded: tuple[LayerPlan, ...] = ()

    def plan(self, support: Support, rank: int) -> LayerPlan:
        return LayerPlan(
            rank, support.columns, support.rows, support.entries, self.pivoted, self.bias,
            float(support.errors_R[rank]),
        )  # fmt: skip

    @property
    def dense(self) -> LayerPlan:
        return LayerPlan(None, error=0.0)

    def support_of(self, plan: LayerPlan) -> Support | None:
        """The support a plan was made from; None for the dense weight and for codes."""
        if plan.rank is None or plan.codes is not None:
            return None
        return next(s for s in self.supports if (s.columns, s.rows) == (plan.columns, plan.rows))

    def offers(self) -> Iterator[LayerPlan]:
        """Points over supports and ranks, and the dense weight. At least rank 1 or a kept channel."""
        for support in self.supports:
            top = support.errors_R.numel() - 1
            lowest = 0 if support.columns or support.rows else 1
            for rank in range(lowest, top + 1, max(1, top // _CURVE_POINTS)):
                plan = self.plan(support, rank)
                if plan.nbytes(self.shape) < self.shape.dense_bytes:
                    yield plan
        yield from (plan for plan in self.coded if plan.nbytes(self.shape) < self.shape.dense_bytes)
        yield self.dense

    def best_within(self, budget: float) -> LayerPlan | None:
        """The offer of least error in at most `budget` bytes, to the single rank."""
        if budget >= self.shape.dense_bytes:
            return self.dense
        fitting = [plan for plan in self.coded if plan.nbytes(self.shape) <= budget]
        for support in self.supports:
            ranks = range(0 if support.columns or support.rows else 1, support.errors_R.numel())
            low, high = ranks.start - 1, ranks.stop - 1
            while low < high:  # bytes rise with the rank, so the largest fitting rank is bisected
                middle = (low + high + 1) // 2
                fits = self.plan(support, middle).nbytes(self.shape) <= budget
                low, high = (middle, high) if fits else (low, middle - 1)
            if low >= ranks.start:
                fitting.append(self.plan(support, low))
        return min(fitting, key=lambda plan: plan.error, default=None)

    def next_larger(self, plan: LayerPlan) -> LayerPlan | None:
        """One rank more beside the same support, or the next finer codes; the dense weight at the end."""
        if plan.rank is None:
            return None
        larger = self.dense
        if plan.codes is not None:
            size = plan.nbytes(self.shape)
            finer = [p for p in self.coded if p.nbytes(self.shape) > size and p.error < plan.error]
            larger = min(finer, key=lambda p: p.nbytes(self.shape), default=self.dense)
        elif (support := self.support_of(plan)) and plan.rank + 1 < support.errors_R.numel():
            larger = self.plan(support, plan.rank + 1)
        return larger if larger.nbytes(self.shape) < self.shape.dense_bytes else self.dense


Plan = dict[str, LayerPlan]


def plan_bytes(plan: Mapping[str, LayerPlan], curves: Mapping[str, LayerCurve]) -> int:
    return sum(layer.nbytes(curves[name].shape) for name, layer in plan.items())


def dense_bytes(curves: Mapping[str, LayerCurve]) -> int:
    return sum(curve.shape.dense_bytes for curve in curves.values())


def allocate_uniform(curves: Mapping[str, LayerCurve], budget: int) -> Plan:
    """Every layer the same fraction of its dense bytes, spent on its own best support and rank."""
    cheapest = {name: min(_sized(curve), key=lambda pair: pair[0])[1] for name, curve in curves.items()}

    def at(fraction: float) -> Plan:
        return {
            name: curve.best_within(fraction * curve.shape.dense_bytes) or cheapest[name]
            for name, curve in curves.items()
        }

    # Less than the plain fraction only where some layer's cheapest offer exceeds its share.
    low, high = 0.0, budget / dense_bytes(curves)
    plan = at(high)
    if plan_bytes(plan, curves) > budget:
        plan = at(low)
        if plan_bytes(plan, curves) > budget:
            raise _unreachable(curves, budget)
        for _ in range(30):  # to 1e-9 of the fraction, less than a byte of any layer
            middle = (low + high) / 2
            candidate = at(middle)
            low, high, plan = (
                (middle, high, candidate) if plan_bytes(candidate, curves) <= budget else (low, middle, plan)
            )
    return fill(plan, curves, budget, dict.fromkeys(curves, 1.0))


def allocate_energy(curves: Mapping[str, LayerCurve], budget: int) -> Plan:
    """One threshold on cumulative output energy for all layers, bisected until the budget is met.

    Every layer gets the cheapest offer of relative error <= 1 - tau. Energies are of the outputs on
    calibration text, so that tau is one minus the calibration output error itself.

    Source: the rank rule of SSD (ACL 2025), with the metric G in place of plain spectral energy.
    """
    offers = {name: sorted(_sized(curve), key=lambda pair: pair[0]) for name, curve in curves.items()}

    def at(tau: float) -> Plan:
        return {
            name: next(plan for _, plan in pairs if plan.error <= 1 - tau) for name, pairs in offers.items()
        }

    low, high = 0.0, 1.0
    plan = at(low)
    if plan_bytes(plan, curves) > budget:
        raise _unreachable(curves, budget)
    for _ in range(50):  # halves the interval to 1e-15, below any difference between two offers
        tau = (low + high) / 2
        candidate = at(tau)
        if plan_bytes(candidate, curves) <= budget:
            low, plan = tau, candidate
        else:
            high = tau
    return fill(plan, curves, budget, dict.fromkeys(curves, 1.0))


def allocate_by_weight(
    curves: Mapping[str, LayerCurve], weights: Mapping[str, float], budget: int, floor: float = 0.0
) -> Plan:
    """Minimise sum_i weight_i error_i under the byte budget, on the lower convex hulls (Lagrange).

    Args: weights: loss per unit of relative error; floor: least fraction of a layer's dense bytes.
    Raises: BudgetError if even the cheapest offers exceed the budget.
    """
    hulls = {
        name: _lower_hull([(b, p) for b, p in _sized(curve) if b >= floor * curve.shape.dense_bytes])
        for name, curve in curves.items()
    }
    position = dict.fromkeys(hulls, 0)
    spent = sum(hull[0][0] for hull in hulls.values())
    if spent > budget:
        raise _unreachable(curves, budget)
    steps = [
        (weights[name] * (hull[i - 1][1].error - hull[i][1].error) / (hull[i][0] - hull[i - 1][0]), name, i)
        for name, hull in hulls.items()
        for i in range(1, len(hull))
    ]
    for _, name, i in sorted(steps, key=lambda step: -step[0]):
        cost = hulls[name][i][0] - hulls[name][i - 1][0]
        if position[name] == i - 1 and spent + cost <= budget:
            position[name] = i
            spent += cost
    plan = {name: hulls[name][i][1] for name, i in position.items()}
    return fill(plan, curves, budget, weights)


def fill(
    plan: Mapping[str, LayerPlan],
    curves: Mapping[str, LayerCurve],
    budget: int,
    weights: Mapping[str, float],
) -> Plan:
    """Land on the budget: the smallest steps up where they gain most per byte, until none fits."""
    filled = dict(plan)
    spare = budget - plan_bytes(filled, curves)
    heap: list[tuple[float, str, int, LayerPlan]] = []

    def offer(name: str) -> None:
        layer, curve = filled[name], curves[name]
        larger = curve.next_larger(layer)
        if larger is None:
            return
        cost = larger.nbytes(curve.shape) - layer.nbytes(curve.shape)
        if 0 < cost <= spare:
            heapq.heappush(heap, (-weights[name] * (layer.error - larger.error) / cost, name, cost, larger))

    for name in filled:
        offer(name)
    while heap:
        _, name, cost, larger = heapq.heappop(heap)
        if cost <= spare:
            filled[name] = larger
            spare -= cost
            offer(name)
    return filled


def _sized(curve: LayerCurve) -> list[tuple[int, LayerPlan]]:
    return [(plan.nbytes(curve.shape), plan) for plan in curve.offers()]


def _lower_hull(points: Iterable[tuple[int, LayerPlan]]) -> list[tuple[int, LayerPlan]]:
    """The lower convex hull of (bytes, error), bytes rising and error falling."""
    hull: list[tuple[int, LayerPlan]] = []
    for size, plan in sorted(points, key=lambda point: (point[0], point[1].error)):
        if hull and plan.error >= hull[-1][1].error:
            continue
        while len(hull) >= 2:
            (b0, p0), (b1, p1) = hull[-2], hull[-1]
            if (p1.error - p0.error) * (size - b0) < (plan.error - p0.error) * (b1 - b0):
                break
            hull.pop()
        hull.append((size, plan))
    return hull


def _unreachable(curves: Mapping[str, LayerCurve], budget: int) -> BudgetError:
    smallest = sum(min(size for size, _ in _sized(curve)) for curve in curves.values())
    total = dense_bytes(curves)
    return BudgetError(
        f"ratio {total / budget:.4g}x leaves {budget:,} bytes for the linear weights, but the smallest form "
        f"of every layer already takes {smallest:,}; try a ratio below {total / smallest:.3g}x"
    )
