"""From one layer's plan to its decomposition."""

from torch import Tensor

from lrsd.numerics.allocate import LayerCurve, LayerPlan
from lrsd.numerics.quantize import Feedback
from lrsd.numerics.rates import quantiser
from lrsd.numerics.solver import (
    Decomposition,
    columns_beside_codes,
    decompose,
    decompose_coded,
    decompose_thresholded,
)
from lrsd.settings import CompressionSettings


def solve_layer(
    W_OI: Tensor,
    gram_II: Tensor,
    plan: LayerPlan,
    curve: LayerCurve,
    settings: CompressionSettings,
    *,
    carry: Feedback | None,
    alternate: bool,
) -> Decomposition:
    """The decomposition that a plan asks for, from the columns or rows that the survey found."""
    assert plan.rank is not None, "dense layers are not solved"
    if plan.codes is not None:
        split, beside = columns_beside_codes(W_OI, gram_II, plan.columns, carry)
        return decompose_coded(
            W_OI, gram_II, quantiser(plan.codes), split, beside, rank=plan.rank,
            iterations=settings.alternations if alternate else 1,
        )  # fmt: skip
    support = curve.support_of(plan)
    assert support is not None, "a plan's support is one of its curve's"
    if plan.entries is not None:
        return decompose_thresholded(
            W_OI, gram_II, rank=plan.rank, columns=plan.columns, entries=plan.entries,
            iterations=settings.alternations if alternate else 1,
        )  # fmt: skip
    start = None if support.kept is None else support.kept.to(W_OI.device)
    return decompose(
        W_OI, gram_II, rank=plan.rank, columns=plan.columns, rows=plan.rows, start=start, alternate=alternate
    )
