"""Which plan: bytes shared among layers in several ways, the best on held-out text kept."""

from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from lrsd.config import CompressionSettings
from lrsd.errors import BudgetError
from lrsd.fit import exchange_weight, solve_layer
from lrsd.model.layout import read_weight
from lrsd.model.replay import Replay
from lrsd.numerics.allocate import (
    LayerCurve,
    Plan,
    allocate_by_weight,
    allocate_energy,
    allocate_uniform,
    dense_bytes,
    plan_bytes,
)
from lrsd.numerics.quantize import feedback
from lrsd.progress import Progress
from lrsd.survey import HELD_OUT, Survey, has_codes, metric

# Samples on which plans are compared: their dense logits are held in memory meanwhile.
_COMPARED_SAMPLES = 4
# Least fraction of the average bytes that the allocation may leave a layer: sensitivities are
# local, and a layer far below the average has an error they say nothing about.
_FLOOR = 0.3


def choose_plan(
    replay: Replay,
    survey: Survey,
    tokens: Tensor,
    budget: int,
    settings: CompressionSettings,
    progress: Progress,
) -> tuple[Plan, dict[str, float], str]:
    """The plan, the held-out KL of every plan tried, and the name of the chosen one.

    "auto" tries sensitivities as measured, their square roots (bolder and more timid), and none at
    all, on held-out calibration text without propagation, and keeps the best.
    """
    curves, sensitivity = survey.curves, survey.sensitivity
    if settings.rank is not None and not has_codes(settings):
        return _fixed_rank(curves, budget, settings.rank), {}, "rank"
    if settings.allocates_by == "energy":
        return allocate_energy(curves, budget), {}, "energy"
    if settings.allocates_by == "uniform":
        return allocate_uniform(curves, budget), {}, "uniform"
    floor = _FLOOR / settings.ratio
    by_kl = allocate_by_weight(curves, sensitivity, budget, floor)
    if settings.allocates_by == "kl":
        return by_kl, {}, "kl"
    timid = {name: weight**0.5 for name, weight in sensitivity.items()}
    plans = {
        "kl": by_kl,
        "sqrt-kl": allocate_by_weight(curves, timid, budget, floor),
        "uniform": allocate_uniform(curves, budget),
    }
    progress.stage("compare plans", len(plans))
    divergence = {}
    for name, plan in plans.items():
        divergence[name] = _held_out_divergence(replay, survey, tokens, plan, settings)
        progress.step(name)
    chosen = min(divergence, key=divergence.__getitem__)
    return plans[chosen], divergence, chosen


def _fixed_rank(curves: dict[str, LayerCurve], budget: int, rank: int) -> Plan:
    plan: Plan = {}
    for name, curve in curves.items():
        layer = curve.plan(curve.supports[0], min(rank, curve.supports[0].errors_R.numel() - 1))
        plan[name] = layer if layer.nbytes(curve.shape) < curve.shape.dense_bytes else curve.dense
    if plan_bytes(plan, curves) > budget:
        total = dense_bytes(curves)
        raise BudgetError(
            f"rank {rank} takes {plan_bytes(plan, curves):,} bytes, a ratio of "
            f"{total / plan_bytes(plan, curves):.3g}x; lower the rank or the ratio"
        )
    return plan


def _held_out_divergence(
    replay: Replay, survey: Survey, tokens: Tensor, plan: Plan, settings: CompressionSettings
) -> float:
    """KL(dense || planned) per token on the held-out samples, all layers fitted without propagation."""
    model = replay.model
    held_out = tokens[-max(1, tokens.shape[0] // HELD_OUT) :][:_COMPARED_SAMPLES].to(model.device)
    originals: dict[str, nn.Parameter] = {}
    reference = [log_softmax(model(batch, use_cache=False).logits.float(), -1) for batch in held_out.split(1)]
    for group in replay.layout.groups:
        metric_II = metric(settings, survey.moments[group.name])
        carry = feedback(metric_II) if has_codes(settings) else None
        gram_II = metric_II.float()
        for spec in group.linears:
            layer, curve = plan[spec.name], survey.curves[spec.name]
            if not layer.is_dense:
                # Columns and rows as surveyed: to improve them here would take most of the time.
                found = solve_layer(
                    read_weight(model, spec), gram_II, layer, curve, settings, carry=carry, alternate=False
                )
                originals[spec.name] = exchange_weight(model, spec, found.dense())
    try:
        total = 0.0
        for batch, dense in zip(held_out.split(1), reference, strict=True):
            planned = log_softmax(model(batch, use_cache=False).logits.float(), -1)
            total += float(kl_div(planned, dense, reduction="sum", log_target=True))
        return total / held_out.numel()
    finally:
        for name, weight in originals.items():
            model.get_submodule(name).weight = weight
