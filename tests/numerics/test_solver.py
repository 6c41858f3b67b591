"""The decomposition as a whole: what it promises, in every corner of the family."""

import pytest
import torch
from layers import DEGENERATE, KINDS, planted_layer, random_layer

from lrsd.numerics.metric import Metric
from lrsd.numerics.pruning import sparse_pairs
from lrsd.numerics.solver import decompose, decompose_sparse, propagated_target, relative_error

all_layers = pytest.mark.parametrize("kind", KINDS)
SUPPORTS = [{}, {"columns": 4}, {"rows": 3}]


@pytest.mark.parametrize("kind", KINDS + DEGENERATE)
@pytest.mark.parametrize("support", SUPPORTS, ids=str)
@pytest.mark.parametrize("shape", [(11, 16), (16, 11)])
def test_reported_error_is_that_of_the_dense_result(
    generator: torch.Generator, shape: tuple[int, int], support: dict[str, int], kind: str
) -> None:
    layer = random_layer(generator, *shape, kind)
    found = decompose(layer.W_OI, layer.gram, rank=3, **support)
    assert found.dense().isfinite().all()
    assert torch.linalg.matrix_rank(found.U_FR @ found.V_RC) <= 3
    assert found.error == pytest.approx(layer.error(found.dense()), abs=1e-10)
    assert found.error == relative_error(layer.W_OI, found.dense(), layer.gram)
    assert found.history[-1] == found.error
    assert 0 <= found.error < 1


@pytest.mark.parametrize("support", SUPPORTS, ids=str)
@pytest.mark.parametrize("shape", [(11, 16), (16, 11)])
def test_highest_rank_reconstructs_the_weight(
    generator: torch.Generator, shape: tuple[int, int], support: dict[str, int]
) -> None:
    layer = random_layer(generator, *shape)
    highest = min(shape[0] - support.get("rows", 0), shape[1] - support.get("columns", 0))
    found = decompose(layer.W_OI, layer.gram, rank=highest, **support)
    torch.testing.assert_close(found.dense(), layer.W_OI, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="rank must be in"):
        decompose(layer.W_OI, layer.gram, rank=highest + 1, **support)


@all_layers
def test_kept_rows_are_the_weights_own(generator: torch.Generator, kind: str) -> None:
    layer = random_layer(generator, 12, 9, kind)
    found = decompose(layer.W_OI, layer.gram, rank=2, rows=4)
    assert torch.equal(found.dense()[found.rows_P], layer.W_OI[found.rows_P])


@all_layers
@pytest.mark.parametrize("structure", ["columns", "rows"])
def test_error_never_rises_with_rank_or_kept_channels(
    generator: torch.Generator, structure: str, kind: str
) -> None:
    """On nested sets, where it is exact; a chosen set may differ from count to count."""
    layer = random_layer(generator, 14, 14, kind)
    order = torch.randperm(14, generator=generator)

    def error(kept: int, rank: int) -> float:
        start = order[:kept].sort().values
        support = {structure: kept, "start": start, "alternate": False}
        return decompose(layer.W_OI, layer.gram, rank=rank, **support).error

    errors = torch.tensor([[error(kept, rank) for rank in range(7)] for kept in range(7)])
    assert (errors.diff(dim=0) <= 1e-9).all()
    assert (errors.diff(dim=1) <= 1e-9).all()


@pytest.mark.parametrize("structure", ["columns", "rows"])
def test_alternation_starts_from_the_given_set_and_improves_on_it(
    generator: torch.Generator, structure: str
) -> None:
    improved = 0
    for _ in range(10):
        layer = planted_layer(generator, 40, 4)
        start = torch.randperm(40, generator=generator)[:6].sort().values
        arguments = {"rank": 4, structure: 6, "start": start}
        fixed = decompose(layer.W_OI, layer.gram, alternate=False, **arguments)
        free = decompose(layer.W_OI, layer.gram, **arguments)
        assert torch.equal(fixed.columns_K if structure == "columns" else fixed.rows_P, start)
        assert free.error <= fixed.error
        improved += free.error < fixed.error
    assert improved == 10


