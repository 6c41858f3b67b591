"""The fit: every planned layer solved in the order of the model, behind the compressed prefix."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lrsd.config import CompressionSettings
from lrsd.errors import BudgetError
from lrsd.memory import release_freed
from lrsd.model.layout import InputGroup, LinearSpec, exchange_weight, read_weight
from lrsd.model.linear import LowRankSparseLinear
from lrsd.model.replay import Replay, Stream
from lrsd.numerics.allocate import VALUE_BYTES, LayerCurve, LayerPlan, Plan
from lrsd.numerics.moments import CrossMoments, Moments
from lrsd.numerics.quantize import Feedback, feedback
from lrsd.numerics.solver import Decomposition, propagated_target, relative_error
from lrsd.plan import Choice
from lrsd.progress import Progress
from lrsd.solve import solve_layer
from lrsd.survey import HELD_OUT, Survey, metric

# Tries at the last layer's step: bisection to less than its share of the slack takes about ten.
_STEP_TRIALS = 30
# Octaves beyond which no step changes the bytes any more.
_STEP_REACH = 16


@dataclass(frozen=True)
class Fitted:
    """One layer's result: what is stored, what was planned, and how far its target moved."""

    packed: LowRankSparseLinear | None
    plan: LayerPlan
    error: float
    blend: float
    status: str
    history: tuple[float, ...] = ()


_Solved = tuple[Decomposition, LayerPlan, LowRankSparseLinear, Tensor | None]


def fit_blocks(
    replay: Replay,
    survey: Survey,
    choice: Choice,
    budget: int,
    settings: CompressionSettings,
    progress: Progress,
) -> dict[str, Fitted]:
    """Fit every planned layer, in the order in which the model runs them.

    With propagation two streams of hidden states go through each stack side by side, one dense and
    one behind the layers fitted so far; without it, and for layers that not every token runs through
    once, the survey's moments are all that is needed.

    Raises: BudgetError if entropy-coded layers came out
        so much larger than predicted that the last of them cannot make up for it.
    """
    model = replay.model
    progress.stage("compress", len(replay.layout.blocks))
    fitted: dict[str, Fitted] = {}
    purse = Purse(choice.plan, survey.curves, budget)
    stream: Stream = []
    dense_stream: Stream = []
    for index, block in enumerate(replay.layout.blocks):
        after: Stream | None = None
        if block.leads:
            stream = dense_stream = replay.entering[block.stack]
        if choice.propagate:
            dense_inputs, dense_stream = _dense_pass(replay, index, dense_stream)
        for group in block.groups:
            pair = None
            if choice.propagate and group.aligned:
                pair = _pair_moments(replay, index, group, dense_inputs.pop(group.name), dense_stream, stream)
                aims = _propagated_aims(model, group, pair)
            else:
                aims = _plain_aims(model, group, survey.moments[group.name], settings)
            before = _affine(model, group.linears[0])
            coded = any(choice.plan[spec.name].codes for spec in group.linears)
            carry = feedback(aims[group.name].gram_II) if coded else None
            for spec in group.linears:
                aim, curve = aims[spec.name], survey.curves[spec.name]
                fitted[spec.name] = _fit_layer(
                    model, spec, aim, curve, purse, settings, carry, propagate=choice.propagate
                )
            release_freed()
            if pair is not None and pair.closing is not None:
                after = _moved(pair.closing, before, _affine(model, group.linears[0]))
        if choice.propagate:
            stream = after or replay.run_all(index, stream)
        progress.step(block.name)
    return fitted


