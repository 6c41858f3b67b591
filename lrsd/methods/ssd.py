"""SSD, the source paper's method: low rank plus thresholded columns."""

from dataclasses import dataclass
from typing import ClassVar

from lrsd.methods import low_rank_sparse
from lrsd.methods.base import LayerProblem, Method, Probe, Solution
from lrsd.methods.low_rank_sparse import Support
from lrsd.numerics.menu import Choice, Menu
from lrsd.settings import Allocation, check_options, option

# Columns of the paper's S: k << n, and the share of a Gaussian-to-Laplacian column that lies above its mean
# magnitude (43 % to 37 %), taken at the lower end so that the budget holds.
_COLUMNS = 1 / 32
_KEPT = 0.37


@dataclass(frozen=True, kw_only=True)
class Ssd(Method):
    """W ~ L + S, S the entries above their column's mean magnitude within a few columns, truncated SVD of W -
    S alternating with the choice of S on W - L; one energy threshold for all layers.

    Source: "Compact and Compressible Representations for LLMs Using Structured Sparse Decomposition"
    (ACL 2025), section 3.
    """

    default_allocation: ClassVar[Allocation] = "energy"

    alternations: int = option(5, "Rounds of choosing S and fitting L; 1 is none.", least=1)

    def __post_init__(self) -> None:
        check_options(self)

    def offer(self, problem: LayerProblem) -> Menu:
        columns = max(1, round(problem.shape.in_features * _COLUMNS))
        entries = int(_KEPT * columns * problem.shape.out_features)
        errors_R = low_rank_sparse.low_rank_errors(problem)
        return low_rank_sparse.menu_of(problem.shape, [Support(errors_R, columns, entries=entries)])

    def solve(self, problem: LayerProblem, choice: Choice, *, quick: bool = False) -> Solution:
        return low_rank_sparse.solve(problem, choice, iterations=1 if quick else self.alternations)

    def probe(self, problem: LayerProblem, menu: Menu) -> Probe:
        return low_rank_sparse.probe(problem)
