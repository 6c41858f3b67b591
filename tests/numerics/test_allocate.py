"""Bytes: shared within the budget, spent where they pay."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrsd.errors import BudgetError
from lrsd.forms.base import Shape
from lrsd.methods.low_rank_sparse import Support, menu_of
from lrsd.numerics.allocate import (
    Allocation,
    allocate_by_weight,
    allocate_energy,
    allocate_smallest,
    allocate_uniform,
    allocated_bytes,
    dense_bytes,
    fill,
)
from lrsd.numerics.menu import Menu

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
def supports(generator: torch.Generator) -> dict[str, tuple[Shape, list[Support]]]:
    """Four blocks of decaying spectra; v, o and down profit from kept columns."""
    found = {}
    for block in range(4):
        for name, shape in BLOCK.items():
            exponent = 0.5 + 1.5 * float(torch.rand((), generator=generator))
            measured = [Support(power_law(min(shape), exponent))]
            if name in ("v", "o", "down"):
                for fraction in (1 / 16, 1 / 4):
                    columns = round(fraction * shape[1])
                    errors = power_law(min(shape[0], shape[1] - columns), exponent, 1 - fraction**0.5)
                    measured.append(Support(errors, columns))
            found[f"{block}.{name}"] = Shape(*shape), measured
    return found


@pytest.fixture
def menus(supports: dict[str, tuple[Shape, list[Support]]]) -> dict[str, Menu]:
    return {name: menu_of(shape, measured) for name, (shape, measured) in supports.items()}


@pytest.fixture
def weights(menus: dict[str, Menu], generator: torch.Generator) -> dict[str, float]:
    """Sensitivities over three orders of magnitude, as measured on real models."""
    return {name: float(torch.randn((), generator=generator).mul(1.5).exp()) for name in menus}


def loss(allocation: Mapping[str, int], menus: dict[str, Menu], weights: dict[str, float]) -> float:
    return sum(weights[name] * float(menus[name].errors_N[index]) for name, index in allocation.items())


def shares(allocation: Mapping[str, int], menus: dict[str, Menu]) -> torch.Tensor:
    """Fractions of the layers' dense bytes."""
    return torch.tensor([
        int(menus[name].nbytes_N[index]) / menus[name].dense_bytes for name, index in allocation.items()
    ])  # fmt: skip


def every_allocation(menus: dict[str, Menu], weights: dict[str, float], budget: int) -> dict[str, Allocation]:
    return {
        "uniform": allocate_uniform(menus, budget),
        "energy": allocate_energy(menus, budget),
        "weight": allocate_by_weight(menus, weights, budget),
        "floor": allocate_by_weight(menus, weights, budget, floor=0.3 * budget / dense_bytes(menus)),
    }


@pytest.mark.parametrize("ratio", RATIOS)
def test_allocations_land_just_below_the_budget(
    menus: dict[str, Menu], weights: dict[str, float], ratio: float
) -> None:
    budget = int(dense_bytes(menus) / ratio)
    for name, allocation in every_allocation(menus, weights, budget).items():
        assert allocation.keys() == menus.keys()
        assert 0.999 * budget <= allocated_bytes(menus, allocation) <= budget, name


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_weighted_allocation_predicts_the_least_loss(
    menus: dict[str, Menu], weights: dict[str, float], ratio: float
) -> None:
    found = every_allocation(menus, weights, int(dense_bytes(menus) / ratio))
    for other in found.values():
        assert loss(found["weight"], menus, weights) <= loss(other, menus, weights) * (1 + 1e-9)


