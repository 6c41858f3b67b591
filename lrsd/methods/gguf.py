"""Blocks of integers as llama.cpp reads them, a type for each layer."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrsd.errors import SettingsError
from lrsd.forms.base import Shape
from lrsd.forms.ggml import BLOCK_TYPES, Ggml, usable_types
from lrsd.forms.layer import Layer
from lrsd.methods.base import LayerProblem, Method, Probe, Solution, State, Status, Summand, store
from lrsd.numerics.blocks import (
    BlockCodes,
    nearest_error,
    remaining_variances,
    round_to_blocks,
    rounded_to_nearest,
)
from lrsd.numerics.menu import Choice, Menu
from lrsd.numerics.metric import Metric
from lrsd.numerics.moments import Moments
from lrsd.settings import Allocation, check_options, option

# Bits per weight, scales and all, near which a layer is rounded to see how far the prediction is off, and
# perturbed to see how sensitive the output is.
_MEASURED_BITS = 4.5
# Rows on which the errors of all types are predicted: rows of a layer are much alike.
_PREDICTED_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Gguf(Method):
    """W_ij ~ d sc_g q_ij - e m_g in the block types of llama.cpp, a type per layer.

    min tr((W - A) G (W - A)^T) by error feedback (GPTQ, ICLR 2023), then by coordinate descent over
    everything that is stored (see `numerics.blocks`).
    """

    default_allocation: ClassVar[Allocation] = "kl"
    propagates: ClassVar[bool] = True
    rounds: ClassVar[bool] = True
    copies_dense: ClassVar[bool] = True

    types: str = option(
        ",".join(BLOCK_TYPES),
        "Block types of llama.cpp, of which each tensor has one whose blocks divide its rows, or the "
        "source's own.",
        metavar="TYPE,...",
        shown="all",
    )
    sweeps: int = option(5, "Rounds of coordinate descent over scales and codes.", least=0)

    def __post_init__(self) -> None:
        check_options(self)
        if unknown := [name for name in self._types if name not in BLOCK_TYPES] or not self._types:
            raise SettingsError(f"types must be among {', '.join(BLOCK_TYPES)}, got {str(unknown)!r:.60}")

    @property
    def _types(self) -> list[str]:
        return [name.strip() for name in self.types.split(",")]

    def metric(self, moments: Moments) -> Metric:
        return Metric(moments.gram, damps_by_channel=True)

    def offer(self, problem: LayerProblem) -> Menu:
        """Every type that divides the columns, errors predicted from plain rounding and set right by rounding
        once; nothing but the dense weight where none does. Raises: SolverError."""
        shape, names = problem.shape, self._usable(problem.shape)
        if not names:
            return Menu.of(shape.dense_bytes)
        variances_I, W_OI = remaining_variances(problem.metric.factor), problem.W_OI.float()
        energy = problem.energy or math.inf
        W_RI = W_OI[:: -(-len(W_OI) // _PREDICTED_ROWS)]
        times = len(W_OI) / len(W_RI)
        predicted = {name: times * nearest_error(W_RI, variances_I, BLOCK_TYPES[name].grid) for name in names}
        nearest = self._near(names)
        found = problem.metric.energy(W_OI - self._round(problem, nearest, 0).dense())
        factor = found / predicted[nearest] if predicted[nearest] else 1.0
        return Menu.of(
            shape.dense_bytes,
            [Layer(terms=(Ggml(BLOCK_TYPES[name].number),)).nbytes(shape) for name in names],
            [factor * predicted[name] / energy for name in names],
            {"type": [BLOCK_TYPES[name].number for name in names]},
        )

    def solve(self, problem: LayerProblem, choice: Choice, *, quick: bool = False) -> Solution:
        kind = Ggml(choice.count("type")).kind
        form, tensors = Ggml.of(kind, self._round(problem, kind, 0 if quick else self.sweeps))
        status = Status(State.ROUNDED, damping=problem.metric.factor.damping)
        return store(problem, [Summand(form, tensors)], status=status)

    def probe(self, problem: LayerProblem, menu: Menu) -> Probe:
        """The layer near 4 bit: below, the change of the output drowns in the arithmetic."""
        if not (names := self._usable(problem.shape)):
            return Probe(problem.W_OI.float(), 0.0)
        A_OI = self._round(problem, self._near(names), 0).dense()
        error = problem.metric.energy(problem.W_OI.float() - A_OI)
        return Probe(A_OI, error / max(problem.energy, torch.finfo(torch.float64).tiny))

    def probe_of_rows(self, W_OI: Tensor, weights_I: Tensor) -> Tensor:
        """A large matrix near 4 bit, each weight by itself."""
        names = self._usable(Shape(*W_OI.shape))
        return (
            rounded_to_nearest(W_OI, weights_I, BLOCK_TYPES[self._near(names)].grid).dense()
            if names
            else W_OI
        )

    def priced(self, menu: Menu, shape: Shape) -> Menu:
        """The same offers for a matrix of that shape."""
        kinds = [Ggml(int(number)) for number in menu.parameters.get("type", ())]
        sizes = [Layer(terms=(kind,)).nbytes(shape) for kind in kinds]
        return Menu.of(shape.dense_bytes, sizes, menu.errors_N[:-1], menu.parameters)

    def _usable(self, shape: Shape) -> list[str]:
        return [name for name in usable_types(shape.in_features) if name in self._types]

    def _near(self, names: list[str]) -> str:
        def distance(name: str) -> float:
            kind = BLOCK_TYPES[name]
            return abs(8 * kind.nbytes / kind.grid.block - _MEASURED_BITS)

        return min(names, key=distance)

    def _round(self, problem: LayerProblem, kind: str, sweeps: int) -> BlockCodes:
        metric = problem.metric
        return round_to_blocks(
            problem.W_OI, metric.factor, metric.damped, BLOCK_TYPES[kind].grid, sweeps=sweeps
        )
