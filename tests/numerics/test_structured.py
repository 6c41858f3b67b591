"""Kept columns and rows: the exact fit beside them, and how they are chosen."""

import pytest
import torch
from layers import KINDS, RandomLayer, planted_layer, random_layer
from torch import Tensor

from lrsd.numerics.lowrank import complement, spectrum_errors
from lrsd.numerics.structured import (
    column_energies,
    columns_spectrum,
    fit_with_columns,
    row_gains,
    select_columns,
    select_rows,
    split_columns,
)

all_layers = pytest.mark.parametrize("kind", KINDS)


def fitted(layer: RandomLayer, columns_K: Tensor, rank: int) -> Tensor:
    """L + S of the closed form, (O, I)."""
    split = split_columns(layer.gram, columns_K)
    U_OR, V_RC, S_OK = fit_with_columns(layer.W_OI, split, rank)
    dense_OI = torch.zeros_like(layer.W_OI)
    dense_OI[:, split.free_C] = U_OR @ V_RC
    dense_OI[:, columns_K] = S_OK
    return dense_OI


def optimised(layer: RandomLayer, columns_K: Tensor, rank: int, generator: torch.Generator) -> float:
    """Least relative error found by alternating least squares over (U, S_J) and (V, S_J).

    Both steps are plain regressions on the tokens; U starts at random.
    """
    x_TI, outputs_TO = layer.x_TI, layer.x_TI @ layer.W_OI.T
    out_features, in_features = layer.W_OI.shape
    identity_OO = torch.eye(out_features, dtype=torch.float64)
    on_kept = torch.kron(x_TI[:, columns_K], identity_OO)
    U_OR = torch.randn(out_features, rank, generator=generator, dtype=torch.float64)
    errors = [1.0]
    for _ in range(2000):
        design = torch.cat([torch.kron(x_TI, U_OR), on_kept], dim=1)
        solution = least_squares(design, outputs_TO.flatten())
        V_RI = solution[: rank * in_features].view(in_features, rank).T
        design = torch.cat([x_TI @ V_RI.T, x_TI[:, columns_K]], dim=1)
        solution = least_squares(design, outputs_TO)
        U_OR = solution[:rank].T
        left_TO = outputs_TO - design @ solution
        errors.append(float(left_TO.square().sum() / outputs_TO.square().sum()))
        if errors[-2] - errors[-1] <= 1e-10 * errors[-1]:
            break
    return errors[-1]


def least_squares(design: Tensor, target: Tensor) -> Tensor:
    """The solution of least norm, so that singular designs are no special case."""
    matrix = target if target.dim() == 2 else target[:, None]
    solution = torch.linalg.lstsq(design, matrix, driver="gelsd").solution
    return solution if target.dim() == 2 else solution[:, 0]


@all_layers
@pytest.mark.parametrize(("shape", "rank", "kept"), [((8, 12), 2, 3), ((12, 8), 3, 1), ((10, 10), 2, 2)])
def test_closed_form_equals_a_long_generic_optimisation(
    generator: torch.Generator, shape: tuple[int, int], rank: int, kept: int, kind: str
) -> None:
    layer = random_layer(generator, *shape, kind)
    columns_K = torch.randperm(shape[1], generator=generator)[:kept].sort().values
    closed = layer.error(fitted(layer, columns_K, rank))
    generic = optimised(layer, columns_K, rank, generator)
    assert closed == pytest.approx(generic, rel=1e-6, abs=1e-9)


@all_layers
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_spectrum_beside_columns_promises_the_error_obtained(
    generator: torch.Generator, shape: tuple[int, int], kind: str
) -> None:
    layer = random_layer(generator, *shape, kind)
    columns_K = torch.tensor([0, 2, 3, 4])  # dead and duplicate ones among them, for that kind
    promised = columns_spectrum(layer.W_OI, split_columns(layer.gram, columns_K)).errors()
    promised /= spectrum_errors(layer.W_OI, layer.gram)[0]
    for rank in range(len(promised)):
        obtained = layer.error(fitted(layer, columns_K, rank))
        # The ridge on kept columns moves the promise by about its own 1e-10 times their spread of scales.
        assert obtained == pytest.approx(float(promised[rank]), abs=1e-7)


@all_layers
def test_error_never_rises_with_rank_or_column_count(generator: torch.Generator, kind: str) -> None:
    layer = random_layer(generator, 14, 18, kind)
    order = torch.randperm(18, generator=generator)
    errors = torch.tensor(
        [[layer.error(fitted(layer, order[:k].sort().values, r)) for r in range(9)] for k in range(10)]
    )
    assert (errors.diff(dim=0) <= 1e-9).all()
    assert (errors.diff(dim=1) <= 1e-9).all()


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_full_rank_beside_columns_reconstructs_the_weight(
    generator: torch.Generator, shape: tuple[int, int]
) -> None:
    layer = random_layer(generator, *shape)
    for kept in range(shape[1] + 1):
        rank = min(shape[0], shape[1] - kept)
        dense_OI = fitted(layer, torch.arange(kept), rank)
        torch.testing.assert_close(dense_OI, layer.W_OI, rtol=0, atol=1e-9)


@all_layers
def test_energy_of_a_column_is_the_error_of_dropping_it(generator: torch.Generator, kind: str) -> None:
    layer = random_layer(generator, 7, 10, kind)
    energies_I = column_energies(layer.W_OI, layer.gram)
    for column in range(10):
        output_TO = layer.x_TI[:, [column]] @ layer.W_OI[:, [column]].T
        lost = output_TO.square().sum() / len(layer.x_TI)
        assert float(energies_I[column]) == pytest.approx(float(lost), rel=1e-9, abs=1e-12)


