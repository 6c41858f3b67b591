"""Low rank plus structured or unstructured sparse at 16 bit: what lrsd, ssd, svd and columns share."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lrsd.forms.base import Shape
from lrsd.forms.layer import Layer
from lrsd.forms.lowrank import LowRank
from lrsd.forms.masked import Masked
from lrsd.methods.base import LayerProblem, Probe, Solution, State, Status, Summand, store
from lrsd.numerics.lowrank import complement, spectrum_errors
from lrsd.numerics.menu import Choice, Menu
from lrsd.numerics.moments import energy
from lrsd.numerics.solver import Decomposition, decompose, decompose_pruned, decompose_thresholded
from lrsd.numerics.structured import column_energies, row_gains, split_columns

# Kept fractions of a layer's columns or rows that are tried, and the two that a search begins at.
_FRACTIONS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)
_STARTS = (2, 4)
# Unstructured S: fractions of the entries that it is measured at, and how many are offered in between.
_MEASURED, _OFFERED = (1 / 8, 3 / 8, 5 / 8, 3 / 4, 7 / 8), 64
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Support:
    """A number of kept columns or rows, and the relative error at every rank on top of them.

    errors_R: float64, non-increasing, from rank 0 to the highest possible one. kept: the columns or rows it
    was measured with, ascending. entries: values of a thresholded S, counted over all kept columns.
    """

    errors_R: Tensor
    columns: int = 0
    rows: int = 0
    entries: int | None = None
    kept: Tensor | None = None

    def layer(self, rank: int, *, pivoted: bool, bias: bool) -> Layer:
        low_rank = LowRank(rank, pivoted)
        if self.entries is not None:
            return Layer(terms=(low_rank, Masked(self.columns, self.entries)), bias=bias, added_bias=bias)
        return Layer(terms=(low_rank,), columns=self.columns, rows=self.rows, bias=bias, added_bias=bias)


def offer(
    problem: LayerProblem,
    structure: str,
    *,
    rank: int | None = None,
    pivoted: bool = True,
    bias: bool = False,
) -> Menu:
    """Every rank on top of every support that the structure allows and this layer profits from.

    rank: this one only. Raises: SolverError.
    """
    W_OI, gram_II = problem.W_OI, problem.metric.gram
    whole = problem.spectrum
    total = max(float(whole.energies_R.sum()), _TINY)
    plain = Support(low_rank_errors(problem))
    menu = partial(menu_of, problem.shape, rank=rank, pivoted=pivoted, bias=bias)
    if structure == "none" or rank is not None:
        return menu([plain])
    if structure == "unstructured":
        return menu([plain, *_entries_supports(problem)])
    supports = [plain]
    half_OR = whole.basis_OR[:, : min(W_OI.shape) // 2]
    residual_OI = W_OI - half_OR @ (half_OR.T @ W_OI)

    def at_share(support: Support) -> float:
        offers = menu([support])
        index = offers.within(problem.share)
        return math.inf if index is None else float(offers.errors_N[index])

    for name, measure in (("column", _columns_support), ("row", _rows_support)):
        if structure in ("auto", name):
            supports += _search(partial(measure, W_OI, gram_II, residual_OI, total), at_share, plain)
    return menu(supports)


def low_rank_errors(problem: LayerProblem) -> Tensor:
    """Relative error of the best low rank at every rank, (q + 1,) float64. Raises: SolverError."""
    whole = problem.spectrum
    return (whole.errors() / max(float(whole.energies_R.sum()), _TINY)).cpu()


def menu_of(
    shape: Shape,
    supports: Sequence[Support],
    *,
    rank: int | None = None,
    pivoted: bool = True,
    bias: bool = False,
) -> Menu:
    """Offers of at least rank 1 or a kept channel. rank: this one only."""
    parts: list[dict[str, np.ndarray]] = []
    sets: list[Tensor] = []
    for support in supports:
        ranks = np.arange(0 if support.columns or support.rows else 1, support.errors_R.numel())
        if rank is not None:
            ranks = np.array([min(rank, support.errors_R.numel() - 1)])
        if support.kept is not None:
            sets.append(support.kept.cpu())
        layer = support.layer(ranks, pivoted=pivoted, bias=bias)  # type: ignore[arg-type]  # all at once
        parts.append({
            "nbytes": layer.nbytes(shape),
            "errors": support.errors_R.numpy()[ranks],
            "rank": ranks,
            "columns": np.full(len(ranks), support.columns),
            "rows": np.full(len(ranks), support.rows),
            "entries": np.full(len(ranks), -1 if support.entries is None else support.entries),
            "pivoted": np.full(len(ranks), pivoted),
            "set": np.full(len(ranks), len(sets) if support.kept is not None else 0),
        })  # fmt: skip
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Menu.of(shape.dense_bytes, joined.pop("nbytes"), joined.pop("errors"), joined, sets)


def solve(
    problem: LayerProblem,
    choice: Choice,
    *,
    iterations: int = 1,
    corrects_mean: bool = False,
) -> Solution:
    """L and S at an offer; from the channels that it was measured with, which are improved on where
    iterations > 1."""
    W_OI, gram_II, rank = problem.W_OI, problem.metric.gram, choice.count("rank")
    columns, rows = choice.count("columns"), choice.count("rows")
    entries = int(choice.number("entries", -1))  # none: columns are whole
    if entries >= 0 and columns == problem.shape.in_features:
        found = decompose_pruned(W_OI, problem.metric, entries)
    elif entries >= 0:
        found = decompose_thresholded(
            W_OI, gram_II, rank=rank, columns=columns, entries=entries, iterations=iterations
        )
    else:
        start = None if choice.kept is None else choice.kept.to(W_OI.device)
        found = decompose(
            W_OI, gram_II, rank=rank, columns=columns, rows=rows, start=start, alternate=iterations > 1
        )
    pivoted = bool(choice.number("pivoted", 1))
    state = State.EXACT if entries < 0 else State.BEST if rank else State.PRUNED
    return _stored(problem, found, pivoted=pivoted, state=state, corrects_mean=corrects_mean)


def _stored(
    problem: LayerProblem, found: Decomposition, *, pivoted: bool, state: State, corrects_mean: bool
) -> Solution:
    free = complement(found.rows_P, found.shape[0])
    U_FR, columns_OK = problem.unscaled(found.U_FR, free), problem.unscaled(found.column_values_OK)
    summands = [Summand(*LowRank.of(U_FR, found.V_RC, pivoted=pivoted))]
    kept: dict[str, Tensor] = {}
    if found.mask_OK is not None:
        width = found.shape[1]
        masked = Masked.of(columns_OK, found.mask_OK, found.columns_K, width)
        summands.append(Summand(*masked))
    elif found.columns_K.numel():
        kept = {"columns": found.columns_K, "column_values": columns_OK}
    elif found.rows_P.numel():
        kept = {"rows": found.rows_P, "row_values": problem.unscaled(found.row_values_PI, found.rows_P)}
    return store(
        problem, summands, kept, status=Status(state, damping=found.damping), history=found.history,
        corrects_mean=corrects_mean, adds_bias=corrects_mean,
    )  # fmt: skip


def probe(problem: LayerProblem) -> Probe:
    """The low-rank fit that an equal share would allow: near the error that the layer will have."""
    W_OI, errors_R = problem.W_OI, low_rank_errors(problem)
    offers = menu_of(problem.shape, [Support(errors_R)])
    index = offers.within(problem.share)
    rank = 1 if index is None else offers.choice(index).count("rank") or 1
    rank = min(rank, min(W_OI.shape) - 1)
    U_OR = problem.spectrum.basis_OR[:, :rank]
    return Probe(problem.unscaled(U_OR @ (U_OR.T @ W_OI)).float(), float(errors_R[rank]))


def pruned_columns(problem: LayerProblem) -> Support:
    """As many columns as an equal share of the bytes holds, and no rank."""
    W_OI, gram_II = problem.W_OI, problem.metric.gram
    per_column = Layer(columns=1).nbytes(problem.shape)
    count = int(problem.share // per_column)
    columns_K = column_energies(W_OI, gram_II).topk(count).indices.sort().values
    split = split_columns(gram_II, columns_K)
    lost = energy(W_OI[:, split.free_C], split.schur_CC) / max(energy(W_OI, gram_II), _TINY)
    return Support(torch.tensor([lost], dtype=torch.float64), count, kept=columns_K)


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


def _entries_supports(problem: LayerProblem) -> list[Support]:
    """Every so many entries without a rank: at 1.25x and 2x low rank in the place of some of them never paid
    (layers of SmolLM2-135M). Errors in between those measured by interpolation of their logarithms.

    Raises: SolverError.
    """
    rows, columns = problem.W_OI.shape
    fractions_N = np.arange(1, _OFFERED) / _OFFERED
    counts = [int(f * rows * columns) for f in _MEASURED]
    measured = [decompose_pruned(problem.W_OI, problem.metric, count).error for count in counts]
    logs_N = np.interp(fractions_N, (0, *_MEASURED), np.log(np.maximum([1.0, *measured], _TINY)))
    above_N = fractions_N > _MEASURED[-1]  # the error falls to none with the cube of what is dropped
    dropped_N = (1 - fractions_N[above_N]) / (1 - _MEASURED[-1])
    logs_N[above_N] += 3 * np.log(dropped_N)
    return [
        Support(torch.tensor([math.exp(log)], dtype=torch.float64), columns, entries=int(f * rows * columns))
        for f, log in zip(fractions_N, logs_N, strict=True)
    ]


def _columns_support(
    W_OI: Tensor, gram_II: Tensor, residual_OI: Tensor, total: float, fraction: float
) -> Support:
    """The columns of largest output energy."""
    count = max(1, round(fraction * W_OI.shape[1]))
    columns_K = column_energies(W_OI, gram_II).topk(count).indices.sort().values
    split = split_columns(gram_II, columns_K)
    errors_R = spectrum_errors(W_OI[:, split.free_C].float(), split.schur_CC.float()).double() / total
    return Support(errors_R.cpu(), columns=count, kept=columns_K)


def _rows_support(
    W_OI: Tensor, gram_II: Tensor, residual_OI: Tensor, total: float, fraction: float
) -> Support:
    """The rows of largest error in the residual of the best half-rank fit."""
    count = max(1, round(fraction * W_OI.shape[0]))
    rows_P = row_gains(residual_OI, gram_II).topk(count).indices.sort().values
    free_OI = W_OI[complement(rows_P, W_OI.shape[0])]
    errors_R = spectrum_errors(free_OI.float(), gram_II.float()).double() / total
    return Support(errors_R.cpu(), rows=count, kept=rows_P)
