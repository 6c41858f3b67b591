"""What a method is: frozen settings that make offers for a layer, and solve it once one is chosen.

A new method is one file with one class, and one line in `methods.METHODS`; its fields become options of the
command line and keys of a recipe by themselves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrsd.errors import SolverError
from lrsd.forms.base import Form, Shape, Tensors
from lrsd.forms.layer import Layer, assemble
from lrsd.numerics.lowrank import Spectrum, spectrum
from lrsd.numerics.menu import Choice, Menu
from lrsd.numerics.metric import Metric
from lrsd.numerics.moments import Moments
from lrsd.numerics.weights import row_scales
from lrsd.settings import Allocation


class State(StrEnum):
    """What became of a layer."""

    EXACT = "exact"  # a closed form
    ROUNDED = "rounded"
    BEST = "best of several"  # of an alternation
    PRUNED = "pruned"
    TRAINED = "trained"
    DENSE = "dense"  # as allocated
    KEPT = "kept"  # as the source has it
    UNSOLVED = "unsolved"  # left dense, since it has no solution


@dataclass(frozen=True)
class Status:
    """reason: why a layer is unsolved. damping: the ridge, where the usual one did not do; else 0."""

    state: State
    reason: str = ""
    damping: float = 0.0

    def __str__(self) -> str:
        damping = f", damping {self.damping:.0e}" if self.damping else ""
        return f"{self.state}{': ' * bool(self.reason)}{self.reason}{damping}"


@dataclass(frozen=True)
class LayerProblem:
    """min tr((W - A) G (W - A)^T) over what can be stored of one layer.

    W_OI: float64 target. dtype: of the 16-bit values that are stored. share: bytes that an equal share of
    the budget comes to. bias_O: the layer's own; input_mean_I, target_mean_O: means that a bias could
    restore. rows_O: exponents by which the rows of W_OI are scaled, see `weighted`.
    """

    W_OI: Tensor
    metric: Metric
    dtype: torch.dtype
    share: float
    bias_O: Tensor | None = None
    input_mean_I: Tensor | None = None
    target_mean_O: Tensor | None = None
    rows_O: Tensor | None = None

    def weighted(self, rows_O: Tensor | None) -> "LayerProblem":
        """The same with its rows weighed: d_i = 2^(-rows_i / 4) where there are exponents, see
        `numerics.weights`. From here on W_OI is D^(1/2) W, whose every row counts alike; what comes out of a
        solver is scaled back by `unscaled`."""
        if rows_O is None:
            return self
        return replace(self, W_OI=self.W_OI / row_scales(rows_O).to(self.W_OI)[:, None], rows_O=rows_O)

    def unscaled(self, values: Tensor, rows: Tensor | None = None) -> Tensor:
        """Values of a solution, its output channels first, in the layer's own units. rows: which channels
        they are, all by default."""
        if self.rows_O is None:
            return values
        scales = row_scales(self.rows_O if rows is None else self.rows_O[rows.to(self.rows_O.device)])
        return values * scales.to(values)[:, None]

    @property
    def shape(self) -> Shape:
        return Shape(*self.W_OI.shape)

    @cached_property
    def energy(self) -> float:
        """tr(W G W^T)."""
        return self.metric.energy(self.W_OI)

    def single(self) -> "LayerProblem":
        """The same in float32, for a comparison that needs no more."""
        return replace(self, W_OI=self.W_OI.float(), metric=self.metric.single)

    @cached_property
    def spectrum(self) -> Spectrum:
        """Of W G W^T. Raises: SolverError."""
        tall = self.W_OI.shape[0] > self.W_OI.shape[1]
        return spectrum(self.W_OI, self.metric.gram, self.metric.root if tall else None)

    def relative_error(self, approximation_OI: Tensor) -> float:
        """tr(D (W - A) G (W - A)^T) / tr(D W G W^T) of an approximation in the layer's own units; 0 where W
        has no output energy at all."""
        approximation_OI = approximation_OI.float()
        if self.rows_O is not None:
            approximation_OI = approximation_OI / row_scales(self.rows_O).to(approximation_OI)[:, None]
        lost = self.metric.energy(self.W_OI.float() - approximation_OI)
        return lost / self.energy if self.energy > 0 else 0.0


@dataclass(frozen=True)
class Solution:
    """A layer as it is stored, and the weight that this stands for.

    error: relative output error of W_OI; history: errors of an alternation.
    """

    layer: Layer
    tensors: dict[str, Tensor]
    W_OI: Tensor
    error: float
    status: Status
    history: tuple[float, ...] = ()

    def nbytes(self, shape: Shape) -> int:
        return int(self.layer.nbytes(shape))


@dataclass(frozen=True)
class Probe:
    """A layer's weight replaced by an approximation of a known relative output error."""

    W_OI: Tensor
    error: float


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of all methods.

    allocation: how bytes are shared among layers where that is left to the method. propagates: whether it
    is calibrated on the compressed model's activations by default.
    """

    default_allocation: ClassVar[Allocation] = "uniform"
    propagates: ClassVar[bool] = False
    # Whether output channels, and calibration tokens, count by what they do to the output of their block.
    weighs_rows: ClassVar[bool] = False
    weighs_tokens: ClassVar[bool] = False
    # Whether layers are rounded to integers, for which the allocation's promises hold down to small losses.
    rounds: ClassVar[bool] = False
    # Whether a layer that stays dense is taken from the source as it stands there.
    copies_dense: ClassVar[bool] = False
    # Whether bytes are shared by a rule of its own, `share`.
    has_own_rule: ClassVar[bool] = False
    # Whether a layer takes just the bytes of its offer, where these do not depend on an entropy coder; else
    # at most these.
    fills_bytes: ClassVar[bool] = True
    # Whether linears that read the same input are to be stored alike, all at the same offer.
    ties_inputs: ClassVar[bool] = False
    # Whether it trains the model, with gradients, and so makes no offers for a layer (`lrsd.training`).
    trains: ClassVar[bool] = False

    def metric(self, moments: Moments) -> Metric:
        """What weight errors are measured in: G = E[x x^T]."""
        return Metric(moments.gram)

    def allocation(self, asked: Allocation) -> str:
        """How the bytes are shared. asked: the user's, "auto" where it is left to the method."""
        return self.default_allocation if asked == "auto" else asked

    def offer(self, problem: LayerProblem) -> Menu:
        """What the layer can be stored as. Raises: SolverError."""
        raise NotImplementedError

    def share(self, menus: Mapping[str, Menu], budget: int) -> dict[str, Choice]:
        """An offer for every layer, where the method `has_own_rule`. Raises: BudgetError."""
        raise NotImplementedError

    def solve(self, problem: LayerProblem, choice: Choice, *, quick: bool = False) -> Solution:
        """The layer at one of its offers. quick: for a comparison of plans, without alternation.

        Raises: SolverError, or ValueError for what the form cannot hold.
        """
        raise NotImplementedError

    def probe(self, problem: LayerProblem, menu: Menu) -> Probe:
        """An approximation near the error that the layer will have, to measure its effect by."""
        index = menu.within(problem.share)
        choice = menu.choice(0 if index is None else index)
        if choice.is_dense:
            return Probe(problem.W_OI.float(), 0.0)
        solution = self.solve(problem, choice, quick=True)
        return Probe(solution.W_OI, solution.error)

    def adjusted(self, choice: Choice, bits: float) -> Choice | None:
        """The same offer taking so many bits per weight more; None where its bytes are fixed."""
        return None

    def to_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class Summand:
    """A form with its tensors, not yet cast; loaded: what it would read back, where that is at hand."""

    form: Form
    tensors: Mapping[str, Tensor]
    loaded: Tensors | None = None


