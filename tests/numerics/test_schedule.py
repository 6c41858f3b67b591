"""Pruning while training: the cubic schedule, importance and its average, one threshold for all layers."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrsd.numerics.schedule import kept_fraction, most_important, row_importance, row_magnitude, smoothed


@given(
    steps=st.integers(1, 300),
    data=st.data(),
    last=st.floats(0, 1),
)
def test_the_kept_fraction_falls_from_first_to_last(steps: int, data: st.DataObject, last: float) -> None:
    """All of it before t_i, p_f over the last t_f steps, and never more than before in between."""
    warmup = data.draw(st.integers(0, steps - 1))
    final = data.draw(st.integers(0, steps - warmup - 1))
    kept = [kept_fraction(t, steps, warmup=warmup, final=final, last=last) for t in range(steps + 1)]
    assert kept[: warmup + 1] == [1.0] * (warmup + 1)
    assert kept[steps - final :] == [last] * (final + 1)
    assert all(after <= before + 1e-12 for before, after in pairwise(kept))
    assert all(last - 1e-12 <= fraction <= 1 for fraction in kept)


def test_in_between_it_is_the_papers_cubic() -> None:
    """p_f + (p_i - p_f) (1 - (t - t_i) / (T - t_i - t_f))^3: halfway an eighth of the difference is left."""
    found = kept_fraction(50, 100, warmup=20, final=20, first=0.9, last=0.1)
    assert found == pytest.approx(0.1 + 0.8 / 8)
    assert kept_fraction(35, 100, warmup=20, final=20, first=0.9, last=0.1) == pytest.approx(
        0.1 + 0.8 * 0.75**3
    )


@pytest.mark.parametrize(("warmup", "final"), [(5, 5), (10, 0), (-1, 2), (0, 11)])
def test_phases_that_leave_nothing_are_refused(warmup: int, final: int) -> None:
    with pytest.raises(ValueError, match="in between"):
        kept_fraction(1, 10, warmup=warmup, final=final)


def test_importance_is_what_a_row_is_worth_to_the_loss() -> None:
    """By hand: the mean of |S dl/dS| over each row, signs and zeros included."""
    S_OI = torch.tensor([[1.0, -2.0], [0.0, 3.0], [0.0, 0.0]])
    gradient_OI = torch.tensor([[0.5, 0.25], [9.0, -1.0], [7.0, 7.0]])
    assert row_importance(S_OI, gradient_OI).tolist() == [0.5, 1.5, 0.0]
    assert row_magnitude(S_OI).tolist() == [1.5, 1.5, 0.0]


def test_the_average_is_the_papers() -> None:
    """Three windows by hand: 0.15, then 0.85 of that and 0.15 of the next."""
    average_O = torch.zeros(2)
    for window in ([1.0, 0.0], [2.0, 4.0], [0.0, 2.0]):
        average_O = smoothed(average_O, torch.tensor(window), 0.85)
    first = 0.85 * (0.85 * 0.15 * 1 + 0.15 * 2)
    second = 0.85 * 0.15 * 4 + 0.15 * 2
    assert average_O.tolist() == pytest.approx([first, second])


def test_one_threshold_for_layers_of_different_size() -> None:
    """Rows of both compete: what is kept is at least as important as all that is not, in whatever layer."""
    small, large = torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.8, 0.2, 0.95, 0.3])
    costs = [torch.full((2,), 30), torch.full((5,), 10)]
    kept, threshold = most_important([small, large], costs, 30 + 10 + 10)
    assert [rows.tolist() for rows in kept] == [[True, False], [False, True, False, True, False]]
    assert threshold == pytest.approx(0.8)


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    seed=st.integers(0, 2**20),
    share=st.floats(0, 1.2),
)
def test_kept_rows_fill_their_bytes_to_within_one_row(sizes: list[int], seed: int, share: float) -> None:
    """And are those above the threshold; the n-th row of a layer costs what the layer says of its n-th."""
    generator = torch.Generator().manual_seed(seed)
    importances = [torch.rand(size, generator=generator) for size in sizes]
    costs = [torch.randint(1, 9, (size,), generator=generator) for size in sizes]
    allowed = share * float(sum(cost.sum() for cost in costs))
    kept, threshold = most_important(importances, costs, allowed)
    taken = sum(int(cost[: int(rows.sum())].sum()) for cost, rows in zip(costs, kept, strict=True))
    assert taken <= allowed
    for rows, importance in zip(kept, importances, strict=True):
        assert torch.equal(rows, importance.double() >= threshold)
    if not all(bool(rows.all()) for rows in kept):
        best = [
            float(i[~k].max()) if not bool(k.all()) else -1 for i, k in zip(importances, kept, strict=True)
        ]
        layer = best.index(max(best))
        assert taken + int(costs[layer][int(kept[layer].sum())]) > allowed


def test_equals_are_taken_in_order_and_none_where_none_fits() -> None:
    equal = [torch.ones(3), torch.ones(2)]
    kept, _ = most_important(equal, [torch.full((3,), 4), torch.full((2,), 4)], 15.9)
    assert [rows.tolist() for rows in kept] == [[True, True, True], [False, False]]
    kept, threshold = most_important(equal, [torch.full((3,), 4), torch.full((2,), 4)], 3)
    assert not any(bool(rows.any()) for rows in kept)
    assert threshold == float("inf")
