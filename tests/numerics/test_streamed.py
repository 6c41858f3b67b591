"""The solvers on G as it really comes: float32 partial sums, so that a singular G is slightly indefinite."""

import pytest
import torch
from layers import RandomLayer, random_layer
from torch import Tensor

from lrsd.numerics.lowrank import spectrum_errors
from lrsd.numerics.moments import Moments
from lrsd.numerics.solver import decompose, propagated_target

# What makes G singular: fewer tokens than channels, or a LayerNorm, whose output has no mean.
CAUSES = ("few tokens", "few tokens, wide scales", "layer norm")
every_cause = pytest.mark.parametrize("cause", CAUSES)


def streamed_layer(
    generator: torch.Generator, shape: tuple[int, int], cause: str
) -> tuple[RandomLayer, Tensor]:
    """A layer and its G out of `Moments`."""
    layer = random_layer(generator, *shape, "plain" if cause == "layer norm" else "singular")
    x_TI = 100 * layer.x_TI
    if cause == "layer norm":
        x_TI -= x_TI.mean(1, keepdim=True)
    elif cause == "few tokens, wide scales":
        x_TI *= torch.logspace(-2, 2, shape[1], dtype=torch.float64)
    moments = Moments(shape[1])
    for part in x_TI.split(7):
        moments.update_(part)
    return RandomLayer(layer.W_OI, x_TI.float().double()), moments.gram


@every_cause
def test_low_rank_of_a_tall_weight(generator: torch.Generator, cause: str) -> None:
    layer, gram_II = streamed_layer(generator, (96, 64), cause)
    errors = spectrum_errors(layer.W_OI, gram_II)
    energies = torch.linalg.svdvals(layer.W_OI @ layer.x_TI.T) ** 2 / len(layer.x_TI)
    for rank in range(len(errors)):
        expected = float(energies[rank:].sum() / energies.sum())
        assert float(errors[rank] / errors[0]) == pytest.approx(expected, abs=1e-5)


@every_cause
@pytest.mark.parametrize("shape", [(48, 64), (96, 64)])
@pytest.mark.parametrize("columns", [48, 64])
def test_many_kept_columns(
    generator: torch.Generator, shape: tuple[int, int], columns: int, cause: str
) -> None:
    """More of them than tokens, or all: the kept block itself is singular."""
    layer, gram_II = streamed_layer(generator, shape, cause)
    found = decompose(layer.W_OI, gram_II, rank=0, columns=columns)
    alone = decompose(layer.W_OI, layer.gram, rank=0, columns=8)
    assert layer.error(found.dense()) <= layer.error(alone.dense())


@every_cause
def test_propagated_target(generator: torch.Generator, cause: str) -> None:
    layer, gram_II = streamed_layer(generator, (48, 64), cause)
    t_TO = layer.x_TI @ layer.W_OI.T
    target_OI, _ = propagated_target(torch.zeros_like(layer.W_OI), gram_II, t_TO.T @ layer.x_TI / len(t_TO))
    assert layer.error(target_OI) < 1e-2
