"""Which plan: bytes shared among layers in several ways, the best on held-out text kept."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lrsd.errors import BudgetError
from lrsd.methods.curves import metric
from lrsd.model.layout import LinearSpec, exchange_weight, read_weight
from lrsd.model.replay import Replay
from lrsd.model.samples import Samples, answer, distance, run_model
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
from lrsd.settings import CompressionSettings
from lrsd.steps.observe import HELD_OUT, Survey, has_codes, needs_sensitivity
from lrsd.steps.solve import solve_layer
from lrsd.work.journal import Workspace
from lrsd.work.process import release_freed
from lrsd.work.streams import Stream

# KL in nats per token below which a plan for codes is not fitted behind the compressed prefix: on
# SmolLM2-135M at 4x propagation took twice the time of all the rest and lowered the perplexity from 26.83
# to 26.78. --propagate turns it on.
_SMALL_KL = 0.1
# KL below which the plan by sensitivities is not compared with equal shares: on SmolLM2-135M it was the
# better one at 1.25x and 16 bit and at every ratio with codes; at 16 bit and 2x, several nats, it need not
# be.
_TRUSTED_KL = 0.3
# Samples on which plans are compared, and tokens of each: the logits of one are in memory, twice.
_COMPARED_SAMPLES, _COMPARED_TOKENS = 8, 256
# Least fraction of the average bytes that the allocation may leave a layer: sensitivities are
# local, and a layer far below the average has an error they say nothing about.
_FLOOR = 0.3
# The step's name in the journal.
PLAN_STEP = "plan"


@dataclass(frozen=True)
class Choice:
    """A plan, how it was come by, and whether it is to be fitted behind the compressed prefix.

    expected_kl: sum of sensitivity x error, nats per token; None where no sensitivities were measured.
    compared: held-out KL of every plan tried.
    """

    plan: Plan
    name: str
    expected_kl: float | None
    propagate: bool
    compared: dict[str, float] = field(default_factory=dict)


def compared_rows(samples: Samples) -> int:
    """Rows of logits of one sample on which plans are compared."""
    return samples[:1].cut(_COMPARED_TOKENS).positions


def choose_plan(
    replay: Replay,
    survey: Survey,
    samples: Samples,
    budget: int,
    settings: CompressionSettings,
    progress: Progress,
    workspace: Workspace | None = None,
) -> Choice:
    """Share the budget among the layers, and decide on propagation.

    "auto" allocates by sensitivities as measured. Where these promise a small loss the promise holds:
    sensitivities are first-order. Otherwise equal shares are tried too, on held-out calibration text
    without propagation, and the better plan is kept.

    Args: workspace: where the choice is kept, once made.
    """
    workspace = Workspace() if workspace is None else workspace
    if PLAN_STEP not in workspace:

        def divergence(plan: Plan) -> float:
            aside = workspace.new_stream("approximations")
            try:
                return _held_out_divergence(replay, survey, samples, plan, settings, aside)
            finally:
                aside.drop()

        workspace.finish(PLAN_STEP, _choose(survey, budget, settings, progress, divergence))
    return workspace.read(PLAN_STEP, Choice)


def _choose(
    survey: Survey,
    budget: int,
    settings: CompressionSettings,
    progress: Progress,
    divergence: Callable[[Plan], float],
) -> Choice:
    """divergence: the held-out KL of a plan, where plans are to be compared."""
    curves, sensitivity = survey.curves, survey.sensitivity
    floor = _FLOOR / settings.ratio

    def choice(name: str, plan: Plan, compared: dict[str, float] | None = None) -> Choice:
        expected = None
        if needs_sensitivity(settings):
            expected = sum(sensitivity[name] * layer.error for name, layer in plan.items())
        small = has_codes(settings) and expected is not None and expected < _SMALL_KL
        propagate = settings.propagate
        if propagate is None:
            propagate = settings.method == "lrsd" and not small
        return Choice(plan, name, expected, propagate, compared or {})

    if settings.rank is not None and not has_codes(settings):
        return choice("rank", _fixed_rank(curves, budget, settings.rank))
    if settings.allocates_by == "energy":
        return choice("energy", allocate_energy(curves, budget))
    if settings.allocates_by == "uniform":
        return choice("uniform", allocate_uniform(curves, budget))
    first = choice("kl", allocate_by_weight(curves, sensitivity, budget, floor))
    assert first.expected_kl is not None
    if settings.allocates_by == "kl" or first.expected_kl < _TRUSTED_KL:
        return first
    plans = {"kl": first.plan, "uniform": allocate_uniform(curves, budget)}
    progress.stage("compare plans", len(plans))
    compared = {}
    for name, plan in plans.items():
        compared[name] = divergence(plan)
        progress.step(name)
    best = min(compared, key=compared.__getitem__)
    return choice(best, plans[best], compared)


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
    replay: Replay,
    survey: Survey,
    samples: Samples,
    plan: Plan,
    settings: CompressionSettings,
    aside: Stream,
) -> float:
    """KL(dense || planned) per token on the held-out samples, all layers fitted without propagation.

    aside: where the dense answers and the fitted weights are kept meanwhile.
    """
    model = replay.model
    last = samples[-max(1, len(samples) // HELD_OUT) :]
    held_out = list(last[:_COMPARED_SAMPLES].cut(_COMPARED_TOKENS).split(1))
    for sample in held_out:
        aside.append(answer(run_model(model, sample)))
    with ExitStack() as replaced:
        for group in replay.layout.groups:
            metric_II = metric(settings, survey.moments[group.name])
            carry = feedback(metric_II) if has_codes(settings) else None
            gram_II = metric_II.float()
            for spec in group.linears:
                layer, curve = plan[spec.name], survey.curves[spec.name]
                if layer.is_dense:
                    continue
                W_OI = read_weight(model, spec).to(gram_II)
                # Columns and rows as surveyed: to improve them here would take most of the time.
                found = solve_layer(W_OI, gram_II, layer, curve, settings, carry=carry, alternate=False)
                replaced.enter_context(_weight_read(model, spec, aside, len(aside)))
                aside.append(found.dense().to(model.dtype))
            release_freed()
        total = 0.0
        for number, sample in enumerate(held_out):
            total += distance(model, aside[number], answer(run_model(model, sample)))
        return total / len(held_out)


@contextmanager
def _weight_read(model: nn.Module, spec: LinearSpec, stream: Stream, number: int) -> Iterator[None]:
    """A layer whose weight is read from a stream whenever it runs, and in memory no longer than that."""
    module = model.get_submodule(spec.name)
    original = module.weight

    def enter(module: nn.Module, args: Any) -> None:
        exchange_weight(model, spec, stream[number])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        module.weight = original

    hooks = module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