def store(
    problem: LayerProblem,
    summands: Sequence[Summand],
    kept: Mapping[str, Tensor] | None = None,
    *,
    status: Status,
    history: tuple[float, ...] = (),
    corrects_mean: bool = False,
    adds_bias: bool = False,
) -> Solution:
    """A solution out of forms, cast once to what is stored, and the error of just that.

    Args: kept: columns with column_values, or rows with row_values; corrects_mean: whether a bias makes up
        for what the mean output lost, and adds_bias whether one is added for it where the layer has none.
    Raises: SolverError if it is not finite in the type that it is stored in.
    """
    shape = problem.shape
    layer, tensors = assemble(shape, [(s.form, s.tensors) for s in summands], kept or {}, problem.dtype)
    free = layer.free(shape)
    loaded = [
        s.form.load(layer.part(s.form, tensors, shape), free) if s.loaded is None else s.loaded
        for s in summands
    ]
    W_OI = layer.dense(tensors, loaded, shape)
    if not bool(torch.isfinite(W_OI).all()):
        raise SolverError(f"its solution is not finite in {problem.dtype}")
    bias_O = problem.bias_O
    if corrects_mean and (adds_bias or bias_O is not None):
        assert problem.input_mean_I is not None
        assert problem.target_mean_O is not None
        shift_O = problem.target_mean_O - W_OI.double() @ problem.input_mean_I
        bias_O = shift_O if bias_O is None else bias_O + shift_O
    if bias_O is not None:
        layer = replace(layer, bias=True, added_bias=problem.bias_O is None)
        tensors["bias"] = bias_O.to(problem.dtype)
    return Solution(layer, tensors, W_OI, problem.relative_error(W_OI), status, history)
