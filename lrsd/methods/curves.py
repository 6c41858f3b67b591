"""What one layer offers: its error over bytes, for every form that the settings allow."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lrsd.methods.base import Perturbation
from lrsd.model.layout import LinearSpec
from lrsd.numerics.allocate import VALUE_BYTES, LayerCurve, LayerPlan, Shape, Support, index_bytes
from lrsd.numerics.lowrank import Spectrum, complement, spectrum, spectrum_errors
from lrsd.numerics.moments import Moments, energy
from lrsd.numerics.quantize import Feedback
from lrsd.numerics.rates import grid_plans, lattice_plans, quantiser
from lrsd.numerics.structured import column_energies, row_gains, split_columns
from lrsd.settings import CompressionSettings

# Kept fractions of a layer's columns or rows that are tried, and the two that a search begins at.
_FRACTIONS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)
_STARTS = (2, 4)
# Columns of the source paper's S: k << n, and the share of a Gaussian-to-Laplacian column that lies
# above its mean magnitude (43 % to 37 %), taken at the lower end so that the budget holds.
_SSD_COLUMNS = 1 / 32
_SSD_KEPT = 0.37
# Ranks offered beside entropy-coded weights. On SmolLM2-135M a byte spent on rank there pays in the first
# block's query projection only.
_CODED_RANKS = (0, 4, 16)
# Shares of the columns that may stay at 16 bit beside codes of a fixed width.
_OUTLIER_SHARES = (0, 1 / 64, 1 / 32)
# Widest codes of a sensitivity probe.
_PROBE_BITS = 4
_TINY = torch.finfo(torch.float64).tiny
# Unstructured S of the ablation: the share of a layer's byte budget that goes to it.
_UNSTRUCTURED_SHARE = 0.25


def metric(settings: CompressionSettings, moments: Moments) -> Tensor:
    """The metric a method measures weight errors in; (I, I) float64.

    lrsd, ssd and SVD-LLM use G = E[x x^T]; ASVD the diagonal (mean |x|)^(2 alpha), here with
    E[x^2]^alpha, alpha = 0.5; plain SVD the identity.
    """
    gram_II = moments.gram
    if settings.method == "svd":
        return torch.eye(moments.width, dtype=gram_II.dtype, device=gram_II.device)
    if settings.method == "asvd":
        return torch.diag(gram_II.diagonal().clamp(min=0).sqrt())
    return gram_II


def coded_curve(
    W_OI: Tensor, gram_II: Tensor, carry: Feedback, spec: LinearSpec, settings: CompressionSettings
) -> LayerCurve:
    """What a layer offers with integer codes: steps or widths, beside some ranks or kept columns."""
    if settings.code_widths:
        # A published method keeps them only when asked to.
        outliers = ("auto", "column") if settings.method == "lrsd" else ("column",)
        shares = _OUTLIER_SHARES if settings.structure in outliers else (0,)
        columns = [round(share * spec.shape.in_features) for share in shares]
        plans = grid_plans(
            W_OI, gram_II, carry, widths=settings.code_widths, group=settings.group, columns=columns
        )
        return LayerCurve(spec.shape, (), coded=plans)
    # Of a layer that puts nothing out every form is exact.
    total = energy(W_OI.float(), gram_II.float()) or math.inf
    offered = _CODED_RANKS if settings.rank is None else (settings.rank,)
    ranks = [min(rank, *W_OI.shape) for rank in offered]
    whole = spectrum(W_OI.float(), gram_II.float()) if any(ranks) else None
    plans = lattice_plans(W_OI, carry, whole, total, ranks)
    if settings.mean_correction and not spec.has_bias:
        plans = tuple(replace(plan, bias=True) for plan in plans)
    return LayerCurve(spec.shape, (), coded=plans)


def layer_curve(
    W_OI: Tensor, gram_II: Tensor, whole: Spectrum, spec: LinearSpec, settings: CompressionSettings
) -> LayerCurve:
    """Relative error over rank, for each support that the settings allow and this layer profits from.

    Args: whole: the spectrum of W in the metric G.
    """
    total = max(float(whole.energies_R.sum()), _TINY)
    bias = settings.mean_correction and settings.method == "lrsd" and not spec.has_bias
    pivoted = settings.method in ("lrsd", "ssd")

    def curve(supports: Sequence[Support]) -> LayerCurve:
        return LayerCurve(spec.shape, tuple(supports), pivoted, bias)

    plain = Support(0, 0, (whole.errors() / total).cpu())
    if settings.method == "ssd":
        columns = max(1, round(spec.shape.in_features * _SSD_COLUMNS))
        entries = int(_SSD_KEPT * columns * spec.shape.out_features)
        return curve([Support(columns, 0, plain.errors_R, entries)])
    if settings.method == "columns":
        return curve([_pruned(W_OI, gram_II, total, settings)])
    if settings.method != "lrsd" or settings.structure == "none":
        return curve([plain])
    if settings.structure == "unstructured":
        return curve([unstructured_support(plain, spec.shape, settings)])
    supports = [plain]
    half_OR = whole.basis_OR[:, : min(W_OI.shape) // 2]
    residual_OI = W_OI - half_OR @ (half_OR.T @ W_OI)

    def at_target(support: Support) -> LayerPlan | None:
        return curve([support]).best_within(spec.shape.dense_bytes / settings.ratio)

    for structure, measure in (("column", _columns_support), ("row", _rows_support)):
        if settings.structure in ("auto", structure):
            supports += _search(partial(measure, W_OI, gram_II, residual_OI, total), at_target, plain)
    return curve(supports)


def _pruned(W_OI: Tensor, gram_II: Tensor, total: float, settings: CompressionSettings) -> Support:
    """As many columns as a uniform share of the bytes holds, each with its index, and no rank."""
    out_features, in_features = W_OI.shape
    per_column = VALUE_BYTES * out_features + index_bytes(in_features)
    count = int(VALUE_BYTES * W_OI.numel() / settings.ratio // per_column)
    columns_K = column_energies(W_OI, gram_II).topk(count).indices.sort().values
    split = split_columns(gram_II, columns_K)
    lost = energy(W_OI[:, split.free_C], split.schur_CC) / total
    return Support(count, 0, torch.tensor([lost], dtype=torch.float64), kept=columns_K)


def unstructured_support(plain: Support, shape: Shape, settings: CompressionSettings) -> Support:
    """A fixed share of the layer's bytes for single entries; errors are those of low rank alone."""
    entries = int(_UNSTRUCTURED_SHARE * shape.dense_bytes / settings.ratio / VALUE_BYTES)
    return Support(shape.in_features, 0, plain.errors_R, entries)


