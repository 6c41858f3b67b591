"""Bytes: counted as stored, shared within the budget, spent where they pay."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrsd.errors import BudgetError
from lrsd.forms.base import Shape
from lrsd.forms.packed import Layer, PackedLinear
from lrsd.numerics.allocate import (
    LayerCurve,
    LayerPlan,
    Plan,
    Support,
    allocate_by_weight,
    allocate_energy,
    allocate_uniform,
    dense_bytes,
    plan_bytes,
)

RATIOS = [1.1, 1.25, 1.6, 2.0, 4.0]
# The linears of a block of SmolLM2-135M.
BLOCK = {
    "q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576),
    "gate": (1536, 576), "up": (1536, 576), "down": (576, 1536),
}  # fmt: skip


def power_law(size: int, exponent: float, scale: float = 1.0) -> torch.Tensor:
    """Errors left of a spectrum that falls as i^-exponent, ranks 0..size."""
    energies = torch.arange(1, size + 1, dtype=torch.float64) ** -exponent
    tail = energies.flip(0).cumsum(0).flip(0) / energies.sum()
    return scale * torch.cat([tail, tail.new_zeros(1)])


@pytest.fixture
def curves(generator: torch.Generator) -> dict[str, LayerCurve]:
    """Four blocks of decaying spectra; v, o and down profit from kept columns."""
    found = {}
    for block in range(4):
        for name, shape in BLOCK.items():
            exponent = 0.5 + 1.5 * float(torch.rand((), generator=generator))
            supports = [Support(0, 0, power_law(min(shape), exponent))]
            if name in ("v", "o", "down"):
                for fraction in (1 / 16, 1 / 4):
                    columns = round(fraction * shape[1])
                    errors = power_law(min(shape[0], shape[1] - columns), exponent, 1 - fraction**0.5)
                    supports.append(Support(columns, 0, errors))
            found[f"{block}.{name}"] = LayerCurve(Shape(*shape), tuple(supports))
    return found


@pytest.fixture
def weights(curves: dict[str, LayerCurve], generator: torch.Generator) -> dict[str, float]:
    """Sensitivities over three orders of magnitude, as measured on real models."""
    return {name: float(torch.randn((), generator=generator).mul(1.5).exp()) for name in curves}


def loss(plan: Plan, weights: dict[str, float]) -> float:
    return sum(weights[name] * layer.error for name, layer in plan.items())


def every_plan(curves: dict[str, LayerCurve], weights: dict[str, float], budget: int) -> dict[str, Plan]:
    return {
        "uniform": allocate_uniform(curves, budget),
        "energy": allocate_energy(curves, budget),
        "weight": allocate_by_weight(curves, weights, budget),
        "floor": allocate_by_weight(curves, weights, budget, floor=0.3 * budget / dense_bytes(curves)),
    }


@pytest.mark.parametrize("ratio", RATIOS)
def test_plans_land_just_below_the_budget(
    curves: dict[str, LayerCurve], weights: dict[str, float], ratio: float
) -> None:
    budget = int(dense_bytes(curves) / ratio)
    for name, plan in every_plan(curves, weights, budget).items():
        assert plan.keys() == curves.keys()
        assert 0.999 * budget <= plan_bytes(plan, curves) <= budget, name


@pytest.mark.parametrize("ratio", RATIOS)
def test_weighted_plan_predicts_the_least_loss(
    curves: dict[str, LayerCurve], weights: dict[str, float], ratio: float
) -> None:
    plans = every_plan(curves, weights, int(dense_bytes(curves) / ratio))
    for other in plans.values():
        assert loss(plans["weight"], weights) <= loss(other, weights) * (1 + 1e-9)


def test_weighted_plan_cannot_be_improved_by_moving_bytes(
    curves: dict[str, LayerCurve], weights: dict[str, float]
) -> None:
    """Take bytes worth some ranks from one layer, give them to another: no pair gains noticeably."""
    plan = allocate_by_weight(curves, weights, dense_bytes(curves) // 2)
    best = loss(plan, weights)
    moved = 40_000  # about 2 % of the largest layer, several steps of any hull
    smaller = {n: c.best_within(plan[n].nbytes(c.shape) - moved) for n, c in curves.items()}
    larger = {n: c.best_within(plan[n].nbytes(c.shape) + moved) for n, c in curves.items()}
    for taken in (name for name, layer in smaller.items() if layer is not None):
        for given_to in curves.keys() - {taken}:
            exchanged = plan | {taken: smaller[taken], given_to: larger[given_to]}
            assert loss(exchanged, weights) >= 0.997 * best


def test_a_floor_leaves_no_layer_below_it(curves: dict[str, LayerCurve], weights: dict[str, float]) -> None:
    plan = allocate_by_weight(curves, weights, dense_bytes(curves) // 2, floor=0.3)
    shares = [layer.nbytes(curves[n].shape) / curves[n].shape.dense_bytes for n, layer in plan.items()]
    assert min(shares) >= 0.3


@pytest.mark.parametrize("ratio", RATIOS)
def test_one_energy_threshold_holds_for_every_layer(curves: dict[str, LayerCurve], ratio: float) -> None:
    """Layers have their cheapest offer within 1 - tau; only the last bytes buy a few of them more."""
    plan = allocate_energy(curves, int(dense_bytes(curves) / ratio))
    allowed = max(layer.error for layer in plan.values())
    cheapest = 0
    for name, layer in plan.items():
        shape = curves[name].shape
        sizes = sorted((offer.nbytes(shape), offer.error) for offer in curves[name].offers())
        fitting = next(i for i, (_, error) in enumerate(sizes) if error <= allowed)
        next_size = sizes[min(fitting + 1, len(sizes) - 1)][0]
        assert layer.nbytes(shape) >= sizes[fitting][0]
        cheapest += layer.nbytes(shape) <= next_size
    assert cheapest >= 0.85 * len(plan)


def test_uniform_plan_gives_every_layer_the_same_fraction(curves: dict[str, LayerCurve]) -> None:
    """Up to one rank; the ranks that land on the budget go where they gain most."""
    plan = allocate_uniform(curves, dense_bytes(curves) // 2)
    shares = torch.tensor(
        [layer.nbytes(curves[name].shape) / curves[name].shape.dense_bytes for name, layer in plan.items()]
    )
    assert shares.min() >= 0.49
    assert ((shares - 0.5).abs() <= 0.01).float().mean() >= 0.85


ALLOCATORS = {
    "uniform": allocate_uniform,
    "energy": allocate_energy,
    "weight": lambda curves, budget: allocate_by_weight(curves, dict.fromkeys(curves, 1.0), budget),
}


@pytest.mark.parametrize("allocate", ALLOCATORS.values(), ids=ALLOCATORS.keys())
def test_a_budget_below_every_offer_is_refused(curves: dict[str, LayerCurve], allocate) -> None:
    with pytest.raises(BudgetError, match="try a ratio below"):
        allocate(curves, dense_bytes(curves) // 1000)


@pytest.mark.parametrize("allocate", ALLOCATORS.values(), ids=ALLOCATORS.keys())
def test_the_ratio_that_a_refusal_names_is_reachable(curves: dict[str, LayerCurve], allocate) -> None:
    with pytest.raises(BudgetError) as refusal:
        allocate(curves, dense_bytes(curves) // 1000)
    reachable = float(str(refusal.value).rpartition("below ")[2].removesuffix("x"))
    budget = int(dense_bytes(curves) / (0.99 * reachable))
    assert plan_bytes(allocate(curves, budget), curves) <= budget


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.33, 0.5, 0.9, 0.999, 1.0])
def test_best_within_is_the_best_of_all_ranks_and_supports(
    curves: dict[str, LayerCurve], fraction: float
) -> None:
    for curve in curves.values():
        budget = fraction * curve.shape.dense_bytes
        offers = [
            curve.plan(support, rank)
            for support in curve.supports
            for rank in range(0 if support.columns else 1, support.errors_R.numel())
        ]
        fitting = [offer.error for offer in [*offers, curve.dense] if offer.nbytes(curve.shape) <= budget]
        best = curve.best_within(budget)
        assert (best.error if best else None) == min(fitting, default=None)


def stored(shape: Shape, plan: LayerPlan) -> int:
    assert plan.rank is not None
    layout = Layer(
        rank=plan.rank, columns=plan.columns, rows=plan.rows, entries=plan.entries,
        pivoted=plan.pivoted, bias=plan.bias,
    )  # fmt: skip
    packed = PackedLinear(shape, layout, torch.bfloat16)
    return sum(parameter.nbytes for parameter in packed.parameters())


@st.composite
def shaped_plans(draw: st.DrawFn) -> tuple[Shape, LayerPlan]:
    """Any point of the family that fits a small shape."""
    out_features, in_features = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    kind = draw(st.sampled_from(["low rank", "columns", "rows", "thresholded", "unstructured"]))
    columns = rows = 0
    entries = None
    if kind == "columns":
        columns = draw(st.integers(0, in_features - 1))
    elif kind == "rows":
        rows = draw(st.integers(0, out_features - 1))
    elif kind != "low rank":
        columns = in_features if kind == "unstructured" else draw(st.integers(1, in_features))
        entries = draw(st.integers(0, columns * out_features))
    beside = 0 if entries is not None else columns
    rank = draw(st.integers(0, min(out_features - rows, in_features - beside)))
    flags = {"pivoted": draw(st.booleans()), "bias": draw(st.booleans())}
    return Shape(out_features, in_features), LayerPlan(rank, columns, rows, entries, **flags)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(shaped_plans())
def test_planned_bytes_are_those_of_the_packed_tensors(shaped: tuple[Shape, LayerPlan]) -> None:
    shape, plan = shaped
    assert stored(shape, plan) == plan.nbytes(shape)


@pytest.mark.parametrize("size", [2**15 - 1, 2**15, 2**15 + 1, 40_000])
def test_indices_are_counted_in_the_width_that_holds_them(size: int) -> None:
    for shape, plan in (
        (Shape(2, size), LayerPlan(1, columns=3)),
        (Shape(size, 2), LayerPlan(1, rows=3)),
        (Shape(size, 2), LayerPlan(2)),
    ):
        assert stored(shape, plan) == plan.nbytes(shape)
        layout = Layer(rank=plan.rank, columns=plan.columns, rows=plan.rows)
        for name, parameter in PackedLinear(shape, layout).named_parameters():
            if name in ("columns", "rows"):
                assert torch.iinfo(parameter.dtype).max >= size - 1
