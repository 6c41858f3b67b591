"""Single entries: the asked number of them, refitted in the metric of the outputs."""

from itertools import pairwise

import pytest
import torch
from layers import KINDS, random_layer

from lrsd.numerics.metric import Metric
from lrsd.numerics.pruning import prune, prune_and_refit, refit_entries


@pytest.mark.parametrize("kind", KINDS)
def test_refitting_lowers_the_error_of_every_kind_of_layer(kind: str, generator: torch.Generator) -> None:
    layer = random_layer(generator, 20, 70, kind)
    metric = Metric(layer.gram, damps_by_channel=True)
    values_OI, mask_OI = prune(layer.W_OI, metric.factor, 700)
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
    values_OI, mask_OI = prune_and_refit(layer.W_OI, Metric(layer.gram), entries)
    assert int(mask_OI.sum()) == entries
    assert not values_OI[~mask_OI].any()
    if entries == 20 * 70:
        torch.testing.assert_close(values_OI, layer.W_OI.float(), rtol=1e-4, atol=1e-4)