def test_the_weighted_allocation_cannot_be_improved_by_moving_bytes(
    menus: dict[str, Menu], weights: dict[str, float]
) -> None:
    """Take bytes worth some ranks from one layer, give them to another: no pair gains noticeably."""
    found = allocate_by_weight(menus, weights, dense_bytes(menus) // 2)
    best = loss(found, menus, weights)
    moved = 40_000  # about 2 % of the largest layer, several steps of any hull
    sizes = {name: int(menus[name].nbytes_N[index]) for name, index in found.items()}
    smaller = {name: menu.within(sizes[name] - moved) for name, menu in menus.items()}
    larger = {name: menu.within(sizes[name] + moved) for name, menu in menus.items()}
    tried = 0
    for taken in (name for name, index in smaller.items() if index is not None):
        for given_to in menus.keys() - {taken}:
            exchanged = found | {taken: smaller[taken], given_to: larger[given_to]}
            assert loss(exchanged, menus, weights) >= 0.997 * best
            tried += 1
    assert tried > 300


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**31), st.floats(1.05, 8))
def test_the_weighted_allocation_is_within_one_step_of_the_best_of_all(seed: int, ratio: float) -> None:
    """Four layers of at most eight offers each: all their combinations are tried.

    The Lagrangian optimum is exact at its own bytes; what it misses is less than one step of a hull, and the
    fill gives some of that back.
    """
    random = np.random.default_rng(seed)
    menus, weights = {}, {}
    for name in "abcd":
        count = int(random.integers(1, 8))
        menus[name] = Menu.of(1000, random.integers(1, 1000, count), random.random(count), {})
        weights[name] = float(np.exp(random.normal()))
    budget = max(int(dense_bytes(menus) / ratio), allocated_bytes(menus, allocate_smallest(menus, 10**9)))
    found = allocate_by_weight(menus, weights, budget)
    sizes, losses, steps = np.zeros(1), np.zeros(1), [0.0]
    for name, menu in menus.items():
        sizes = (sizes[:, None] + menu.nbytes_N.numpy()).ravel()
        losses = (losses[:, None] + weights[name] * menu.errors_N.numpy()).ravel()
        steps += (-weights[name] * menu.errors_N[menu.hull()].diff()).tolist()
    best = losses[sizes <= budget].min()
    assert allocated_bytes(menus, found) <= budget
    assert best - 1e-12 <= loss(found, menus, weights) <= best + max(steps) + 1e-12


