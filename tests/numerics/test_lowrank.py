"""Best low rank in the metric G, and its pivoted form."""

import pytest
import torch
from layers import DEGENERATE, KINDS, random_layer
from torch import Tensor

from lrsd.numerics.lowrank import best_low_rank, complement, pivot_factors, spectrum, spectrum_errors

SHAPES = [(12, 20), (20, 12), (16, 16), (1, 9), (9, 1)]
all_layers = pytest.mark.parametrize("kind", KINDS)
all_shapes = pytest.mark.parametrize("shape", SHAPES)


@all_layers
@all_shapes
def test_errors_are_the_discarded_singular_values_of_the_outputs(
    generator: torch.Generator, shape: tuple[int, int], kind: str
) -> None:
    """Eckart-Young on W x itself, which never forms G."""
    layer = random_layer(generator, *shape, kind)
    singular = torch.linalg.svdvals(layer.W_OI @ layer.x_TI.T) / max(len(layer.x_TI), 1) ** 0.5
    energies = torch.zeros(min(shape), dtype=torch.float64)
    energies[: len(singular)] = singular[: min(shape)] ** 2
    expected = torch.cat([energies.flip(0).cumsum(0).flip(0), torch.zeros(1)])
    tolerance = 1e-12 * float(energies.sum())
    for errors in (spectrum(layer.W_OI, layer.gram).errors(), spectrum_errors(layer.W_OI, layer.gram)):
        torch.testing.assert_close(errors, expected, rtol=0, atol=tolerance)
        assert (errors.diff() <= 0).all()


@all_layers
@all_shapes
def test_spectrum_promises_the_error_that_the_factors_have(
    generator: torch.Generator, shape: tuple[int, int], kind: str
) -> None:
    layer = random_layer(generator, *shape, kind)
    promised = spectrum_errors(layer.W_OI, layer.gram)
    for rank in range(min(shape) + 1):
        U_OR, V_RI = best_low_rank(layer.W_OI, layer.gram, rank)
        assert (U_OR.shape, V_RI.shape) == ((shape[0], rank), (rank, shape[1]))
        obtained = layer.error(U_OR @ V_RI)
        total = float(promised[0]) or 1.0
        assert obtained == pytest.approx(float(promised[rank]) / total, abs=1e-11)


@all_shapes
def test_full_rank_reconstructs_the_weight(generator: torch.Generator, shape: tuple[int, int]) -> None:
    layer = random_layer(generator, *shape)
    U_OR, V_RI = best_low_rank(layer.W_OI, layer.gram, min(shape))
    torch.testing.assert_close(U_OR @ V_RI, layer.W_OI, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS + DEGENERATE)
@all_shapes
def test_basis_is_orthonormal_whatever_the_metric(
    generator: torch.Generator, shape: tuple[int, int], kind: str
) -> None:
    layer = random_layer(generator, *shape, kind)
    basis = spectrum(layer.W_OI, layer.gram).basis_OR
    identity = torch.eye(min(shape), dtype=torch.float64)
    torch.testing.assert_close(basis.T @ basis, identity, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_float32_is_as_good_as_float64_to_its_rounding(
    generator: torch.Generator, shape: tuple[int, int]
) -> None:
    layer = random_layer(generator, *shape, "heavy")
    rank = min(shape) // 2
    U_OR, V_RI = best_low_rank(layer.W_OI.float(), layer.gram.float(), rank)
    errors = spectrum_errors(layer.W_OI, layer.gram)
    assert layer.error((U_OR @ V_RI).double()) == pytest.approx(float(errors[rank] / errors[0]), rel=1e-3)


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_out_of_range_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match="rank must be in"):
        best_low_rank(torch.ones(3, 5), torch.eye(5), rank)


def factors(generator: torch.Generator, shape: tuple[int, int], rank: int) -> tuple[Tensor, Tensor]:
    """Badly scaled rows and a decaying spectrum, so that pivots matter."""
    out_features, in_features = shape
    U = torch.randn(out_features, rank, generator=generator, dtype=torch.float64)
    U *= torch.logspace(0, -3, rank, dtype=torch.float64)
    U *= torch.logspace(0, -4, out_features, dtype=torch.float64)[:, None]
    return U, torch.randn(rank, in_features, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("shape", "rank"), [((30, 20), 7), ((20, 30), 20), ((30, 20), 20), ((9, 5), 1), ((1, 4), 1), ((6, 6), 0)]
)
def test_pivoted_factors_reproduce_l_from_its_degrees_of_freedom(
    generator: torch.Generator, shape: tuple[int, int], rank: int
) -> None:
    U, V = factors(generator, shape, rank)
    pivoted = pivot_factors(U, V)
    L = U @ V
    torch.testing.assert_close(pivoted.dense(), L, rtol=0, atol=1e-9 * float(L.abs().max().clamp(min=1)))
    numbers = pivoted.rows_RI.numel() + pivoted.coefficients_QR.numel()
    assert numbers == rank * (sum(shape) - rank)
    assert pivoted.pivots_R.tolist() == sorted(set(pivoted.pivots_R.tolist()))
    assert float(pivoted.coefficients_QR.abs().amax() if pivoted.coefficients_QR.numel() else 0) <= 1.5


def test_coefficients_stay_near_one_over_many_layers(generator: torch.Generator) -> None:
    for _ in range(20):
        U, _ = torch.linalg.qr(torch.randn(120, 40, generator=generator, dtype=torch.float64))
        pivoted = pivot_factors(U, U.T)
        assert pivoted.coefficients_QR.abs().max() <= 1.5
        torch.testing.assert_close(pivoted.dense(), U @ U.T, rtol=0, atol=1e-9)


def test_factors_without_full_column_rank_are_refused(generator: torch.Generator) -> None:
    U, V = factors(generator, (8, 6), 3)
    U[:, 2] = U[:, 0] + U[:, 1]
    with pytest.raises(ValueError, match="full column rank"):
        pivot_factors(U, V)


@pytest.mark.parametrize("size", [1, 5, 300])
def test_complement_and_indices_partition_the_range(generator: torch.Generator, size: int) -> None:
    indices = torch.randperm(size, generator=generator)[: size // 2].sort().values
    for kind in (torch.int64, torch.int16):
        rest = complement(indices.to(kind), size)
        assert rest.tolist() == [i for i in range(size) if i not in indices.tolist()]
