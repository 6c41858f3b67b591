"""SSD by its own definitions, against what they say by hand."""

from functools import partial

import pytest
import torch
from layers import DEGENERATE, KINDS, planted_layer, random_layer
from torch import Tensor

from lrsd.numerics.metric import Metric
from lrsd.numerics.thresholded import Entries, Singular, decompose_ssd, large_entries


def count(groups: Tensor, entries: Tensor) -> Tensor:
    return 10 * groups + 2 * entries


@pytest.mark.parametrize("energy", [0.0, 0.3, 0.9, 0.99, 1.0])
def test_the_rank_is_the_least_that_holds_the_energy(energy: float, generator: torch.Generator) -> None:
    W_OI = torch.randn(12, 20, generator=generator)
    singular = Singular.of(W_OI)
    held = [float((W_OI - W_OI).square().sum())]
    for rank in range(1, 13):
        U_OR, V_RI = singular.factors(rank)
        held.append(float((U_OR @ V_RI).square().sum() / W_OI.square().sum()))
    rank = singular.rank_at(energy)
    assert held[rank] >= energy - 1e-6
    assert rank == 0 or held[rank - 1] < energy
    assert Singular.of(torch.zeros(4, 6)).rank_at(energy) == (energy > 0)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (4, 4)])
@pytest.mark.parametrize("rank", [1, 3])
def test_factors_have_full_rank_whatever_the_matrix(shape: tuple[int, int], rank: int) -> None:
    for W_OI in (torch.zeros(shape), torch.ones(shape)):
        U_OR, V_RI = Singular.of(W_OI).factors(rank)
        torch.testing.assert_close(U_OR.T @ U_OR, torch.eye(rank), rtol=0, atol=1e-5)
        torch.testing.assert_close(U_OR @ V_RI, W_OI, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("limit", [-1.0, 0.0, 99.0, 400.0, 1e9])
def test_the_channels_of_largest_norm_that_fit_keep_what_is_above_their_mean(
    rows: bool, limit: float, generator: torch.Generator
) -> None:
    R_OI = torch.randn(15, 24, generator=generator) * torch.rand(24, generator=generator)
    found = large_entries(R_OI, count, limit, rows=rows, thresholds=True)
    channels = R_OI if rows else R_OI.T
    mask = found.mask_OI if rows else found.mask_OI.T
    order = sorted(range(len(channels)), key=lambda g: -float(channels[g].square().sum()))
    above = {g: channels[g].abs() > channels[g].abs().mean() for g in order}
    bytes_of = [10 * n + 2 * sum(int(above[g].sum()) for g in order[:n]) for n in range(len(order) + 1)]
    fitting = max((n for n, taken in enumerate(bytes_of) if taken <= limit), default=0)
    assert found.groups.tolist() == sorted(order[:fitting])
    for g in order:
        expected = above[g] if g in order[:fitting] else torch.zeros_like(above[g])
        assert torch.equal(mask[g], expected)


def test_without_a_threshold_channels_are_whole(generator: torch.Generator) -> None:
    found = large_entries(torch.randn(6, 8, generator=generator), count, 70.0, rows=False, thresholds=False)
    assert len(found.groups) == 3
    assert int(found.mask_OI.sum()) == 18


def fitted(
    W_OI: Tensor, metric: Metric, rank: int, iterations: int, limit: float = 60.0
) -> tuple[float, tuple[float, ...]]:
    def select(residual_OI: Tensor, rank: int) -> Entries:
        return large_entries(residual_OI, count, limit, rows=False, thresholds=True)

    found = decompose_ssd(
        W_OI, metric, rank=lambda entries: rank, select=select, low_rank=torch.matmul, iterations=iterations
    )
    L_OI = found.U_OR @ found.V_RI
    lost_OI = W_OI.float() - L_OI - found.values_OI
    total = metric.energy(W_OI)
    expected = metric.energy(lost_OI) / total if total else 0.0
    assert found.error == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert found.error == min(found.history)
    assert not found.values_OI[~found.entries.mask_OI].any()
    return found.error, found.history


@pytest.mark.parametrize("kind", KINDS + DEGENERATE)
@pytest.mark.parametrize("rank", [0, 3])
def test_the_best_round_is_returned(kind: str, rank: int, generator: torch.Generator) -> None:
    layer = random_layer(generator, 14, 16, kind)
    fitted(layer.W_OI, Metric(layer.gram), rank, 5)


def test_rounds_lower_the_error_and_end_where_they_stand_still(generator: torch.Generator) -> None:
    for _ in range(5):
        layer = planted_layer(generator, 30, 4)
        metric = Metric(torch.eye(layer.gram.shape[0], dtype=torch.float64))
        once, often = (fitted(layer.W_OI, metric, 4, n, 300.0) for n in (1, 60))
        assert often[1][0] == once[0]
        assert often[0] < 0.99 * once[0]
        assert len(often[1]) < 60
        assert abs(often[1][-1] - often[1][-2]) <= 1e-3 * often[1][-1]


def test_codes_take_what_low_rank_and_entries_leave(generator: torch.Generator) -> None:
    layer = random_layer(generator, 14, 16, "plain")
    seen: list[Tensor] = []

    def quantize(residual_OI: Tensor) -> tuple[object, Tensor]:
        seen.append(residual_OI)
        return len(seen), residual_OI.sign() * residual_OI.abs().mean()

    select = partial(large_entries, nbytes=count, limit=60.0, rows=False, thresholds=True)
    found = decompose_ssd(
        layer.W_OI, Metric(layer.gram), rank=lambda entries: 2, low_rank=torch.matmul, quantize=quantize,
        select=lambda residual_OI, rank: select(residual_OI), iterations=3,
    )  # fmt: skip
    assert isinstance(found.codes, int)
    residual_OI = seen[found.codes - 1]
    left_OI = layer.W_OI.float() - found.U_OR @ found.V_RI - found.values_OI
    torch.testing.assert_close(left_OI, residual_OI, rtol=1e-4, atol=1e-5)
