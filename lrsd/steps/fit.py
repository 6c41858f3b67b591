"""The fit: every planned layer solved in the order of the model, block by block."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lrsd.errors import BudgetError, SolverError
from lrsd.forms.layer import parse_layer
from lrsd.methods.base import LayerProblem, Method, Solution, State, Status
from lrsd.model.layout import InputGroup
from lrsd.model.replay import Replay
from lrsd.model.slots import WeightSlot, weight_slot
from lrsd.numerics.menu import Choice
from lrsd.numerics.solver import propagated_target
from lrsd.numerics.weights import row_scales
from lrsd.progress import Progress
from lrsd.steps.budget import ByteLedger
from lrsd.steps.observe import Observation, layer_problem
from lrsd.steps.plan import Plan
from lrsd.steps.propagate import Pair, TwoStreams, fit_step, pair_moments, ways_of
from lrsd.work.journal import Workspace
from lrsd.work.process import release_freed

T = TypeVar("T")

# Tries at the last layer's step: bisection to less than its share of the slack takes about ten.
_TRIALS = 30
# Bits per weight beyond which no step changes the bytes any more.
_REACH = 16


@dataclass(frozen=True)
class Fitted:
    """One layer's result: what is stored, what was planned, and how far its target moved.

    choice: with the bytes that it takes. interpolation: weight of the target that makes up for its inputs'
    errors, 0 to 1. entry: its stored form as in config.json, whose tensors these are; None: the layer stays
    dense, `tensors` holding its weight where that changed.
    """

    choice: Choice
    error: float
    interpolation: float
    status: Status
    history: tuple[float, ...] = ()
    entry: dict[str, Any] | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def install(self, slot: WeightSlot) -> None:
        """Put what is stored in the place of the dense layer: on the host, mapped from its file where it was
        kept in one."""
        if self.entry is not None:
            slot.pack(parse_layer(slot.name, self.entry), self.tensors)
        elif self.tensors:
            slot.module.weight = nn.Parameter(self.tensors["weight"], requires_grad=False)


@dataclass(frozen=True)
class FittedBlock:
    """All layers of one block, in the order in which they were fitted."""

    layers: dict[str, Fitted]


def fit_blocks(
    replay: Replay,
    observation: Observation,
    plan: Plan,
    budget: int,
    method: Method,
    progress: Progress,
    workspace: Workspace | None = None,
) -> dict[str, Fitted]:
    """Fit every planned layer, in the order in which the model runs them, and put what is stored of it into
    the model.

    With propagation two streams of hidden states go through each stack side by side, that of the dense model
    and that of the layers fitted so far; without it, and for layers that not every token runs through
    once, the dense model's moments are all that is needed.

    Args: workspace: where finished blocks are kept, and which are not fitted again.
    Raises: BudgetError if entropy-coded layers came out
        so much larger than predicted that the last of them cannot make up for it.
    """
    workspace = Workspace() if workspace is None else workspace
    progress.stage("compress", len(replay.layout.blocks))
    fitted: dict[str, Fitted] = {}
    ledger = _ledger(replay, plan, method, budget)
    fit = _BlockFit(replay, observation, plan, method, ledger)
    for index, block in enumerate(replay.layout.blocks):
        step = fit_step(index)
        ledger.open(index)
        finished = step in workspace
        if not finished:
            streams = (
                TwoStreams.start(workspace, replay, index, rounds=method.rounds) if plan.propagate else None
            )
            found = FittedBlock(fit.run(index, streams))
            workspace.finish(step, found, keep=streams.finish() if streams else [])
        replay.finished(replay.block(index))
        # Mapped from its file: what is in memory of it can be released.
        layers = workspace.read(step, FittedBlock).layers
        for name, layer in layers.items():
            if finished:
                ledger.charge(name, layer.choice.nbytes)
            layer.install(weight_slot(replay.model, name))
        fitted |= layers
        progress.step(block.name)
    _require_within(budget, fitted)
    return fitted


def _ledger(replay: Replay, plan: Plan, method: Method, budget: int) -> ByteLedger:
    blocks = [[spec.name for group in b.groups for spec in group.linears] for b in replay.layout.blocks]
    shapes = {name: spec.shape for name, spec in replay.layout.linears.items()}
    return ByteLedger(blocks, plan.choices, shapes, method, budget)


def _require_within(budget: int, fitted: dict[str, Fitted]) -> None:
    """Raises: BudgetError if layers that could not be solved took more than the others could make up for."""
    spent = sum(layer.choice.nbytes for layer in fitted.values())
    unsolved = [name for name, layer in fitted.items() if layer.status.state is State.UNSOLVED]
    if spent > budget:
        raise BudgetError(
            f"{len(unsolved)} layers could not be solved and stay dense, {', '.join(unsolved[:3])} among "
            f"them: {spent:,} bytes instead of {budget:,}; --exclude them, or lower the ratio"
        )


@dataclass(frozen=True)
class _Target:
    """What one layer is fitted to, and how that was come by. interpolation: see `Fitted`; damping: of the
    target's own solution, where the usual one did not do."""

    problem: LayerProblem
    interpolation: float = 0.0
    damping: float = 0.0


