"""Low rank plus structured or unstructured sparse at 16 bit: what lrsd, svd and columns share."""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
from torch import Tensor

from lrsd.forms.base import Shape
from lrsd.forms.lowrank import LowRank
from lrsd.methods.base import LayerProblem, Probe, Solution, State, Status, Summand, store
from lrsd.methods.supports import Support, low_rank_errors, packed, sparse_of, supports_of
from lrsd.numerics.lowrank import complement
from lrsd.numerics.menu import Choice, Menu
from lrsd.numerics.solver import Decomposition, decompose, decompose_sparse

# Kinds of S that a layer may have, and those that it is chosen from where nothing else is asked for: they
# save multiply-adds on any machine.
STRUCTURES, EVERYWHERE = ("column", "row", "block", "2:4", "unstructured"), ("column", "row")


def offer(
    problem: LayerProblem,
    structures: Sequence[str],
    *,
    block: int = 16,
    rank: int | None = None,
    pivoted: bool = True,
    bias: bool = False,
) -> Menu:
    """Every rank on top of every support that the structures allow and this layer profits from.

    block: side of the blocks; rank: this one only. Raises: SolverError.
    """
    plain = Support(low_rank_errors(problem))
    menu = partial(menu_of, problem.shape, rank=rank, pivoted=pivoted, bias=bias)

    def at_share(support: Support) -> float:
        offers = menu([support])
        index = offers.within(problem.share)
        return math.inf if index is None else float(offers.errors_N[index])

    supports = [plain]
    for structure in structures if rank is None else ():
        supports += supports_of(problem, structure, block, at_share, plain)
    return menu(supports)


def menu_of(
    shape: Shape,
    supports: Sequence[Support],
    *,
    rank: int | None = None,
    pivoted: bool = True,
    bias: bool = False,
) -> Menu:
    """Offers of at least rank 1 or something that is kept. rank: this one only."""
    parts: list[dict[str, np.ndarray]] = []
    sets: list[Tensor] = []
    for support in supports:
        ranks = np.arange(1 if support.is_empty else 0, support.errors_R.numel())
        if rank is not None:
            ranks = np.array([min(rank, support.errors_R.numel() - 1)])
        if support.kept is not None:
            sets.append(support.kept.cpu())
        layer = support.layer(ranks, pivoted=pivoted, bias=bias)  # type: ignore[arg-type]  # all at once
        alike = support.parameters() | {
            "pivoted": pivoted, "set": len(sets) if support.kept is not None else 0
        }  # fmt: skip
        parts.append(
            {"nbytes": layer.nbytes(shape), "errors": support.errors_R.numpy()[ranks], "rank": ranks}
            | {name: np.full(len(ranks), value) for name, value in alike.items()}
        )
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
    W_OI, rank, sparse = problem.W_OI, choice.count("rank"), sparse_of(choice)
    if sparse is not None:
        found = decompose_sparse(W_OI, problem.metric, sparse, rank=rank, iterations=iterations)
    else:
        found = decompose(
            W_OI, problem.metric.gram, rank=rank, columns=choice.count("columns"), rows=choice.count("rows"),
            start=None if choice.kept is None else choice.kept.to(W_OI.device), alternate=iterations > 1,
        )  # fmt: skip
    free = complement(found.rows_P, found.shape[0])
    pivoted = bool(choice.number("pivoted", 1))
    summands = [Summand(*LowRank.of(problem.unscaled(found.U_FR, free), found.V_RC, pivoted=pivoted))]
    state = State.EXACT if sparse is None else State.BEST if rank else State.PRUNED
    if found.mask_OK is not None:
        values_OI = problem.unscaled(found.column_values_OK)
        summands.append(Summand(*packed(choice, values_OI, found.mask_OK)))
    return store(
        problem, summands, _kept(problem, found), status=Status(state, damping=found.damping),
        history=found.history, corrects_mean=corrects_mean, adds_bias=corrects_mean,
    )  # fmt: skip


def _kept(problem: LayerProblem, found: Decomposition) -> dict[str, Tensor]:
    if found.mask_OK is None and found.columns_K.numel():
        return {"columns": found.columns_K, "column_values": problem.unscaled(found.column_values_OK)}
    if found.rows_P.numel():
        return {"rows": found.rows_P, "row_values": problem.unscaled(found.row_values_PI, found.rows_P)}
    return {}


def probe(problem: LayerProblem) -> Probe:
    """The low-rank fit that an equal share would allow: near the error that the layer will have."""
    W_OI, errors_R = problem.W_OI, low_rank_errors(problem)
    offers = menu_of(problem.shape, [Support(errors_R)])
    index = offers.within(problem.share)
    rank = 1 if index is None else offers.choice(index).count("rank") or 1
    rank = min(rank, min(W_OI.shape) - 1)
    U_OR = problem.spectrum.basis_OR[:, :rank]
    return Probe(problem.unscaled(U_OR @ (U_OR.T @ W_OI)).float(), float(errors_R[rank]))
