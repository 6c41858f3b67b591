"""What S may keep on top of a low rank, and what every rank would then lose: measured for a layer."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrsd.forms.base import Form
from lrsd.forms.blocks import Blocks
from lrsd.forms.layer import Layer
from lrsd.forms.lowrank import LowRank
from lrsd.forms.masked import Masked
from lrsd.forms.semi_structured import SemiStructured
from lrsd.methods.base import LayerProblem
from lrsd.numerics.lowrank import complement, spectrum_errors
from lrsd.numerics.menu import Choice
from lrsd.numerics.moments import energy
from lrsd.numerics.pruning import sparse_blocks, sparse_entries, sparse_pairs
from lrsd.numerics.solver import decompose_sparse
from lrsd.numerics.structured import column_energies, row_gains, split_columns

# Kept fractions of a layer's columns, rows or blocks that are tried, and the two that a search begins at.
_FRACTIONS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)
_STARTS = (2, 4)
# Unstructured S: fractions of the entries that it is measured at, and how many are offered in between.
_MEASURED, _OFFERED = (1 / 8, 3 / 8, 5 / 8, 3 / 4, 7 / 8), 64
# Rounds of alternating 2:4 and low rank to see what comes of it.
_ROUNDS = 3
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Support:
    """A number of kept columns, rows, or values of a form, and the relative error at every rank on top of
    them.

    errors_R: float64, non-increasing, from rank 0 to the highest possible one. kept: the columns or rows it
    was measured with, ascending.
    """

    errors_R: Tensor
    columns: int = 0
    rows: int = 0
    sparse: Form | None = None
    kept: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        return not self.columns and not self.rows and self.sparse is None

    def layer(self, rank: int, *, pivoted: bool, bias: bool) -> Layer:
        terms: tuple[Form, ...] = (LowRank(rank, pivoted),)
        if self.sparse is not None:
            terms = (*terms, self.sparse)
        return Layer(terms=terms, columns=self.columns, rows=self.rows, bias=bias, added_bias=bias)

    def parameters(self) -> dict[str, float]:
        """As a choice has them, see `sparse_of`."""
        names = ("columns", "rows", "entries", "blocks", "block", "fours")
        found: dict[str, float] = dict.fromkeys(names, 0)
        found["columns"], found["rows"] = self.columns, self.rows
        if isinstance(self.sparse, Masked):
            found["entries"] = self.sparse.entries
        elif isinstance(self.sparse, Blocks):
            found["blocks"], found["block"] = self.sparse.blocks, self.sparse.size
        elif isinstance(self.sparse, SemiStructured):
            found["fours"] = 1
        return found


Sparse = Callable[[Tensor, Any], tuple[Tensor, Tensor]]


def sparse_of(choice: Choice) -> Sparse | None:
    """How S is found whose entries a form stores, see `pruning`; None where it keeps whole channels, or
    nothing."""
    if choice.count("blocks"):
        return partial(sparse_blocks, blocks=choice.count("blocks"), size=choice.count("block"))
    if choice.count("fours"):
        return sparse_pairs
    return partial(sparse_entries, entries=choice.count("entries")) if choice.count("entries") else None


def packed(choice: Choice, values_OI: Tensor, mask_OI: Tensor) -> tuple[Form, dict[str, Tensor]]:
    """What was found by `sparse_of`, as it is stored."""
    if size := choice.count("block"):
        rows, columns = (side // size for side in mask_OI.shape)
        return Blocks.of(values_OI, mask_OI.view(rows, size, columns, size)[:, 0, :, 0])
    if choice.count("fours"):
        return SemiStructured.of(values_OI, mask_OI)
    every_I = torch.arange(mask_OI.shape[1], device=mask_OI.device)
    return Masked.of(values_OI, mask_OI, every_I, len(every_I))


def supports_of(
    problem: LayerProblem, structure: str, block: int, at_share: Callable[[Support], float], plain: Support
) -> list[Support]:
    """What a structure has to offer this layer: nothing where its sides do not fit.

    at_share: what a support loses at the layer's share of the bytes; plain: no support. Raises: SolverError.
    """
    if structure == "unstructured":
        return list(_entries(problem))
    if structure == "2:4":
        return [_pairs(problem, at_share)] if SemiStructured().fits(problem.shape) else []
    if structure == "block":
        if not Blocks(0, block).fits(problem.shape):
            return []
        return _search(partial(_blocks, problem, block), at_share, plain)
    measure = {"column": _columns, "row": _rows}[structure]
    half_OR = problem.spectrum.basis_OR[:, : min(problem.W_OI.shape) // 2]
    residual_OI = problem.W_OI - half_OR @ (half_OR.T @ problem.W_OI)
    return _search(partial(measure, problem, residual_OI), at_share, plain)


def pruned_columns(problem: LayerProblem) -> Support:
    """As many columns as an equal share of the bytes holds, and no rank."""
    W_OI, gram_II = problem.W_OI, problem.metric.gram
    per_column = Layer(columns=1).nbytes(problem.shape)
    count = int(problem.share // per_column)
    columns_K = column_energies(W_OI, gram_II).topk(count).indices.sort().values
    split = split_columns(gram_II, columns_K)
    lost = energy(W_OI[:, split.free_C], split.schur_CC) / max(energy(W_OI, gram_II), _TINY)
    return Support(torch.tensor([lost], dtype=torch.float64), count, kept=columns_K)


def low_rank_errors(problem: LayerProblem) -> Tensor:
    """Relative error of the best low rank at every rank, (q + 1,) float64. Raises: SolverError."""
    return (problem.spectrum.errors() / _total(problem)).cpu()


def _total(problem: LayerProblem) -> float:
    return max(float(problem.spectrum.energies_R.sum()), _TINY)


def _search(
    measure: Callable[[float], Support], at_share: Callable[[Support], float], plain: Support
) -> list[Support]:
    """Supports around the kept fraction of least error at the layer's share of the bytes.

    From two fractions of the ladder on towards the better side, until the error rises; none where
    neither of the two errs less than low rank alone.
    """
    found: dict[int, Support] = {}
    errors: dict[int, float] = {}

    def visit(position: int) -> None:
        if 0 <= position < len(_FRACTIONS) and position not in found:
            found[position] = measure(_FRACTIONS[position])
            errors[position] = at_share(found[position])

    for position in _STARTS:
        visit(position)
    if min(errors.values()) >= at_share(plain):
        return []
    best = None
    while best != min(errors, key=errors.__getitem__):
        best = min(errors, key=errors.__getitem__)
        visit(best - 1)
        visit(best + 1)
    return [found[position] for position in sorted(found)]


def _columns(problem: LayerProblem, residual_OI: Tensor, fraction: float) -> Support:
    """The columns of largest output energy."""
    W_OI, gram_II = problem.W_OI, problem.metric.gram
    count = max(1, round(fraction * W_OI.shape[1]))
    columns_K = column_energies(W_OI, gram_II).topk(count).indices.sort().values
    split = split_columns(gram_II, columns_K)
    errors_R = spectrum_errors(W_OI[:, split.free_C].float(), split.schur_CC.float()).double()
    return Support((errors_R / _total(problem)).cpu(), columns=count, kept=columns_K)


def _rows(problem: LayerProblem, residual_OI: Tensor, fraction: float) -> Support:
    """The rows of largest error in the residual of the best half-rank fit."""
    W_OI, gram_II = problem.W_OI, problem.metric.gram
    count = max(1, round(fraction * W_OI.shape[0]))
    rows_P = row_gains(residual_OI, gram_II).topk(count).indices.sort().values
    free_OI = W_OI[complement(rows_P, W_OI.shape[0])]
    errors_R = spectrum_errors(free_OI.float(), gram_II.float()).double()
    return Support((errors_R / _total(problem)).cpu(), rows=count, kept=rows_P)


def _blocks(problem: LayerProblem, size: int, fraction: float) -> Support:
    """The blocks that would be missed most, without a rank, and every rank of what they leave."""
    count = max(1, round(fraction * problem.W_OI.numel() / size**2))
    values_OI, _ = sparse_blocks(problem.W_OI, problem.metric, count, size)
    return Support(_errors_on_top(problem, values_OI), sparse=Blocks(count, size))


def _pairs(problem: LayerProblem, at_share: Callable[[Support], float]) -> Support:
    """Two of four without a rank, and every rank of what they leave, corrected by what alternating makes of
    the rank at the layer's share: a third less, on layers of SmolLM2-135M."""
    W_OI, metric = problem.W_OI, problem.metric
    values_OI, _ = sparse_pairs(W_OI, metric)
    plain = Support(_errors_on_top(problem, values_OI), sparse=SemiStructured())
    expected = at_share(plain)
    rank = int((plain.errors_R > expected).sum())
    if not (math.isfinite(expected) and rank and expected > 0):
        return plain
    found = decompose_sparse(W_OI, metric, sparse_pairs, rank=rank, iterations=_ROUNDS)
    factor_R = torch.full_like(plain.errors_R, found.error / expected)
    factor_R[: rank + 1] **= torch.linspace(0, 1, rank + 1, dtype=torch.float64)
    return replace(plain, errors_R=plain.errors_R * factor_R)


