"""Who gets how many bytes: menus and a budget in, one offer per layer out.

Knows bytes, errors and weights; nothing of ranks, columns or codes. A result is an index per layer into its
menu. All of it is linear in the number of layers, but for one sort.
"""

import heapq
from collections.abc import Mapping

import numpy as np

from lrsd.errors import BudgetError
from lrsd.numerics.menu import Menu

Allocation = dict[str, int]
# Halvings of a bisection: to less than any difference between two offers.
_HALVINGS = 50


def allocated_bytes(menus: Mapping[str, Menu], allocation: Mapping[str, int]) -> int:
    return sum(int(menus[name].nbytes_N[index]) for name, index in allocation.items())


def dense_bytes(menus: Mapping[str, Menu]) -> int:
    return sum(menu.dense_bytes for menu in menus.values())


def allocate_smallest(menus: Mapping[str, Menu], budget: int) -> Allocation:
    """The smallest offer of every layer, where there is nothing to choose. Raises: BudgetError."""
    smallest = dict.fromkeys(menus, 0)
    if allocated_bytes(menus, smallest) > budget:
        raise unreachable(menus, budget)
    return smallest


def allocate_uniform(menus: Mapping[str, Menu], budget: int) -> Allocation:
    """Every layer the same fraction of its dense bytes, spent on its own best offer.

    Raises: BudgetError if even the smallest offers exceed the budget.
    """

    def at(fraction: float) -> Allocation:
        return {name: menu.within(fraction * menu.dense_bytes) or 0 for name, menu in menus.items()}

    # Less than the plain fraction only where some layer's smallest offer exceeds its share.
    found = at(budget / dense_bytes(menus))
    if allocated_bytes(menus, found) > budget:
        low, high = 0.0, budget / dense_bytes(menus)
        found = allocate_smallest(menus, budget)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            tried = at(middle)
            if allocated_bytes(menus, tried) <= budget:
                low, found = middle, tried
            else:
                high = middle
    return fill(found, menus, budget, dict.fromkeys(menus, 1.0))


def allocate_energy(menus: Mapping[str, Menu], budget: int) -> Allocation:
    """One threshold on cumulative output energy for all layers, bisected until the budget is met.

    Every layer gets the smallest offer of relative error <= 1 - tau. Energies are of the outputs on
    calibration text, so that tau is one minus the calibration output error itself.

    Source: the rank rule of SSD (ACL 2025), with the metric G in place of plain spectral energy.
    """
    rising = {name: -menu.errors_N.numpy() for name, menu in menus.items()}

    def at(tau: float) -> Allocation:
        return {name: int(np.searchsorted(values, tau - 1)) for name, values in rising.items()}

    low, high = 0.0, 1.0
    found = at(low)
    if allocated_bytes(menus, found) > budget:
        found = allocate_smallest(menus, budget)
    for _ in range(_HALVINGS):
        tau = (low + high) / 2
        tried = at(tau)
        if allocated_bytes(menus, tried) <= budget:
            low, found = tau, tried
        else:
            high = tau
    return fill(found, menus, budget, dict.fromkeys(menus, 1.0))


def allocate_by_weight(
    menus: Mapping[str, Menu], weights: Mapping[str, float], budget: int, floor: float = 0.0
) -> Allocation:
    """Minimise sum_i weight_i error_i under the byte budget, on the lower convex hulls (Lagrange).

    Args: weights: loss per unit of relative error; floor: least fraction of a layer's dense bytes,
        unless it is exact with less.
    Raises: BudgetError if even the cheapest offers exceed the budget.
    """
    names = list(menus)
    hulls = []
    for menu in menus.values():
        exact = int((menu.errors_N > 0).sum())  # the first offer without an error
        first = min(exact, int(np.searchsorted(menu.nbytes_N.numpy(), floor * menu.dense_bytes)))
        hull = menu.hull(first)
        errors = menu.errors_N.numpy()[hull]
        # Exact already, it would be no better dense.
        hulls.append(hull[:-1] if len(hull) > 1 and errors[-2] == errors[-1] else hull)
    found = {name: int(hull[0]) for name, hull in zip(names, hulls, strict=True)}
    spent = allocated_bytes(menus, found)
    if spent > budget:
        raise unreachable(menus, budget)
    gains, costs = [], []
    for (name, menu), hull in zip(menus.items(), hulls, strict=True):
        cost = np.diff(menu.nbytes_N.numpy()[hull])
        gains.append(-weights[name] * np.diff(menu.errors_N.numpy()[hull]) / cost)
        costs.append(cost)
    layer = np.repeat(np.arange(len(names)), [len(gain) for gain in gains])
    before = np.concatenate([hull[:-1] for hull in hulls])
    after = np.concatenate([hull[1:] for hull in hulls])
    order = np.argsort(-np.concatenate(gains), kind="stable")
    steps = (array[order].tolist() for array in (layer, before, after, np.concatenate(costs)))
    for index, here, there, cost in zip(*steps, strict=True):
        if spent + cost <= budget and found[names[index]] == here:
            found[names[index]] = there
            spent += cost
    return fill(found, menus, budget, weights)


def fill(
    allocation: Mapping[str, int], menus: Mapping[str, Menu], budget: int, weights: Mapping[str, float]
) -> Allocation:
    """Land on the budget: the smallest steps up where they gain most per byte, until none fits."""
    filled = dict(allocation)
    spare = budget - allocated_bytes(menus, filled)
    heap: list[tuple[float, str, int, int]] = []

    def offer(name: str) -> None:
        menu, index = menus[name], filled[name]
        if index + 1 == len(menu) or menu.errors_N[index] == 0:
            return
        cost = int(menu.nbytes_N[index + 1] - menu.nbytes_N[index])
        if cost <= spare:
            gain = weights[name] * float(menu.errors_N[index] - menu.errors_N[index + 1]) / cost
            heapq.heappush(heap, (-gain, name, index + 1, cost))

    for name in filled:
        offer(name)
    while heap:
        _, name, index, cost = heapq.heappop(heap)
        if cost <= spare:
            filled[name] = index
            spare -= cost
            offer(name)
    return filled


def unreachable(menus: Mapping[str, Menu], budget: int) -> BudgetError:
    """No offers are small enough."""
    smallest, total = allocated_bytes(menus, dict.fromkeys(menus, 0)), dense_bytes(menus)
    return BudgetError(
        f"ratio {total / budget:.4g}x leaves {budget:,} bytes for the linear weights, but the smallest form "
        f"of every layer already takes {smallest:,}; try a ratio below {total / smallest:.3g}x"
    )
