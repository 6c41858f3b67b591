"""Integers around zero in groups of columns, as inference engines read them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from lrsd.errors import SettingsError
from lrsd.forms.layer import Layer
from lrsd.forms.symmetric import Symmetric
from lrsd.methods.base import LayerProblem, Method, Probe, Solution, State, Status, Summand, store
from lrsd.numerics.blocks import BlockCodes, nearest_error, remaining_variances, round_to_blocks
from lrsd.numerics.menu import Choice, Menu
from lrsd.numerics.metric import Metric
from lrsd.numerics.moments import Moments
from lrsd.settings import Allocation, check_options, option

_WIDTHS, _GROUPS = range(2, 9), (32, 64, 128, 256)
# Width at which a layer is rounded to see how far the prediction is off, and widest of a sensitivity probe.
_MEASURED_BITS = 4


@dataclass(frozen=True, kw_only=True)
class Integers(Method):
    """W_ij ~ Q_ij s_ig, Q of 2 to 8 bits around zero, g a group of columns; a width and group size per layer.

    min tr((W - A) G (W - A)^T) by error feedback (GPTQ, ICLR 2023), and then coordinate descent over scales
    and codes (see `numerics.blocks`). Linears that read the same input have the same width and groups, since
    engines fuse them.
    """

    default_allocation: ClassVar[Allocation] = "auto"
    propagates: ClassVar[bool] = True
    rounds: ClassVar[bool] = True
    ties_inputs: ClassVar[bool] = True

    widths: str = option(
        "2,3,4,5,6,8",
        "Widths of the codes, of which each layer has one: 4 for engines on a CPU, 4,8 for SGLang and "
        "older vLLM.",
        metavar="B,...",
    )
    groups: str = option(
        "32,64,128",
        "Columns per scale, of which each layer has one that divides its columns.",
        metavar="N,...",
    )
    sweeps: int = option(5, "Rounds of coordinate descent over scales and codes.", least=0)

    def __post_init__(self) -> None:
        check_options(self)
        _numbers("widths", self.widths, _WIDTHS)
        _numbers("groups", self.groups, _GROUPS)

    def metric(self, moments: Moments) -> Metric:
        return Metric(moments.gram, damps_by_channel=True)

    def offer(self, problem: LayerProblem) -> Menu:
        """Every width with every group size, errors predicted from plain rounding and set right by rounding
        once. Nothing but the dense weight where no group size divides the columns. Raises: SolverError."""
        shape = problem.shape
        widths = _numbers("widths", self.widths, _WIDTHS)
        groups = [size for size in _numbers("groups", self.groups, _GROUPS) if shape.in_features % size == 0]
        if not groups:
            return Menu.of(shape.dense_bytes)
        energy, W_OI = problem.energy or math.inf, problem.W_OI.float()
        variances_I = remaining_variances(problem.metric.factor)
        nearest = Symmetric(min(widths, key=lambda width: abs(width - _MEASURED_BITS)), groups[0])
        predicted = nearest_error(W_OI, variances_I, nearest.grid, problem.dtype)
        factor = _lost(problem, _round(problem, nearest, 0)) / predicted if predicted else 1.0
        offers = [(width, size) for width in widths for size in groups]
        errors = [nearest_error(W_OI, variances_I, Symmetric(*offer).grid, problem.dtype) for offer in offers]
        return Menu.of(
            shape.dense_bytes,
            [Layer(terms=(Symmetric(*offer),)).nbytes(shape) for offer in offers],
            [factor * error / energy for error in errors],
            {"bits": [width for width, _ in offers], "group": [size for _, size in offers]},
        )

    def solve(self, problem: LayerProblem, choice: Choice, *, quick: bool = False) -> Solution:
        form = Symmetric(choice.count("bits"), choice.count("group"))
        summand = Summand(*Symmetric.of(_round(problem, form, 0 if quick else self.sweeps)))
        return store(problem, [summand], status=Status(State.ROUNDED, damping=problem.metric.factor.damping))

    def probe(self, problem: LayerProblem, menu: Menu) -> Probe:
        """The layer at its equal share, or at 4 bit where that has more: below, the change of the output
        drowns in the arithmetic."""
        share = min(problem.share, _MEASURED_BITS / 16 * problem.shape.dense_bytes)
        choice = menu.choice(menu.within(share) or 0)
        if choice.is_dense:
            return Probe(problem.W_OI.float(), 0.0)
        codes = _round(problem, Symmetric(choice.count("bits"), choice.count("group")), 0)
        error = _lost(problem, codes) / max(problem.energy, torch.finfo(torch.float64).tiny)
        return Probe(problem.unscaled(codes.dense()), error)


def _numbers(name: str, text: str, among: Sequence[int]) -> list[int]:
    """ "4,8" as numbers, ascending. Raises: SettingsError unless each is `among` those."""
    words = [word.strip() for word in text.split(",")]
    numbers = {int(word) for word in words if word.isascii() and word.isdecimal() and len(word) < 5}
    if len(numbers) != len(words) or not numbers <= set(among):
        allowed = ", ".join(map(str, among))
        raise SettingsError(f"{name} must be numbers among {allowed}, such as {among[0]}, got {text!r:.40}")
    return sorted(numbers)


def _round(problem: LayerProblem, form: Symmetric, sweeps: int) -> BlockCodes:
    metric = problem.metric
    return round_to_blocks(
        problem.W_OI, metric.factor, metric.damped, form.grid, dtype=problem.dtype, sweeps=sweeps
    )


def _lost(problem: LayerProblem, codes: BlockCodes) -> float:
    return problem.metric.energy(problem.W_OI.float() - codes.dense())