def _search(
    measure: Callable[[float], Support], at_target: Callable[[Support], LayerPlan | None], plain: Support
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
            errors[position] = error(found[position])

    def error(support: Support) -> float:
        plan = at_target(support)
        return plan.error if plan is not None else math.inf

    for position in _STARTS:
        visit(position)
    if min(errors.values()) >= error(plain):
        return []
    best = None
    while best != min(errors, key=errors.__getitem__):
        best = min(errors, key=errors.__getitem__)
        visit(best - 1)
        visit(best + 1)
    return [found[position] for position in sorted(found)]


def _columns_support(
    W_OI: Tensor, gram_II: Tensor, residual_OI: Tensor, total: float, fraction: float
) -> Support:
    """The columns of largest output energy."""
    count = max(1, round(fraction * W_OI.shape[1]))
    columns_K = column_energies(W_OI, gram_II).topk(count).indices.sort().values
    split = split_columns(gram_II, columns_K)
    errors_R = spectrum_errors(W_OI[:, split.free_C].float(), split.schur_CC.float()).double() / total
    return Support(count, 0, errors_R.cpu(), kept=columns_K)


def _rows_support(
    W_OI: Tensor, gram_II: Tensor, residual_OI: Tensor, total: float, fraction: float
) -> Support:
    """The rows of largest error in the residual of the best half-rank fit."""
    count = max(1, round(fraction * W_OI.shape[0]))
    rows_P = row_gains(residual_OI, gram_II).topk(count).indices.sort().values
    free_OI = W_OI[complement(rows_P, W_OI.shape[0])]
    errors_R = spectrum_errors(free_OI.float(), gram_II.float()).double() / total
    return Support(0, count, errors_R.cpu(), kept=rows_P)


def rounded(
    spec: LinearSpec,
    W_OI: Tensor,
    gram_II: Tensor,
    carry: Feedback,
    curve: LayerCurve,
    settings: CompressionSettings,
) -> Perturbation:
    """The layer rounded as a uniform plan would have it, or to 4 bit where that has more: below, the
    change of the output drowns in the arithmetic."""
    shape = curve.shape
    share = min(shape.dense_bytes / settings.ratio, _PROBE_BITS / 16 * shape.dense_bytes)
    fitting = [plan for plan in curve.coded if plan.nbytes(shape) <= share]
    plan = fitting[-1] if fitting else curve.coded[0]
    assert plan.codes is not None
    approximation_OI = quantiser(plan.codes)(W_OI, carry).dense()
    W_OI, gram_II = W_OI.float(), gram_II.float()
    lost, total = energy(W_OI - approximation_OI, gram_II), energy(W_OI, gram_II)
    return Perturbation(spec, approximation_OI, lost / max(total, _TINY))


def truncated(
    spec: LinearSpec, W_OI: Tensor, whole: Spectrum, curve: LayerCurve, settings: CompressionSettings
) -> Perturbation:
    """The low-rank fit that this layer would get under a uniform plan: a probe near its later error."""
    low_rank_only = replace(curve, supports=curve.supports[:1])
    plan = low_rank_only.best_within(curve.shape.dense_bytes / settings.ratio)
    rank = plan.rank if plan is not None and plan.rank is not None else 1
    rank = min(rank, min(W_OI.shape) - 1)
    U_OR = whole.basis_OR[:, :rank]
    return Perturbation(spec, (U_OR @ (U_OR.T @ W_OI)).float(), float(curve.supports[0].errors_R[rank]))
