"""Single entries: the asked number of them, refitted in the metric of the outputs."""

from itertools import pairwise

import pytest
import torch
from layers import KINDS, random_layer

from lrsd.numerics.metric import Metric
from lrsd.numerics.pruning import largest, prune, refit_entries, sparse_blocks, sparse_entries, sparse_pairs


@pytest.mark.parametrize("kind", KINDS)
def test_refitting_lowers_the_error_of_every_kind_of_layer(kind: str, generator: torch.Generator) -> None:
    layer = random_layer(generator, 20, 70, kind)
    metric = Metric(layer.gram, damps_by_channel=True)
    values_OI, mask_OI = prune(layer.W_OI, metric.factor, largest(700, 70))
    errors = [layer.error(values_OI.double())]
    for sweeps in (1, 2, 4):
        found_OI = refit_entries(layer.W_OI, values_OI, mask_OI, layer.gram, sweeps)
        assert not found_OI[~mask_OI].any()
        errors.append(layer.error(found_OI.double()))
    assert all(after <= before * 1.0001 for before, after in pairwise(errors)), errors


def test_refitting_comes_to_the_least_squares_solution(generator: torch.Generator) -> None:
    layer = random_layer(generator, 1, 12, "plain")
    mask_OI = torch.zeros(1, 12, dtype=torch.bool)
    mask_OI[0, [1, 4, 5, 9]] = True
    kept = mask_OI[0]
    found_OI = refit_entries(layer.W_OI, torch.zeros(1, 12), mask_OI, layer.gram, sweeps=3000)
    right = (layer.gram @ layer.W_OI[0])[kept]
    expected = torch.linalg.solve(layer.gram[kept][:, kept], right)
    torch.testing.assert_close(found_OI[0, kept].double(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("entries", [0, 1, 333, 20 * 70])
def test_as_many_entries_as_were_asked_for(entries: int, generator: torch.Generator) -> None:
    layer = random_layer(generator, 20, 70, "plain")
    values_OI, mask_OI = sparse_entries(layer.W_OI, Metric(layer.gram), entries)
    assert int(mask_OI.sum()) == entries
    assert not values_OI[~mask_OI].any()
    if entries == 20 * 70:
        torch.testing.assert_close(values_OI, layer.W_OI.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_two_of_every_four_stay(kind: str, generator: torch.Generator) -> None:
    """And lose less than the two largest of every four, as they are."""
    layer = random_layer(generator, 20, 72, kind)
    values_OI, mask_OI = sparse_pairs(layer.W_OI, Metric(layer.gram))
    assert (mask_OI.view(20, 18, 4).sum(2) == 2).all()
    assert not values_OI[~mask_OI].any()
    fours_OQ4 = layer.W_OI.abs().view(20, 18, 4)
    largest_OQ4 = torch.zeros_like(fours_OQ4, dtype=torch.bool).scatter(2, fours_OQ4.topk(2).indices, True)
    assert layer.error(values_OI.double()) < layer.error(layer.W_OI * largest_OQ4.view(20, 72))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 25, 90])
def test_as_many_whole_blocks_as_were_asked_for(kind: str, count: int, generator: torch.Generator) -> None:
    layer = random_layer(generator, 20, 72, kind)
    values_OI, mask_OI = sparse_blocks(layer.W_OI, Metric(layer.gram), count, 4)
    kept_RC = mask_OI.view(5, 4, 18, 4).sum((1, 3))
    assert set(kept_RC.unique().tolist()) <= {0, 16}
    assert int((kept_RC > 0).sum()) == count
    assert not values_OI[~mask_OI].any()
    if count == 90:
        torch.testing.assert_close(values_OI, layer.W_OI.float(), rtol=1e-3, atol=1e-3)


def test_blocks_that_would_be_missed_most_stay(generator: torch.Generator) -> None:
    """On average over layers, less is lost than by random ones."""
    lost = [0.0, 0.0]
    for _ in range(10):
        layer = random_layer(generator, 16, 32, "plain")
        metric = Metric(layer.gram)
        lost[0] += layer.error(sparse_blocks(layer.W_OI, metric, 10, 4)[0].double())
        random_RC = torch.zeros(32, dtype=torch.bool)
        random_RC[torch.randperm(32, generator=generator)[:10]] = True
        mask_OI = random_RC.view(4, 8).repeat_interleave(4, 0).repeat_interleave(4, 1)
        values_OI = refit_entries(layer.W_OI, torch.zeros(16, 32), mask_OI, metric.damped, sweeps=10)
        lost[1] += layer.error(values_OI.double())
    assert lost[0] < 0.9 * lost[1]