def _errors_on_top(problem: LayerProblem, values_OI: Tensor) -> Tensor:
    left_OI, gram_II = problem.W_OI.float() - values_OI, problem.metric.single.gram
    return (spectrum_errors(left_OI, gram_II).double() / _total(problem)).cpu()


def _entries(problem: LayerProblem) -> Iterator[Support]:
    """Every so many entries without a rank: at 1.25x and 2x low rank in the place of some of them never paid
    (layers of SmolLM2-135M). Errors in between those measured by interpolation of their logarithms.

    Raises: SolverError.
    """
    rows, columns = problem.W_OI.shape
    fractions_N = np.arange(1, _OFFERED) / _OFFERED
    measured = []
    for fraction in _MEASURED:
        values_OI, _ = sparse_entries(problem.W_OI, problem.metric, int(fraction * rows * columns))
        lost = energy(problem.W_OI - values_OI.to(problem.W_OI), problem.metric.gram)
        measured.append(lost / max(energy(problem.W_OI, problem.metric.gram), _TINY))
    logs_N = np.interp(fractions_N, (0, *_MEASURED), np.log(np.maximum([1.0, *measured], _TINY)))
    above_N = fractions_N > _MEASURED[-1]  # the error falls to none with the cube of what is dropped
    dropped_N = (1 - fractions_N[above_N]) / (1 - _MEASURED[-1])
    logs_N[above_N] += 3 * np.log(dropped_N)
    for fraction, log in zip(fractions_N, logs_N, strict=True):
        errors_R = torch.tensor([math.exp(log)], dtype=torch.float64)
        yield Support(errors_R, sparse=Masked(columns, int(fraction * rows * columns)))
