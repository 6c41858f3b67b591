"""Baseline: GPTQ."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from lrsd.methods import coded
from lrsd.methods.base import LayerProblem, Method, Probe, Solution
from lrsd.numerics.menu import Choice, Menu
from lrsd.settings import check_options, option


@dataclass(frozen=True, kw_only=True)
class Gptq(Method):
    """Asymmetric integer codes in groups of columns, rounded with error feedback in activation order; the
    width mixed among the layers where one does not fill the bytes. Source: GPTQ (ICLR 2023)."""

    rounds: ClassVar[bool] = True

    bits: Literal["auto", "8", "6", "5", "4", "3", "2"] = option(
        "auto", "Width of the codes; auto: what fits."
    )
    group: int = option(64, "Columns per scale and zero of group-wise codes.", least=1)
    structure: Literal["none", "column"] = option("none", "column: outlier columns at 16 bit.")

    def __post_init__(self) -> None:
        check_options(self)

    def offer(self, problem: LayerProblem) -> Menu:
        widths = coded.WIDTHS if self.bits == "auto" else (int(self.bits),)
        shares = coded.OUTLIER_SHARES if self.structure == "column" else (0.0,)
        return coded.offer_groupwise(problem, widths, self.group, shares)

    def solve(self, problem: LayerProblem, choice: Choice, *, quick: bool = False) -> Solution:
        return coded.solve(problem, choice, iterations=1)

    def probe(self, problem: LayerProblem, menu: Menu) -> Probe:
        return coded.probe(problem, menu)
