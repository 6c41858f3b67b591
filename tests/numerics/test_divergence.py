"""Divergence of two models' outputs against its definition in float64."""

import pytest
import torch
from torch import Tensor

from lrsd.numerics import divergence
from lrsd.numerics.divergence import mean_divergence


@pytest.mark.parametrize("values", [1, 1000, 10**9])
@pytest.mark.parametrize("categorical", [True, False])
@pytest.mark.parametrize("classes", [1, 300])
def test_rows_are_compared_in_pieces(
    values: int,
    categorical: bool,
    classes: int,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(divergence, "DISTANCE_VALUES", values)
    reference, found = (torch.randn(50, classes, generator=generator) for _ in range(2))
    expected = kl(reference, found) if categorical else half_squared_error(reference, found)
    assert mean_divergence(reference, found, categorical=categorical) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("categorical", [True, False])
def test_equal_outputs_do_not_diverge_and_zeros_are_no_division_by_zero(categorical: bool) -> None:
    rows = torch.cat([torch.randn(3, 7, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 7)])
    assert mean_divergence(rows, rows, categorical=categorical) == 0


def test_a_shift_of_all_logits_is_no_divergence(generator: torch.Generator) -> None:
    logits = torch.randn(5, 9, generator=generator)
    assert mean_divergence(logits, logits + 3, categorical=True) < 1e-6
    assert mean_divergence(logits, logits + 3, categorical=False) > 1


def kl(reference: Tensor, found: Tensor) -> float:
    first, second = reference.double().softmax(-1), found.double().softmax(-1)
    return float((first * (first / second).log()).sum(-1).mean())


def half_squared_error(reference: Tensor, found: Tensor) -> float:
    reference, found = reference.double(), found.double()
    return float(((found - reference).norm(dim=1) / reference.norm(dim=1)).square().mean()) / 2