@dataclass(frozen=True)
class _BlockFit:
    """The fit of one block after the other."""

    replay: Replay
    observation: Observation
    plan: Plan
    method: Method
    ledger: ByteLedger

    def run(self, index: int, streams: TwoStreams | None) -> dict[str, Fitted]:
        """All layers of one block; with propagation also its outputs."""
        model, fitted = self.replay.model, dict[str, Fitted]()
        moved = False
        for group in self.replay.layout.blocks[index].groups:
            pair = None
            if streams is not None and group.token_aligned:
                tokens = self.observation.statistics[group.name].tokens
                pair = pair_moments(self.replay, index, group, streams, tokens)
                release_freed()
            try:
                targets = self._targets(group, pair)
            except SolverError as error:
                for spec in group.linears:
                    fitted[spec.name] = self._left_dense(spec.name, str(error))
                continue
            ends = pair is not None and pair.ends
            pair = None  # many squares of the group's width
            before = _affine(model, group.name)
            for spec in group.linears:
                if (reason := self.observation.unsolved.get(spec.name)) is not None:
                    fitted[spec.name] = self._left_dense(spec.name, reason)
                else:
                    fitted[spec.name] = self._fit_layer(weight_slot(model, spec.name), targets[spec.name])
            release_freed()
            if streams is not None and ends:
                streams.move_on(before, _affine(model, group.name))
                moved = True
        if streams is not None and not moved:
            self.replay.pass_(index, streams.compressed, streams.compressed_outputs)
        return fitted

    def _targets(self, group: InputGroup, pair: Pair | None) -> dict[str, _Target]:
        """Raises: SolverError."""
        if pair is not None:
            return self._propagated_targets(group, pair)
        statistics = self.observation.statistics[group.name]
        metric, mean_I = self.method.metric(statistics.moments), statistics.moments.mean
        targets = {}
        for spec in group.linears:
            own = layer_problem(self.replay, spec.name, metric, math.inf)
            problem = replace(own, input_mean_I=mean_I, target_mean_O=own.W_OI @ mean_I)
            targets[spec.name] = _Target(problem.weighted(statistics.exponents(spec.name)))
        return targets

    def _propagated_targets(self, group: InputGroup, pair: Pair) -> dict[str, _Target]:
        """Weights between W and W*, which makes up for the errors of its inputs, as far as held-out text
        agrees.

        The held-out error is quadratic along W + b (W* - W), so that each layer's best b has a closed
        form; of several ridges, each with its W*, the one is taken that leaves least of it. The layers of a
        group share the metric, so that their rows are solved for together.
        """
        statistics = self.observation.statistics[group.name]
        moments, cross = pair.moments_(statistics.moments), pair.fit_missing + pair.held_out_missing
        metric = self.method.metric(moments)
        own = {s.name: layer_problem(self.replay, s.name, metric, math.inf) for s in group.linears}
        W_OI = torch.cat([problem.W_OI for problem in own.values()])
        ways, missing_OI = ways_of(pair, W_OI), pair.missing(W_OI, cross)
        solving_II = (pair.fit + pair.held_out).gram if pair.writes_residual else metric.gram
        full: dict[float, tuple[Tensor, float]] = {}
        mean_O = W_OI @ moments.mean + pair.missing_mean(W_OI, cross)
        targets, end = {}, 0
        for spec in group.linears:
            start, end = end, end + spec.shape.out_features
            rows_O = statistics.exponents(spec.name)
            importances_O = torch.ones_like(W_OI[start:end, 0])
            if rows_O is not None:
                importances_O = row_scales(rows_O).to(importances_O) ** -2
            _, weight, ridge = max(way.best(slice(start, end), importances_O) for way in ways)
            own_OI = W_OI[start:end]
            # Of a layer without weights the plan knows the step of nothing only.
            weight = weight if own_OI.any() else 0.0
            if ridge not in full:
                full[ridge] = propagated_target(W_OI, solving_II, missing_OI, damping=ridge)
            full_OI, damping = full[ridge]
            W_target_OI = own_OI + weight * (full_OI[start:end] - own_OI)
            problem = replace(
                own[spec.name], W_OI=W_target_OI, input_mean_I=moments.mean, target_mean_O=mean_O[start:end]
            )
            targets[spec.name] = _Target(problem.weighted(rows_O), weight, damping)
        return targets

    def _fit_layer(self, slot: WeightSlot, target: _Target) -> Fitted:
        """Solve one layer as it is stored. Where layers after it are fitted to what it gives, the weight it
        stands for goes into the model, the dense product being faster to run. A layer left dense still takes
        the propagated weight.
        """
        ledger, problem = self.ledger, target.problem
        choice, limit = ledger.choice(slot.name), ledger.limit(slot.name)
        if choice.is_dense:
            ledger.charge(slot.name, choice.nbytes)
            tensors, weight = {}, 0.0 if self.method.copies_dense else target.interpolation
            if weight:
                slot.write(problem.unscaled(problem.W_OI))
                tensors["weight"] = slot.parameter.detach().cpu()
            return Fitted(choice, 0.0, weight, Status(State.DENSE), tensors=tensors)
        try:
            if limit is None:
                found = self.method.solve(problem, choice)
            else:
                choice, found = self._within(limit, choice, problem)
        except (SolverError, ValueError) as reason:  # ValueError: what the packed form cannot hold
            return self._left_dense(slot.name, str(reason))
        nbytes = found.nbytes(slot.shape)
        ledger.charge(slot.name, nbytes)
        if self.plan.propagate:
            slot.write(found.W_OI, found.tensors.get("bias"))
        layer = replace(found.layer, transposed=slot.transposed)
        return Fitted(
            replace(choice, nbytes=nbytes, kept=None),
            found.error,
            target.interpolation,
            replace(found.status, damping=max(found.status.damping, target.damping)),
            found.history,
            layer.to_dict(),
            {name: tensor.cpu() for name, tensor in found.tensors.items()},
        )

    def _left_dense(self, name: str, reason: str) -> Fitted:
        """A layer that cannot be solved."""
        choice = Choice(self.replay.layout.linears[name].shape.dense_bytes)
        self.ledger.charge(name, choice.nbytes)
        return Fitted(choice, 0.0, 0.0, Status(State.UNSOLVED, reason))

    def _within(self, limit: int, choice: Choice, problem: LayerProblem) -> tuple[Choice, Solution]:
        """The layer at the finest step whose bytes stay within `limit`, and not much below."""

        def solved(bits: float) -> tuple[Choice, Solution]:
            tried = self.method.adjusted(choice, bits)
            assert tried is not None, "the last layer is an adjustable one"
            return tried, self.method.solve(problem, tried)

        return fit_within(limit, self.ledger.slack, solved, lambda found: found[1].nbytes(problem.shape))


def fit_within(limit: int, slack: int, solved: Callable[[float], T], nbytes: Callable[[T], int]) -> T:
    """What `solved` gives at the most bits per weight whose bytes stay within `limit`, by bisection, until it
    is no more than `slack` below. Raises: BudgetError if none does."""
    low, high = -math.inf, math.inf  # bits that fit, bits that do not
    bits, reach, best = 0.0, 0.05, None
    for _ in range(_TRIALS):
        found = solved(bits)
        size = nbytes(found)
        if size <= limit:
            best, low = found, bits
            if size >= limit - slack:
                break
        else:
            high = bits
        if math.isinf(low) or math.isinf(high):
            bits += reach if math.isinf(high) else -reach
            reach *= 2
        else:
            bits = (low + high) / 2
        if abs(bits) > _REACH:
            break
    if best is None:
        raise BudgetError(
            f"entropy-coded layers came out larger than predicted and the last one cannot make up for it: "
            f"{limit:,} bytes are left; try a slightly lower ratio, or --coding fixed"
        )
    return best


def _affine(model: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight (O, I) and bias (O,) as they are now."""
    slot = weight_slot(model, name)
    return slot.read(), slot.bias.float() if slot.bias is not None else None