def test_columns_and_rows_together_are_refused() -> None:
    with pytest.raises(ValueError, match="columns or rows, not both"):
        decompose(torch.ones(4, 4), torch.eye(4), rank=1, columns=1, rows=1)


def test_inputs_are_not_changed(generator: torch.Generator) -> None:
    layer = random_layer(generator, 8, 8, "dead")
    W_OI, gram_II = layer.W_OI.clone(), layer.gram.clone()
    decompose(W_OI, gram_II, rank=2, columns=2)
    decompose_sparse(W_OI, Metric(gram_II), sparse_pairs, rank=2)
    propagated_target(W_OI, gram_II, W_OI @ gram_II)
    assert torch.equal(W_OI, layer.W_OI)
    assert torch.equal(gram_II, layer.gram)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [0, 3])
def test_low_rank_plus_entries_returns_its_best_iterate(
    generator: torch.Generator, rank: int, kind: str
) -> None:
    layer = random_layer(generator, 14, 16, kind)
    metric = Metric(layer.gram)
    found = decompose_sparse(layer.W_OI, metric, sparse_pairs, rank=rank, iterations=4)
    assert found.mask_OK is not None
    assert not found.column_values_OK[~found.mask_OK].any()
    assert len(found.history) == (4 if rank else 1)
    assert found.error == min(found.history)
    assert found.error == pytest.approx(layer.error(found.dense()), rel=1e-6, abs=1e-10)


def test_alternation_lowers_the_error_of_low_rank_plus_two_of_four(generator: torch.Generator) -> None:
    for _ in range(5):
        layer = random_layer(generator, 30, 40, "plain")
        metric = Metric(layer.gram)
        once, often = (
            decompose_sparse(layer.W_OI, metric, sparse_pairs, rank=4, iterations=n) for n in (1, 6)
        )
        assert once.history == often.history[:1]
        assert often.error < 0.95 * once.error


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_propagated_target_recovers_the_least_squares_solution(
    generator: torch.Generator, shape: tuple[int, int]
) -> None:
    layer = random_layer(generator, *shape)
    x_TI = layer.x_TI
    t_TO = x_TI @ layer.W_OI.T + torch.randn(len(x_TI), shape[0], generator=generator, dtype=torch.float64)
    expected_OI = torch.linalg.lstsq(x_TI, t_TO).solution.T
    own_OI = torch.zeros_like(expected_OI)
    target_OI, _ = propagated_target(own_OI, layer.gram, t_TO.T @ x_TI / len(x_TI), damping=1e-13)
    torch.testing.assert_close(target_OI, expected_OI, rtol=1e-6, atol=1e-6)


@all_layers
def test_propagated_target_minimises_its_objective(generator: torch.Generator, kind: str) -> None:
    """E||t - W' x||^2 + damping mean(diag G) ||W' - W||^2 has no slope there."""
    layer = random_layer(generator, 6, 10, kind)
    damping, x_TI = 1e-2, layer.x_TI
    t_TO = torch.randn(len(x_TI), 6, generator=generator, dtype=torch.float64)
    missing_OI = (t_TO - x_TI @ layer.W_OI.T).T @ x_TI / len(x_TI)
    target_OI = propagated_target(layer.W_OI, layer.gram, missing_OI, damping=damping)[0].requires_grad_()
    misfit = (t_TO - x_TI @ target_OI.T).square().sum() / len(x_TI)
    pull = damping * x_TI.square().mean() * (target_OI - layer.W_OI).square().sum()
    (misfit + pull).backward()
    assert target_OI.grad is not None
    assert float(target_OI.grad.abs().max()) <= 1e-9 * float(misfit.detach())


@pytest.mark.parametrize("kind", KINDS + DEGENERATE)
def test_an_exact_prefix_leaves_the_weight_alone(generator: torch.Generator, kind: str) -> None:
    layer = random_layer(generator, 6, 10, kind)
    target_OI, _ = propagated_target(layer.W_OI, layer.gram, torch.zeros_like(layer.W_OI))
    torch.testing.assert_close(target_OI, layer.W_OI, rtol=0, atol=1e-9)