class Purse:
    """Keeps the sum of all layers at the budget although entropy-coded ones come out a little larger or
    smaller than planned: what is over or short is shared by the coded layers still to come, through
    their steps, and the last of them is fitted to what is left.
    """

    # How far below what is left the last layer may stay, as a fraction of the whole budget.
    SLACK = 2e-4

    def __init__(self, plan: Plan, curves: dict[str, LayerCurve], budget: int) -> None:
        self._shapes = {name: curve.shape for name, curve in curves.items()}
        self._ahead = dict(plan)
        self._left = budget
        self.slack = int(self.SLACK * budget)

    def plan(self, name: str) -> LayerPlan:
        """The plan of the next layer, its step moved so that it takes its part of the difference."""
        plan = self._ahead[name]
        if plan.codes is None or plan.codes.bits is not None:
            return plan
        planned = sum(ahead.nbytes(self._shapes[other]) for other, ahead in self._ahead.items())
        weights = sum(self._shapes[other].dense_bytes // VALUE_BYTES for other in self._lattices())
        spare_bits = 8 * (self._left - planned) / weights
        return replace(plan, codes=replace(plan.codes, step=plan.codes.step * 2**-spare_bits))

    def limit(self, name: str) -> int | None:
        """What is left for this layer if it is the last that can give way, else None."""
        if self._lattices() != [name]:
            return None
        others = sum(p.nbytes(self._shapes[other]) for other, p in self._ahead.items() if other != name)
        return self._left - others

    def pay(self, name: str, nbytes: int) -> None:
        del self._ahead[name]
        self._left -= nbytes

    def _lattices(self) -> list[str]:
        return [n for n, p in self._ahead.items() if p.codes is not None and p.codes.bits is None]


def _affine(model: nn.Module, spec: LinearSpec) -> tuple[Tensor, Tensor | None]:
    """Weight (O, I) and bias (O,) as they are now."""
    bias = model.get_submodule(spec.name).bias
    return read_weight(model, spec), bias.float() if isinstance(bias, Tensor) else None


def _moved(
    closing: list[tuple[Tensor, Tensor]],
    before: tuple[Tensor, Tensor | None],
    after: tuple[Tensor, Tensor | None],
) -> Stream:
    """The block's outputs once its closing layer, whose inputs are known, has changed: no second run."""
    change_OI = after[0] - before[0]
    shift_O = None if after[1] is None else after[1] - (before[1] if before[1] is not None else 0.0)
    return [
        y + linear(x, change_OI.to(x.dtype), None if shift_O is None else shift_O.to(x.dtype)).view_as(y)
        for y, x in closing
    ]


@dataclass(frozen=True)
class _Aim:
    """What one layer is fitted to: a weight, a metric, and the means that a bias would make up for."""

    W_OI: Tensor
    gram_II: Tensor
    target_mean_O: Tensor
    input_mean_I: Tensor
    blend: float


def _plain_aims(
    model: nn.Module, group: InputGroup, moments: Moments, settings: CompressionSettings
) -> dict[str, _Aim]:
    """The layers' own weights on the dense model's inputs."""
    gram_II, mean_I = metric(settings, moments), moments.mean
    aims = {}
    for spec in group.linears:
        W_OI = read_weight(model, spec).double()
        aims[spec.name] = _Aim(W_OI, gram_II, W_OI @ mean_I, mean_I, blend=0.0)
    return aims


@dataclass(frozen=True)
class _Pair:
    """Moments behind the compressed prefix, of the samples fitted to and of those held out.

    cross: E[t x~^T] with t the dense model's input x of this group, or, for the layer that closes
    the block, the residual that is missing in the block's output while its weight is still dense.
    closing: for that layer the block's output and the layer's input, per batch.
    """

    fit: Moments
    fit_cross: CrossMoments
    held_out: Moments
    held_out_cross: CrossMoments
    closing: list[tuple[Tensor, Tensor]] | None


def _pair_moments(
    replay: Replay, index: int, group: InputGroup, dense_inputs: Stream, dense_after: Stream, stream: Stream
) -> _Pair:
    last = group is replay.layout.blocks[index].groups[-1] and len(group.linears) == 1
    closes = last and replay.adds_to_output(index, group.name, stream[0])
    rows = group.linears[0].shape.out_features if closes else group.in_features
    device = stream[0].device
    parts = [
        (Moments(group.in_features, device), CrossMoments(rows, group.in_features, device)) for _ in range(2)
    ]
    held_out = max(1, sum(len(hidden) for hidden in stream) // HELD_OUT)
    first_held_out = sum(len(hidden) for hidden in stream) - held_out
    seen = 0
    closing: list[tuple[Tensor, Tensor]] = []
    for batch, (hidden, dense_x, dense_y) in enumerate(zip(stream, dense_inputs, dense_after, strict=True)):
        if closes:
            y, inputs = replay.run_with_inputs(index, batch, hidden)
            x, t = inputs[group.name], dense_y.float() - y.float()
            closing.append((y, x))
        else:
            x, t = replay.input_of(index, group.name, batch, hidden), dense_x
        # Some families flatten (samples, tokens) before their linears.
        x, t = (z.reshape(len(hidden), -1, z.shape[-1]) for z in (x, t))
        cut = min(max(first_held_out - seen, 0), len(hidden))
        for (moments, cross), part in zip(parts, (slice(None, cut), slice(cut, None)), strict=True):
            if len(x[part]):
                moments.update_(x[part])
                cross.update_(t[part], x[part])
        seen += len(hidden)
    (fit, fit_cross), (rest, rest_cross) = parts
    return _Pair(fit, fit_cross, rest, rest_cross, closing if closes else None)


def _propagated_aims(model: nn.Module, group: InputGroup, pair: _Pair) -> dict[str, _Aim]:
    """Weights between W and W*, which make up for the prefix's errors, as far as held-out text agrees.

    The held-out error is quadratic along W + b (W* - W), so that each layer's best blend b has a closed
    form. The layers of a group share the metric, so that their rows are solved for together.
    """
    W_OI = torch.cat([read_weight(model, spec) for spec in group.linears]).double()

    def target(gram_II: Tensor, cross: CrossMoments) -> Tensor:
        own_OI = W_OI @ (cross.mean if pair.closing is None else gram_II)
        return own_OI if pair.closing is None else own_OI + cross.mean

    moments, cross = pair.fit + pair.held_out, pair.fit_cross + pair.held_out_cross
    gram_II, fit_II, held_out_II = moments.gram, pair.fit.gram, pair.held_out.gram
    step_OI = propagated_target(W_OI, fit_II, target(fit_II, pair.fit_cross)) - W_OI
    missing_OI = target(held_out_II, pair.held_out_cross) - W_OI @ held_out_II
    curvatures_O = ((step_OI @ held_out_II) * step_OI).sum(1)
    slopes_O = (step_OI * missing_OI).sum(1)
    full_OI = propagated_target(W_OI, gram_II, target(gram_II, cross))
    input_mean_I = moments.mean
    target_mean_O = (
        W_OI @ cross.target_mean if pair.closing is None else W_OI @ input_mean_I + cross.target_mean
    )
    aims, end = {}, 0
    for spec in group.linears:
        start, end = end, end + spec.shape.out_features
        own_OI, curvature = W_OI[start:end], float(curvatures_O[start:end].sum())
        blend = min(max(float(slopes_O[start:end].sum()) / curvature, 0.0), 1.0) if curvature > 0 else 0.0
        aim_OI = own_OI + blend * (full_OI[start:end] - own_OI)
        aims[spec.name] = _Aim(aim_OI, gram_II, target_mean_O[start:end], input_mean_I, blend)
    return aims


def _fit_layer(
    model: nn.Module,
    spec: LinearSpec,
    aim: _Aim,
    curve: LayerCurve,
    purse: Purse,
    settings: CompressionSettings,
    carry: Feedback | None,
    *,
    propagate: bool,
) -> Fitted:
    """Solve and pack one layer. Where layers behind it are fitted to what it gives, the weight it decodes to
    goes into the model, the dense product being faster to run; otherwise the packed layer, which is smaller.
    A layer left dense still takes the propagated weight.
    """
    plan, limit = purse.plan(spec.name), purse.limit(spec.name)
    if plan.is_dense:
        purse.pay(spec.name, plan.nbytes(curve.shape))
        if aim.blend:
            exchange_weight(model, spec, aim.W_OI)
        return Fitted(None, plan, 0.0, aim.blend, "dense")

    weight = model.get_submodule(spec.name).weight
    assert isinstance(weight, Tensor)
    dtype = weight.dtype

    def solved(plan: LayerPlan) -> _Solved:
        found = solve_layer(
            aim.W_OI, aim.gram_II, plan, curve, settings, carry=carry, alternate=settings.alternations > 1
        )
        bias_O = _bias(model, spec, aim, found, plan, settings)
        packed = LowRankSparseLinear.pack(found, plan, bias_O, dtype, transposed=spec.transposed)
        if plan.codes is not None:
            plan = replace(plan, codes=replace(plan.codes, nbytes=packed.code_bytes))
        return found, plan, packed, bias_O

    found, plan, packed, bias_O = (
        solved(plan) if limit is None else _within(limit, purse.slack, plan, solved, curve)
    )
    purse.pay(spec.name, plan.nbytes(curve.shape))
    W_OI = packed.dense_weight(torch.float64).to(aim.W_OI.device)
    packed.forget_codes()
    if propagate:
        exchange_weight(model, spec, W_OI)
        if bias_O is not None:
            model.get_submodule(spec.name).bias = nn.Parameter(bias_O.to(dtype), requires_grad=False)
    else:
        model.set_submodule(spec.name, packed)
    error = relative_error(aim.W_OI.float(), W_OI.float(), aim.gram_II.float())
    return Fitted(packed, plan, error, aim.blend, found.status, found.history)


def _within(
    limit: int, slack: int, plan: LayerPlan, solved: Callable[[LayerPlan], _Solved], curve: LayerCurve
) -> _Solved:
    """The layer at the finest step whose bytes stay within `limit`, and not more than `slack` below."""
    assert plan.codes is not None
    low, high = -math.inf, math.inf  # octaves of the step: too fine, fine enough
    octaves, reach, best = 0.0, 0.05, None
    for _ in range(_STEP_TRIALS):
        tried = replace(plan, codes=replace(plan.codes, step=plan.codes.step * 2**octaves))
        result = solved(tried)
        size = result[1].nbytes(curve.shape)
        if size <= limit:
            best, high = result, octaves
            if size >= limit - slack:
                break
        else:
            low = octaves
        if math.isinf(low) or math.isinf(high):
            octaves += reach if math.isinf(high) else -reach
            reach *= 2
        else:
            octaves = (low + high) / 2
        if abs(octaves) > _STEP_REACH:
            break
    if best is None:
        raise BudgetError(
            f"entropy-coded layers came out larger than predicted and the last one cannot make up for it: "
            f"{limit:,} bytes are left; try a slightly lower ratio, or --coding fixed"
        )
    return best


def _bias(
    model: nn.Module,
    spec: LinearSpec,
    aim: _Aim,
    found: Decomposition,
    plan: LayerPlan,
    settings: CompressionSettings,
) -> Tensor | None:
    """The layer's own bias, moved by what its mean output lost where that is asked for."""
    old = model.get_submodule(spec.name).bias
    bias_O = old.double() if isinstance(old, Tensor) else None
    if plan.bias or (bias_O is not None and settings.mean_correction):
        shift_O = aim.target_mean_O - found.dense() @ aim.input_mean_I
        bias_O = shift_O if bias_O is None else bias_O + shift_O
    return bias_O


def _dense_pass(replay: Replay, index: int, stream: Stream) -> tuple[dict[str, Stream], Stream]:
    """Inputs of a block that is still dense, of every group that has one per token, and its output."""
    inputs: dict[str, Stream] = {g.name: [] for g in replay.layout.blocks[index].groups if g.aligned}
    after: Stream = []
    for batch, hidden in enumerate(stream):
        output, seen = replay.run_with_inputs(index, batch, hidden)
        for name in inputs:
            inputs[name].append(seen[name])
        after.append(output)
    return inputs, after
