"""SSD, the source paper's method: low rank plus the large entries of a few channels, and codes on top."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from lrsd.errors import SettingsError, SolverError
from lrsd.forms.base import Form, Shape
from lrsd.forms.coded_low_rank import CodedLowRank
from lrsd.forms.groupwise import Groupwise
from lrsd.forms.layer import Layer
from lrsd.forms.lowrank import LowRank
from lrsd.forms.masked import Masked
from lrsd.methods import low_rank_sparse
from lrsd.methods.base import LayerProblem, Method, Probe, Solution, State, Status, Summand, store
from lrsd.numerics.allocate import allocated_bytes, unreachable
from lrsd.numerics.blocks import remaining_variances
from lrsd.numerics.menu import Choice, Menu
from lrsd.numerics.rounding import GroupCodes, nearest_groupwise, round_groupwise
from lrsd.numerics.thresholded import Entries, Singular, Thresholded, decompose_ssd, large_entries
from lrsd.settings import Allocation, check_options, option

# Energies tau that are tried, as 1 - tau in a geometric ladder down to 0.5 %, of how many of which one is
# measured, and shares of the dense bytes that S may take.
_ENERGIES = tuple(1 - 0.95 * 0.96**step for step in range(128))
_EVERY = 24
_SHARES = (0.0, 1 / 32, 1 / 8, 1 / 4, 1 / 2)
# What an offer is found again by.
_LADDER = ("energy", "share")
_TINY = 1e-30


def parse_energy(text: str) -> str | float:
    """ "auto", or a share such as 0.9. Raises: SettingsError."""
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise SettingsError(f"energy must be auto or a share such as 0.9, got {text!r:.40}") from None


@dataclass(frozen=True, kw_only=True)
class Ssd(Method):
    """W ~ L + S: L = SVD_r(W - S) with the least rank that holds the share tau of the singular energy; S the
    entries above their channel's mean magnitude in the channels of largest l2 norm of W - L, as many as fit.

    One tau for all layers: of those that meet the total ratio, S taking the bytes that L leaves, the one of
    least output error of L + S on the calibration text. With --bits, "triple compression": codes by GPTQ for
    W - L - S, in turns with both.
    Source: "Compact and Compressible Representations for LLMs Using Structured Sparse Decomposition"
    (ACL 2025), section 3.
    """

    default_allocation: ClassVar[Allocation] = "energy"
    has_own_rule: ClassVar[bool] = True
    fills_bytes: ClassVar[bool] = False

    structure: Literal["column", "row", "none"] = option(
        "column",
        "What S keeps on top of the low rank: input channels (column), output channels (row), or none.",
    )
    threshold: bool = option(
        True, "Keep only the entries above their channel's mean magnitude, else whole channels."
    )
    energy: float | str = option(
        "auto",
        "Share of the singular energy that the low rank holds; auto: what loses least at the ratio.",
        metavar="auto|SHARE",
        parse=parse_energy,
    )
    bits: Literal["16", "8", "6", "5", "4", "3", "2"] = option(
        "16", "16: low rank and sparse only; others: codes of this width for what they leave, too."
    )
    group: int = option(64, "Columns per scale and zero of group-wise codes.", least=1)
    factor_bits: Literal["16", "8", "4"] = option("16", "Width of the low rank's factors.")
    alternations: int = option(5, "Rounds of choosing S and fitting L at most; 1 is none.", least=1)

    def __post_init__(self) -> None:
        check_options(self)
        if self.energy != "auto" and not (isinstance(self.energy, float | int) and 0 <= self.energy <= 1):
            raise SettingsError(f"energy must be auto or a share from 0 to 1, got {self.energy!r:.40}")

    @property
    def rounds(self) -> bool:  # type: ignore[override]  # a setting here, a fact of the method elsewhere
        return self.bits != "16"

    def allocation(self, asked: Allocation) -> str:
        if asked not in ("auto", "energy"):
            raise SettingsError(
                f"method ssd shares bytes by one energy threshold, not by allocation {asked}; leave it out, "
                "or use --method lrsd"
            )
        return "energy"

    def offer(self, problem: LayerProblem) -> Menu:
        """Every tau with every share of S, without alternation: errors measured at some of the ranks, in
        between by interpolation of their logarithms. Raises: SolverError."""
        shape, singular = problem.shape, Singular.of(problem.W_OI)
        energies = [float(self.energy)] if self.energy != "auto" else list(_ENERGIES)
        ranks = [singular.rank_at(energy) for energy in energies]
        fixed = [self._layer(shape, rank).nbytes(shape) for rank in ranks]
        measured = sorted({*ranks[::_EVERY], ranks[-1]})
        shares = _SHARES if self.structure != "none" else (0.0,)
        seen = [self._measured(problem, singular, rank, shares) for rank in measured]
        factor = self._calibrated(problem, ranks[0], fixed[0], seen[0][0][1]) if self.rounds else 1.0
        offers = list[tuple[float, ...]]()
        for number, share in enumerate(shares):
            taken, lost = zip(*(row[number] for row in seen), strict=True)
            taken_N = np.interp(ranks, measured, taken)
            logs_N = np.interp(ranks, measured, np.log(np.maximum(lost, _TINY)))
            lost_N = factor * np.exp(logs_N)
            for place, energy in enumerate(energies):
                nbytes = fixed[place] + int(taken_N[place])
                if nbytes < shape.dense_bytes and (ranks[place] or taken_N[place] or self.rounds):
                    offers.append((nbytes, float(lost_N[place]), ranks[place], energy, share))
        names = ("nbytes", "errors", "rank", "energy", "share")
        columns = (
            dict(zip(names, zip(*offers, strict=True), strict=True)) if offers else dict.fromkeys(names, ())
        )
        return Menu.every(shape.dense_bytes, columns.pop("nbytes"), columns.pop("errors"), columns)

    def _measured(
        self, problem: LayerProblem, singular: Singular, rank: int, shares: Sequence[float]
    ) -> list[tuple[float, float]]:
        """Bytes that S may take, and the error of L + S then, at every share: fewer than the share where all
        channels are in it."""
        shape = problem.shape
        residual_OI = problem.W_OI.float()
        if rank:
            residual_OI = residual_OI - self._stored_low_rank(*singular.factors(rank))
        found = []
        for share in shares:
            limit = share * shape.dense_bytes
            entries = self._select(residual_OI, limit, shape)
            if entries.groups.numel() == residual_OI.shape[0 if self.structure == "row" else 1]:
                limit = self._layer(shape, 0, entries).nbytes(shape) - self._layer(shape, 0).nbytes(shape)
            found.append((limit, self._lost(problem, residual_OI * ~entries.mask_OI)))
        return found

    def share(self, menus: Mapping[str, Menu], budget: int) -> dict[str, Choice]:
        """One tau, and one share of S, for all layers: that of least summed relative output error within the
        budget, S taking all bytes that are left. Layers whose L would take more than the weight stay dense.

        Raises: BudgetError.
        """
        places = {
            name: {
                key: i
                for i, key in enumerate(zip(*(menu.parameters[p].tolist() for p in _LADDER), strict=True))
            }
            for name, menu in menus.items()
        }
        best: tuple[float, dict[str, int]] | None = None
        for energy in sorted({key[0] for known in places.values() for key in known}):
            ladder = [
                {name: known.get((energy, share), len(menus[name]) - 1) for name, known in places.items()}
                for share in _SHARES
                if any((energy, share) in known for known in places.values())
            ]
            nbytes = [allocated_bytes(menus, picks) for picks in ladder]
            errors = [sum(float(menus[n].errors_N[i]) for n, i in picks.items()) for picks in ladder]
            within = [number for number, size in enumerate(nbytes) if size <= budget]
            if within:
                expected = float(np.interp(budget, nbytes, errors))
                if best is None or expected < best[0]:
                    best = expected, ladder[within[-1]]
        if best is None:
            raise unreachable(menus, budget)
        choices = {name: menus[name].choice(index) for name, index in best[1].items()}
        left = budget - sum(choice.nbytes for choice in choices.values())
        open_bytes = sum(menus[name].dense_bytes for name, c in choices.items() if not c.is_dense)
        for name, choice in choices.items():
            if not choice.is_dense:
                dense = menus[name].dense_bytes
                choices[name] = replace(
                    choice, nbytes=min(choice.nbytes + left * dense // open_bytes, dense - 1)
                )
        return choices

    def solve(self, problem: LayerProblem, choice: Choice, *, quick: bool = False) -> Solution:
        shape = problem.shape

        def select(residual_OI: Tensor, rank: int) -> Entries:
            return self._select(residual_OI, choice.nbytes - self._layer(shape, rank).nbytes(shape), shape)

        found = decompose_ssd(
            problem.W_OI, problem.metric, rank=partial(self._rank, shape, choice),
            select=select, low_rank=self._stored_low_rank,
            quantize=partial(self._quantized, problem) if self.rounds else None,
            iterations=1 if quick else self.alternations,
        )  # fmt: skip
        damping = problem.metric.factor.damping if self.rounds else 0.0
        state = State.ROUNDED if self.rounds else State.BEST
        status = Status(state, damping=damping)
        return store(problem, list(self._summands(found)), status=status, history=found.history)

    def probe(self, problem: LayerProblem, menu: Menu) -> Probe:
        return low_rank_sparse.probe(problem)

    def _summands(self, found: Thresholded) -> Iterator[Summand]:
        if found.U_OR.shape[1]:
            yield Summand(*self._low_rank(found.U_OR, found.V_RI))
        groups, mask_OI = found.entries.groups, found.entries.mask_OI
        if groups.numel():
            rows = self.structure == "row"
            values, mask = (m.T if rows else m for m in (found.values_OI, mask_OI))
            yield Summand(*Masked.of(values[:, groups], mask[:, groups], groups, mask.shape[1], outputs=rows))
        if isinstance(found.codes, GroupCodes):
            yield Summand(*Groupwise.of(found.codes))

    def _layer(self, shape: Shape, rank: int, entries: Entries | None = None) -> Layer:
        terms: list[Form] = []
        if rank:
            terms.append(
                LowRank(rank) if self.factor_bits == "16" else CodedLowRank(rank, int(self.factor_bits))
            )
        if entries is not None and entries.groups.numel():
            terms.append(Masked(entries.groups.numel(), int(entries.mask_OI.sum()), self.structure == "row"))
        if self.rounds:
            terms.append(Groupwise(int(self.bits), self.group))
        return Layer(terms=tuple(terms))

    def _rank(self, shape: Shape, choice: Choice, entries: Entries | None) -> int:
        """That of tau; where S has all the channels that it may have, what fits beside it."""
        rank = choice.count("rank")
        channels = {"column": shape.in_features, "row": shape.out_features, "none": 0}[self.structure]
        if rank and entries is not None and entries.groups.numel() == channels:
            while rank < min(shape.out_features, shape.in_features) and (
                self._layer(shape, rank + 1, entries).nbytes(shape) <= choice.nbytes
            ):
                rank += 1
        return rank

    def _select(self, residual_OI: Tensor, limit: float, shape: Shape) -> Entries:
        rows = self.structure == "row"
        if self.structure == "none":
            limit = -1

        def nbytes(groups: Tensor, entries: Tensor) -> Tensor:
            form: Any = Masked(groups.cpu().numpy(), entries.cpu().numpy(), rows)  # type: ignore[arg-type]  # all at once
            return torch.from_numpy(form.nbytes(shape)).to(groups.device)

        return large_entries(residual_OI, nbytes, limit, rows=rows, thresholds=self.threshold)

    def _low_rank(self, U_OR: Tensor, V_RI: Tensor) -> tuple[Form, dict[str, Tensor]]:
        return (
            LowRank.of(U_OR, V_RI)
            if self.factor_bits == "16"
            else CodedLowRank.of(U_OR, V_RI, int(self.factor_bits))
        )

    def _stored_low_rank(self, U_OR: Tensor, V_RI: Tensor) -> Tensor:
        if self.factor_bits == "16":
            return U_OR @ V_RI
        form, tensors = CodedLowRank.of(U_OR, V_RI, int(self.factor_bits))
        shape = Shape(U_OR.shape[0], V_RI.shape[1])
        return form.dense(form.load(tensors, shape), shape)

    def _quantized(self, problem: LayerProblem, residual_OI: Tensor) -> tuple[GroupCodes, Tensor]:
        codes = round_groupwise(residual_OI, problem.metric.factor, int(self.bits), self.group, problem.dtype)
        return codes, codes.dense()

    def _lost(self, problem: LayerProblem, left_OI: Tensor) -> float:
        """Relative output error where all but `left` is stored; with codes, up to a factor, what rounding
        them to the nearest leaves in the variance that other columns cannot explain."""
        if self.rounds:
            nearest_OI = nearest_groupwise(left_OI, int(self.bits), self.group, problem.dtype).dense()
            variances_I = remaining_variances(problem.metric.factor)
            lost = float((((left_OI - nearest_OI) ** 2).sum(0) * variances_I).sum())
        else:
            lost = problem.metric.energy(left_OI)
        if not math.isfinite(lost):
            raise SolverError("the moments of its inputs are not finite")
        return lost / (problem.energy or math.inf)

    def _calibrated(self, problem: LayerProblem, rank: int, nbytes: int, predicted: float) -> float:
        """What predictions with codes are to be multiplied by: seen at one offer."""
        choice = Choice(nbytes, 0.0, {"rank": float(rank)})
        error = self.solve(problem, choice, quick=True).error
        return error / predicted if predicted > 0 and error > 0 else 1.0
