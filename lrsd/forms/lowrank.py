"""Low rank: two factors, the first of which may be rows of the matrix itself."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import linear

from lrsd.forms.base import Form, Shape, Spec, Specs, Tensors, check_indices, index_type, interleave
from lrsd.numerics.lowrank import pivot_factors


@dataclass(frozen=True, slots=True)
class LowRank(Form):
    """L of rank r. pivoted: as r of its own rows and the coefficients of the others, r(O + I - r) numbers;
    else as two factors, r(O + I).

    | tensor       | size        | what                                             |
    |--------------|-------------|--------------------------------------------------|
    | weight       | (r, I)      | pivot rows of L; V if unpivoted                  |
    | coefficients | (O - r, r)  | other rows in terms of the pivots; (O, r) U      |
    | pivots       | (r,) int    | which rows the pivots are, ascending             |

    One factor is named `weight` on purpose: a loader that does not know this layer then fails on its shape
    instead of running with random weights.
    Source: Zhao et al., "Pivoting Factorization", ICML 2025.
    """

    rank: int = 0
    pivoted: bool = True
    name: ClassVar[str] = "low_rank"

    def __post_init__(self) -> None:
        if isinstance(self.rank, int) and self.rank < 0:
            raise ValueError(f"rank is {self.rank}")

    @staticmethod
    def of(U_OR: Tensor, V_RI: Tensor, *, pivoted: bool = True) -> tuple["LowRank", dict[str, Tensor]]:
        """L = U V. Raises: ValueError if U lacks full column rank."""
        form = LowRank(U_OR.shape[1], pivoted)
        if not pivoted:
            return form, {"weight": V_RI, "coefficients": U_OR}
        factors = pivot_factors(U_OR, V_RI)
        tensors = {"weight": factors.rows_RI, "coefficients": factors.coefficients_QR}
        return form, tensors | ({"pivots": factors.pivots_R} if form.rank else {})

    def tensors(self, shape: Shape) -> Specs:
        pivots = self.rank if self.pivoted else 0
        specs = {
            "weight": Spec((self.rank, shape.in_features)),
            "coefficients": Spec((shape.out_features - pivots, self.rank)),
        }
        if not isinstance(pivots, int) or pivots:
            specs["pivots"] = Spec((pivots,), index_type(shape.out_features))
        return specs

    def fits(self, shape: Shape) -> bool:
        return self.rank <= min(shape.out_features, shape.in_features)

    def check(self, tensors: Tensors, shape: Shape) -> None:
        if "pivots" in tensors:
            check_indices("pivots", tensors["pivots"], shape.out_features)

    def forward(self, loaded: Tensors, x: Tensor, shape: Shape) -> Tensor:
        z = linear(x, loaded["weight"])
        others = linear(z, loaded["coefficients"])
        return interleave(z, others, loaded["pivots"]) if "pivots" in loaded else others

    def dense(self, loaded: Tensors, shape: Shape) -> Tensor:
        z_IR = loaded["weight"].float().T.contiguous()
        others_IO = linear(z_IR, loaded["coefficients"].float())
        L_IO = interleave(z_IR, others_IO, loaded["pivots"]) if "pivots" in loaded else others_IO
        return L_IO.T.contiguous()

    def describe(self) -> str:
        return f"rank {self.rank}"
