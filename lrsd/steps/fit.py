"""The fit: every planned layer solved in the order of the model, behind the compressed prefix."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lrsd.errors import BudgetError, SolverError
from lrsd.forms.packed import LayerFormat, LowRankSparseLinear
from lrsd.methods.curves import metric
from lrsd.model.layout import InputGroup, LinearSpec, exchange_weight, read_weight
from lrsd.model.replay import Replay
from lrsd.numerics.allocate import VALUE_BYTES, LayerCurve, LayerPlan, Plan
from lrsd.numerics.moments import CrossMoments, Moments
from lrsd.numerics.quantize import Feedback, feedback
from lrsd.numerics.solver import Decomposition, propagated_target, relative_error
from lrsd.progress import Progress
from lrsd.settings import CompressionSettings
from lrsd.steps.observe import Survey
from lrsd.steps.plan import Choice
from lrsd.steps.propagate import Pair, TwoStreams, fit_step, pair_moments
from lrsd.steps.solve import solve_layer
from lrsd.work.journal import Workspace
from lrsd.work.process import release_freed

# Tries at the last layer's step: bisection to less than its share of the slack takes about ten.
_STEP_TRIALS = 30
# Octaves beyond which no step changes the bytes any more.
_STEP_REACH = 16


@dataclass(frozen=True)
class Fitted:
    """One layer's result: what is stored, what was planned, and how far its target moved.

    packing: its stored form, whose `tensors` are the parameters of a `LowRankSparseLinear`; None: the layer
    stays dense, `tensors` holding its weight where that changed.
    """

    plan: LayerPlan
    error: float
    blend: float
    status: str
    history: tuple[float, ...] = ()
    packing: LayerFormat | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def install(self, model: nn.Module, spec: LinearSpec) -> None:
        """Put what is stored in the place of the dense layer."""
        if self.packing is not None:
            packed = LowRankSparseLinear(spec.shape, self.packing, self.tensors["weight"].dtype)
            packed.load_state_dict(self.tensors, assign=True)
            model.set_submodule(spec.name, packed)
        elif self.tensors:
            weight = nn.Parameter(self.tensors["weight"], requires_grad=False)
            model.get_submodule(spec.name).weight = weight


@dataclass(frozen=True)
class FittedBlock:
    """All layers of one block, in the order in which they were fitted."""

    layers: dict[str, Fitted]


_Solved = tuple[Decomposition, LayerPlan, LowRankSparseLinear, Tensor | None]


def fit_blocks(
    replay: Replay,
    survey: Survey,
    choice: Choice,
    budget: int,
    settings: CompressionSettings,
    progress: Progress,
    workspace: Workspace | None = None,
) -> dict[str, Fitted]:
    """Fit every planned layer, in the order in which the model runs them, and put what is stored of it into
    the model.

    With propagation two streams of hidden states go through each stack side by side, one dense and
    one behind the layers fitted so far; without it, and for layers that not every token runs through
    once, the survey's moments are all that is needed.

    Args: workspace: where finished blocks are kept, and which are not fitted again.
    Raises: BudgetError if entropy-coded layers came out
        so much larger than predicted that the last of them cannot make up for it.
    """
    workspace = Workspace() if workspace is None else workspace
    progress.stage("compress", len(replay.layout.blocks))
    fitted: dict[str, Fitted] = {}
    purse = Purse(choice.plan, survey.curves, budget)
    linears = replay.layout.linears
    for index, block in enumerate(replay.layout.blocks):
        step = fit_step(index)
        resumed = step in workspace
        if not resumed:
            streams = TwoStreams.start(workspace, replay, index) if choice.propagate else None
            layers = _fit_block(replay, index, survey, choice, purse, settings, streams)
            workspace.finish(step, FittedBlock(layers), keep=streams.finish() if streams else [])
        replay.finished(replay.block(index))
        for name, layer in workspace.read(step, FittedBlock).layers.items():
            if resumed:
                purse.pay(name, layer.plan.nbytes(survey.curves[name].shape))
            fitted[name] = layer
            layer.install(replay.model, linears[name])
        progress.step(block.name)
    _require_within(budget, fitted, survey)
    return fitted


def _require_within(budget: int, fitted: dict[str, Fitted], survey: Survey) -> None:
    """Raises: BudgetError if layers that could not be solved took more than the others could make up for."""
    spent = sum(layer.plan.nbytes(survey.curves[name].shape) for name, layer in fitted.items())
    unsolved = [name for name, layer in fitted.items() if layer.status.startswith("dense: ")]
    if spent > budget:
        raise BudgetError(
            f"{len(unsolved)} layers could not be solved and stay dense, {', '.join(unsolved[:3])} among "
            f"them: {spent:,} bytes instead of {budget:,}; --exclude them, or lower the ratio"
        )


def _fit_block(
    replay: Replay,
    index: int,
    survey: Survey,
    choice: Choice,
    purse: "Purse",
    settings: CompressionSettings,
    streams: TwoStreams | None,
) -> dict[str, Fitted]:
    """All layers of one block; with propagation also the hidden states behind it."""
    model, fitted = replay.model, {}
    moved = False
    for group in replay.layout.blocks[index].groups:
        pair = None
        if streams is not None and group.aligned:
            pair = pair_moments(replay, index, group, streams)
            release_freed()
        try:
            if pair is not None:
                aims = _propagated_aims(model, group, pair)
            else:
                aims = _plain_aims(model, group, survey.moments[group.name], settings)
            coded = any(choice.plan[spec.name].codes for spec in group.linears)
            carry = feedback(aims[group.name].gram_II) if coded else None
        except SolverError as error:
            for spec in group.linears:
                fitted[spec.name] = _left_dense(spec, purse, str(error))
            continue
        before = _affine(model, group.linears[0])
        for spec in group.linears:
            aim, curve = aims[spec.name], survey.curves[spec.name]
            if spec.name in survey.unsolved:
                fitted[spec.name] = _left_dense(spec, purse, survey.unsolved[spec.name])
                continue
            fitted[spec.name] = _fit_layer(
                model, spec, aim, curve, purse, settings, carry, propagate=choice.propagate
            )
        release_freed()
        if streams is not None and pair is not None and pair.closes:
            streams.move_on(before, _affine(model, group.linears[0]))
            moved = True
    if streams is not None and not moved:
        replay.run_all(index, streams.compressed, into=streams.compressed_behind)
    return fitted


def _left_dense(spec: LinearSpec, purse: "Purse", reason: str) -> Fitted:
    """A layer that cannot be solved."""
    plan = LayerPlan(None)
    purse.pay(spec.name, plan.nbytes(spec.shape))
    return Fitted(plan, 0.0, 0.0, f"dense: {reason}")


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


@dataclass(frozen=True)
class _Aim:
    """What one layer is fitted to: a weight, a metric, and the means that a bias would make up for."""

    W_OI: Tensor
    gram_II: Tensor
    target_mean_O: Tensor
    input_mean_I: Tensor
    blend: float
    damping: float = 0.0


def _plain_aims(
    model: nn.Module, group: InputGroup, moments: Moments, settings: CompressionSettings
) -> dict[str, _Aim]:
    """The layers' own weights on the dense model's inputs."""
    gram_II, mean_I = metric(settings, moments), moments.mean
    aims = {}
    for spec in group.linears:
        W_OI = read_weight(model, spec).to(gram_II)
        aims[spec.name] = _Aim(W_OI, gram_II, W_OI @ mean_I, mean_I, blend=0.0)
    return aims


def _propagated_aims(model: nn.Module, group: InputGroup, pair: Pair) -> dict[str, _Aim]:
    """Weights between W and W*, which make up for the prefix's errors, as far as held-out text agrees.

    The held-out error is quadratic along W + b (W* - W), so that each layer's best blend b has a closed
    form. The layers of a group share the metric, so that their rows are solved for together.
    """
    W_OI = torch.cat([read_weight(model, spec) for spec in group.linears]).to(pair.fit.device, torch.float64)

    def target(gram_II: Tensor, cross: CrossMoments) -> Tensor:
        own_OI = W_OI @ (cross.mean if not pair.closes else gram_II)
        return own_OI + cross.mean if pair.closes else own_OI

    def solved(gram_II: Tensor, cross: CrossMoments) -> tuple[Tensor, float]:
        return propagated_target(W_OI, gram_II, target(gram_II, cross))

    step_OI = solved(pair.fit.gram, pair.fit_cross)[0] - W_OI
    held_out_II = pair.held_out.gram
    missing_OI = target(held_out_II, pair.held_out_cross) - W_OI @ held_out_II
    curvatures_O = ((step_OI @ held_out_II) * step_OI).sum(1)
    slopes_O = (step_OI * missing_OI).sum(1)
    del held_out_II, missing_OI, step_OI  # matrices of a wide layer's inputs take gigabytes
    moments, cross = pair.fit + pair.held_out, pair.fit_cross + pair.held_out_cross
    gram_II = moments.gram
    full_OI, damping = solved(gram_II, cross)
    input_mean_I = moments.mean
    target_mean_O = W_OI @ cross.target_mean if not pair.closes else W_OI @ input_mean_I + cross.target_mean
    aims, end = {}, 0
    for spec in group.linears:
        start, end = end, end + spec.shape.out_features
        own_OI, curvature = W_OI[start:end], float(curvatures_O[start:end].sum())
        blend = min(max(float(slopes_O[start:end].sum()) / curvature, 0.0), 1.0) if curvature > 0 else 0.0
        if not own_OI.any():
            blend = 0.0  # its plan knows the step of nothing only
        aim_OI = own_OI + blend * (full_OI[start:end] - own_OI)
        aims[spec.name] = _Aim(aim_OI, gram_II, target_mean_O[start:end], input_mean_I, blend, damping)
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
    goes into the model, the dense product being faster to run. A layer left dense still takes the
    propagated weight.
    """
    plan, limit = purse.plan(spec.name), purse.limit(spec.name)
    if plan.is_dense:
        purse.pay(spec.name, plan.nbytes(curve.shape))
        tensors = {}
        if aim.blend:
            exchange_weight(model, spec, aim.W_OI)
            weight = model.get_submodule(spec.name).weight
            assert isinstance(weight, Tensor)
            tensors["weight"] = weight.detach()
        return Fitted(plan, 0.0, aim.blend, "dense", tensors=tensors)

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

    try:
        found, plan, packed, bias_O = (
            solved(plan) if limit is None else _within(limit, purse.slack, plan, solved, curve)
        )
        W_OI = packed.dense_weight(torch.float64).to(aim.W_OI.device)
        if not bool(torch.isfinite(W_OI).all()):
            raise SolverError(f"its solution is not finite in {dtype}")
    except (SolverError, ValueError) as reason:  # ValueError: what the packed form cannot hold
        return _left_dense(spec, purse, str(reason))
    purse.pay(spec.name, plan.nbytes(curve.shape))
    if propagate:
        exchange_weight(model, spec, W_OI)
        if bias_O is not None:
            model.get_submodule(spec.name).bias = nn.Parameter(
                bias_O.to(weight.device, dtype), requires_grad=False
            )
    error = relative_error(aim.W_OI.float(), W_OI.float(), aim.gram_II.float())
    tensors = {name: parameter.detach() for name, parameter in packed.named_parameters()}
    damping = max(found.damping, aim.damping)
    status = found.status + (f", damping {damping:.0e}" if damping else "")
    return Fitted(plan, error, aim.blend, status, found.history, packed.layout, tensors)


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
    bias_O = old.to(aim.W_OI) if isinstance(old, Tensor) else None
    if plan.bias or (bias_O is not None and settings.mean_correction):
        shift_O = aim.target_mean_O - found.dense() @ aim.input_mean_I
        bias_O = shift_O if bias_O is None else bias_O + shift_O
    return bias_O