@all_layers
def test_gains_of_rows_add_up_to_the_error(generator: torch.Generator, kind: str) -> None:
    layer = random_layer(generator, 7, 10, kind)
    per_row = (layer.x_TI @ layer.W_OI.T).square().mean(0)
    torch.testing.assert_close(row_gains(layer.W_OI, layer.gram), per_row, rtol=1e-9, atol=1e-12)


def column_error(layer: RandomLayer, columns_K: Tensor, rank: int) -> float:
    return float(columns_spectrum(layer.W_OI, split_columns(layer.gram, columns_K)).errors()[rank])


def row_error(layer: RandomLayer, rows_P: Tensor, rank: int) -> float:
    return float(spectrum_errors(layer.W_OI[complement(rows_P, len(layer.W_OI))], layer.gram)[rank])


@pytest.mark.parametrize(
    ("select", "error"), [(select_columns, column_error), (select_rows, row_error)], ids=["columns", "rows"]
)
@pytest.mark.parametrize(
    ("rank", "kept"),
    [(2, 20), pytest.param(8, 8, marks=pytest.mark.slow), pytest.param(4, 4, marks=pytest.mark.slow)],
)
def test_chosen_channels_beat_fifty_random_sets(
    generator: torch.Generator, select, error, rank: int, kept: int
) -> None:
    layers, won = 20, 0
    for _ in range(layers):
        layer = planted_layer(generator, 48, rank)
        chosen = select(layer.W_OI, layer.gram, rank, kept).kept
        assert chosen.tolist() == sorted(set(chosen.tolist()))
        assert len(chosen) == kept
        random = [torch.randperm(48, generator=generator)[:kept].sort().values for _ in range(50)]
        won += error(layer, chosen, rank) <= min(error(layer, other, rank) for other in random)
    assert won >= 0.95 * layers


@pytest.mark.parametrize(
    ("rank", "kept"),
    [(8, 8), pytest.param(24, 8, marks=pytest.mark.slow), pytest.param(16, 16, marks=pytest.mark.slow)],
)
def test_chosen_columns_beat_fifty_random_sets_on_correlated_inputs(
    generator: torch.Generator, rank: int, kept: int
) -> None:
    won = 0
    for _ in range(20):
        layer = random_layer(generator, 64, 64, "heavy")
        chosen = select_columns(layer.W_OI, layer.gram, rank, kept).kept
        random = [torch.randperm(64, generator=generator)[:kept].sort().values for _ in range(50)]
        won += column_error(layer, chosen, rank) <= min(column_error(layer, J, rank) for J in random)
    assert won >= 19


@pytest.mark.parametrize(
    ("select", "error"), [(select_columns, column_error), (select_rows, row_error)], ids=["columns", "rows"]
)
def test_alternation_improves_on_a_random_start_and_never_worsens_it(
    generator: torch.Generator, select, error
) -> None:
    gained = 0
    for _ in range(20):
        layer = planted_layer(generator, 48, 5)
        start = torch.randperm(48, generator=generator)[:5].sort().values
        before = error(layer, start, 5)
        after = error(layer, select(layer.W_OI, layer.gram, 5, 5, start).kept, 5)
        assert after <= before
        gained += after < before
    assert gained >= 19


@pytest.mark.parametrize(
    ("select", "error", "gains", "at_most"),
    [(select_columns, column_error, column_energies, 1.0), (select_rows, row_error, row_gains, 0.995)],
    ids=["columns", "rows"],
)
def test_choice_is_never_worse_than_either_first_score_and_for_rows_better(
    generator: torch.Generator, select, error, gains, at_most: float
) -> None:
    """The two starts: scores on the residual of the best low rank, and on the weight itself.

    For columns the alternation rarely finds more than the better start.
    """
    chosen_total, first_total = 0.0, 0.0
    for _ in range(20):
        layer = random_layer(generator, 24, 24, "heavy")
        residual_OI = layer.W_OI - fitted(layer, torch.arange(0), 6)
        scores = (gains(R, layer.gram) for R in (residual_OI, layer.W_OI))
        first = min(error(layer, score.topk(6).indices.sort().values, 6) for score in scores)
        chosen = error(layer, select(layer.W_OI, layer.gram, 6, 6).kept, 6)
        assert chosen <= first * (1 + 1e-9)
        total = float(spectrum_errors(layer.W_OI, layer.gram)[0])
        chosen_total, first_total = chosen_total + chosen / total, first_total + first / total
    assert chosen_total <= at_most * first_total * (1 + 1e-9)


def test_rescoring_rows_beside_the_chosen_ones_pays_on_average(generator: torch.Generator) -> None:
    chosen, first = 0.0, 0.0
    for _ in range(20):
        layer = random_layer(generator, 24, 24, "heavy")
        total = float(spectrum_errors(layer.W_OI, layer.gram)[0])
        residual_OI = layer.W_OI - fitted(layer, torch.arange(0), 6)
        scores = (row_gains(R, layer.gram) for R in (residual_OI, layer.W_OI))
        first += min(row_error(layer, score.topk(6).indices.sort().values, 6) for score in scores) / total
        chosen += row_error(layer, select_rows(layer.W_OI, layer.gram, 6, 6).kept, 6) / total
    assert chosen < 0.995 * first