def test_a_floor_leaves_no_layer_below_it(menus: dict[str, Menu], weights: dict[str, float]) -> None:
    found = allocate_by_weight(menus, weights, dense_bytes(menus) // 2, floor=0.3)
    assert shares(found, menus).min() >= 0.3
    assert shares(allocate_by_weight(menus, weights, dense_bytes(menus) // 2), menus).min() < 0.3


@pytest.mark.parametrize("ratio", RATIOS)
def test_one_energy_threshold_holds_for_every_layer(menus: dict[str, Menu], ratio: float) -> None:
    """Layers have their smallest offer within 1 - tau; only the last bytes buy a few of them more."""
    found = allocate_energy(menus, int(dense_bytes(menus) / ratio))
    allowed = max(float(menus[name].errors_N[index]) for name, index in found.items())
    smallest = 0
    for name, index in found.items():
        fitting = next(i for i, error in enumerate(menus[name].errors_N.tolist()) if error <= allowed)
        assert index >= fitting
        smallest += index <= fitting + 1
    assert smallest >= 0.85 * len(found)


def test_a_uniform_allocation_gives_every_layer_the_same_fraction(menus: dict[str, Menu]) -> None:
    """Up to one rank; the ranks that land on the budget go where they gain most."""
    found = shares(allocate_uniform(menus, dense_bytes(menus) // 2), menus)
    assert found.min() >= 0.49
    assert ((found - 0.5).abs() <= 0.01).float().mean() >= 0.85


ALLOCATORS: dict[str, Callable[[dict[str, Menu], int], Allocation]] = {
    "smallest": allocate_smallest,
    "uniform": allocate_uniform,
    "energy": allocate_energy,
    "weight": lambda menus, budget: allocate_by_weight(menus, dict.fromkeys(menus, 1.0), budget),
}
every_allocator = pytest.mark.parametrize("allocate", ALLOCATORS.values(), ids=ALLOCATORS.keys())


@every_allocator
def test_a_budget_below_every_offer_is_refused(menus: dict[str, Menu], allocate) -> None:
    with pytest.raises(BudgetError, match="try a ratio below"):
        allocate(menus, dense_bytes(menus) // 1000)


@every_allocator
def test_the_ratio_that_a_refusal_names_is_reachable(menus: dict[str, Menu], allocate) -> None:
    with pytest.raises(BudgetError) as refusal:
        allocate(menus, dense_bytes(menus) // 1000)
    reachable = float(str(refusal.value).rpartition("below ")[2].removesuffix("x"))
    budget = int(dense_bytes(menus) / (0.99 * reachable))
    assert allocated_bytes(menus, allocate(menus, budget)) <= budget


@every_allocator
def test_a_budget_for_everything_leaves_every_layer_dense(menus: dict[str, Menu], allocate) -> None:
    if allocate is not allocate_smallest:
        found = allocate(menus, dense_bytes(menus))
        assert all(menus[name].choice(index).is_dense for name, index in found.items())


def test_what_is_filled_up_leaves_no_step_that_fits(
    menus: dict[str, Menu], weights: dict[str, float]
) -> None:
    budget = dense_bytes(menus) // 2
    found = fill(dict.fromkeys(menus, 0), menus, budget, weights)
    spare = budget - allocated_bytes(menus, found)
    assert spare >= 0
    for name, index in found.items():
        if index + 1 < len(menus[name]):
            assert int(menus[name].nbytes_N[index + 1] - menus[name].nbytes_N[index]) > spare


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.33, 0.5, 0.9, 0.999, 1.0])
def test_what_a_menu_holds_within_bytes_is_the_best_of_all_ranks_and_supports(
    supports: dict[str, tuple[Shape, list[Support]]], menus: dict[str, Menu], fraction: float
) -> None:
    for name, (shape, measured) in supports.items():
        budget = fraction * shape.dense_bytes
        offers = [
            (int(support.layer(rank, pivoted=True, bias=False).nbytes(shape)), float(support.errors_R[rank]))
            for support in measured
            for rank in range(0 if support.columns else 1, support.errors_R.numel())
        ]
        fitting = [error for size, error in [*offers, (shape.dense_bytes, 0.0)] if size <= budget]
        index = menus[name].within(budget)
        assert (None if index is None else float(menus[name].errors_N[index])) == min(fitting, default=None)


offered = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 8)), max_size=24)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(offered)
def test_a_menu_is_what_no_other_offer_beats(offers: list[tuple[int, int]]) -> None:
    """Bytes rise, errors fall, the dense weight is last; each offer keeps its own parameters."""
    sizes, errors = [size for size, _ in offers], [error / 8 for _, error in offers]
    numbers = list(range(len(offers)))
    menu = Menu.of(50, sizes, errors, {"number": numbers})
    assert (menu.nbytes_N.diff() > 0).all()
    assert (menu.errors_N[:-1].diff() < 0).all()
    assert (menu.nbytes_N[-1], menu.errors_N[-1]) == (50, 0)
    assert menu.choice(len(menu) - 1).is_dense
    assert menu.choice(-1).is_dense
    chosen = [menu.choice(index) for index in range(len(menu) - 1)]
    for choice in chosen:
        number = choice.count("number")
        assert (choice.nbytes, choice.error) == (sizes[number], errors[number])
    for size, error in zip(sizes, errors, strict=True):
        index = menu.within(min(size, 50))
        assert index is not None
        assert float(menu.errors_N[index]) <= error


def test_a_layer_that_is_exact_in_few_bytes_is_not_stored_dense() -> None:
    """As is one of no weights, of silent inputs, or of exactly low rank."""
    exact = Menu.of(1000, [40, 60, 80], [0.5, 0.0, 0.0])
    assert exact.nbytes_N.tolist() == [40, 60, 1000]
    menus = {"exact": exact, "other": Menu.of(1000, [100, 500], [0.4, 0.2])}
    weights = {"exact": 1.0, "other": 1.0}
    for budget, expected in ((1999, {"exact": 1, "other": 2}), (600, {"exact": 1, "other": 1})):
        assert allocate_by_weight(menus, weights, budget) == expected
        assert allocate_energy(menus, budget) == expected
        # No floor either: what is exact needs no more bytes.
        assert allocate_by_weight(menus, weights, budget, floor=0.07) == expected
    assert fill({"exact": 0, "other": 0}, menus, 1999, weights) == {"exact": 1, "other": 2}


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(offered)
def test_the_hull_lies_below_every_offer(offers: list[tuple[int, int]]) -> None:
    menu = Menu.of(50, [size for size, _ in offers], [error / 8 for _, error in offers])
    hull = menu.hull()
    assert hull[0] == 0
    assert hull[-1] == len(menu) - 1
    sizes, errors = menu.nbytes_N.numpy(), menu.errors_N.numpy()
    assert (np.interp(sizes, sizes[hull], errors[hull]) <= errors + 1e-12).all()
    slopes = np.diff(errors[hull]) / np.diff(sizes[hull])
    assert (np.diff(slopes) > -1e-12).all()


def test_a_choice_has_the_channels_that_it_was_measured_with() -> None:
    shape = Shape(20, 30)
    errors = power_law(20, 1.0)
    columns, rows = torch.tensor([2, 5]), torch.tensor([1, 3, 4])
    menu = menu_of(shape, [
        Support(errors), Support(0.7 * errors, columns=2, kept=columns),
        Support(0.6 * errors[:18], rows=3, kept=rows),
    ])  # fmt: skip
    seen = set()
    for index in range(len(menu) - 1):
        choice = menu.choice(index)
        kept = (choice.count("columns"), choice.count("rows"))
        expected = {(0, 0): None, (2, 0): columns, (0, 3): rows}[kept]
        assert choice.kept is expected
        seen.add(kept)
    assert {(2, 0), (0, 3)} <= seen
