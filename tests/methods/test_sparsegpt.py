"""SparseGPT: what a dropped entry loses is made up for by those after it."""

import pytest
import torch
from layers import DEGENERATE, KINDS, RandomLayer, random_layer
from torch import Tensor

from lrsd.methods.base import LayerProblem
from lrsd.methods.sparsegpt import SparseGpt
from lrsd.numerics import pruning
from lrsd.numerics.metric import Metric

every_kind = pytest.mark.parametrize("kind", [*KINDS, *DEGENERATE])
BLOCKS = [1, 7, 128]
every_block = pytest.mark.parametrize("block", BLOCKS)


def pruned(W_OI: Tensor, metric: Metric, entries: int, block: int) -> tuple[Tensor, Tensor]:
    return pruning.prune(W_OI, metric.factor, pruning.largest(entries, W_OI.shape[1]), block)


SHAPES = [(40, 24), (24, 40), (1, 9), (9, 1)]


@every_kind
@every_block
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exactly_so_many_entries_stay(
    generator: torch.Generator, shape: tuple[int, int], block: int, kind: str
) -> None:
    if kind == "dead" and min(shape) < 5:
        kind = "plain"  # has no channels to kill
    layer = random_layer(generator, *shape, kind)
    size = shape[0] * shape[1]
    for entries in (0, 1, size // 3, size - 1, size):
        values_OI, mask_OI = pruned(layer.W_OI, Metric(layer.gram), entries, block)
        assert int(mask_OI.sum()) == entries
        assert not values_OI[~mask_OI].any()
        assert values_OI.isfinite().all()


@every_kind
@every_block
def test_with_every_entry_kept_it_is_the_weight_itself(
    generator: torch.Generator, block: int, kind: str
) -> None:
    layer = random_layer(generator, 24, 40, kind)
    values_OI, mask_OI = pruned(layer.W_OI, Metric(layer.gram), 24 * 40, block)
    assert mask_OI.all()
    assert torch.equal(values_OI, layer.W_OI.float())


@pytest.mark.parametrize(("block", "share"), [(8, 0.3), (8, 0.5), (8, 0.7), (128, 0.5), (128, 0.7)])
@pytest.mark.parametrize("kind", KINDS)
def test_feedback_beats_magnitude_and_wanda_on_correlated_inputs(
    generator: torch.Generator, block: int, kind: str, share: float
) -> None:
    """Both choose entries and leave the others as they are; Wanda by |w| ||x||, within each row.

    Where one block holds all columns and most entries go, what to drop is chosen before anything has moved.
    """
    layer = correlated(generator, kind)
    W_OI = layer.W_OI
    entries = int(share * W_OI.numel())
    pruned_OI = pruned(W_OI, Metric(layer.gram), entries, block)[0].double()
    scores_OI = W_OI.abs() * layer.x_TI.square().mean(0).sqrt()
    wanda_OI = torch.zeros_like(W_OI, dtype=torch.bool)
    wanda_OI.scatter_(1, scores_OI.topk(entries // len(W_OI), 1).indices, True)
    for others in (largest(W_OI.abs(), entries), wanda_OI):
        assert layer.error(pruned_OI) < 0.9 * layer.error(W_OI * others)


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_feedback_pays_for_the_same_entries(generator: torch.Generator, share: float) -> None:
    layer = correlated(generator, "plain")
    entries = int(share * layer.W_OI.numel())
    values_OI, mask_OI = pruned(layer.W_OI, Metric(layer.gram), entries, 16)
    assert layer.error(values_OI.double()) < 0.8 * layer.error(layer.W_OI * mask_OI)


@every_block
def test_without_correlations_it_is_magnitude_pruning_within_blocks(
    generator: torch.Generator, block: int
) -> None:
    """G = I leaves nothing to make up for: what stays is the weight's own, the largest of each block."""
    W_OI = random_layer(generator, 30, 40).W_OI
    values_OI, mask_OI = pruned(W_OI, Metric(torch.eye(40).double()), 400, block)
    torch.testing.assert_close(values_OI[mask_OI], W_OI.float()[mask_OI], rtol=0, atol=0)
    for start in range(0, 40, block):
        part_OB, kept_OB = W_OI.abs()[:, start : start + block], mask_OI[:, start : start + block]
        if kept_OB.any() and not kept_OB.all():
            assert part_OB[kept_OB].min() >= part_OB[~kept_OB].max()


@pytest.mark.parametrize("ratio", [1.1, 2.0, 4.0, 8.0])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (19, 13)], ids=str)
def test_values_and_bitmask_fill_the_share(
    generator: torch.Generator, shape: tuple[int, int], ratio: float
) -> None:
    """To the last value; above 16x the mask alone is too large."""
    layer = random_layer(generator, *shape)
    share = 2 * shape[0] * shape[1] / ratio
    problem = LayerProblem(layer.W_OI, Metric(layer.gram), torch.bfloat16, share)
    menu = SparseGpt().offer(problem)
    assert len(menu) == 2
    mask = -(-shape[0] * shape[1] // 8)
    solution = SparseGpt().solve(problem, menu.choice(0))
    assert solution.nbytes(problem.shape) == mask + 2 * solution.tensors["entries"].numel()
    assert share - 2 < solution.nbytes(problem.shape) <= share
    assert solution.tensors["mask"].nbytes == mask
    few = LayerProblem(layer.W_OI, problem.metric, torch.bfloat16, mask + 1.0)
    assert len(SparseGpt().offer(few)) == 1


def correlated(generator: torch.Generator, kind: str) -> RandomLayer:
    """Neighbouring inputs alike."""
    layer = random_layer(generator, 48, 40, kind)
    smooth_TI = layer.x_TI + layer.x_TI.roll(1, 1) + layer.x_TI.roll(2, 1)
    return RandomLayer(layer.W_OI, smooth_TI)


def largest(scores_OI: Tensor, entries: int) -> Tensor:
    mask = torch.zeros(scores_OI.numel(), dtype=torch.bool)
    mask[scores_OI.flatten().topk(entries).indices] = True
    return mask.view_as(scores_OI)
