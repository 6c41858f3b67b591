"""The fit: every planned layer solved in the order of the model, block by block."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lrsd.errors import BudgetError, SolverError
from lrsd.forms.layer import parse_layer
from lrsd.methods.base import LayerProblem, Method, Solution, State, Status
from lrsd.model.layout import InputGroup, LinearSpec
from lrsd.model.replay import Replay
from lrsd.model.slots import WeightSlot, weight_slot
from lrsd.numerics.menu import Choice
from lrsd.progress import Progress
from lrsd.steps.budget import ByteLedger
from lrsd.steps.observe import Observation
from lrsd.steps.plan import Plan
from lrsd.steps.propagate import (
    RIDGES,
    Pair,
    TwoStreams,
    Way,
    fit_step,
    pair_moments,
    streams_after,
    ways_of,
)
from lrsd.steps.statistics import GroupStatistics
from lrsd.steps.target import PropagatedTargets, Target, dense_targets, weights_of
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
    fit = _BlockFit(replay, observation, plan, method, ledger, workspace)
    for wave in ledger.waves(1) if plan.propagate else ledger.waves():
        ledger.open(wave)
        for blocks in replay.waves(wave):
            missing = [index for index in blocks if fit_step(index) not in workspace]
            charged = fit.blocks(missing)
            for index in blocks:
                if index in missing:
                    workspace.finish(fit_step(index), keep=streams_after(index) if plan.propagate else [])
                replay.finished(replay.block(index))
                # Mapped from its file: what is in memory of it can be released.
                layers = workspace.read(fit_step(index), FittedBlock).layers
                for name, layer in layers.items():
                    if index not in charged:
                        ledger.charge(name, layer.choice.nbytes)
                    layer.install(weight_slot(replay.model, name))
                fitted |= layers
                progress.step(replay.layout.blocks[index].name)
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
class _BlockFit:
    """The fit of one block after the other."""

    replay: Replay
    observation: Observation
    plan: Plan
    method: Method
    ledger: ByteLedger
    workspace: Workspace

    def blocks(self, indices: Sequence[int]) -> list[int]:
        """Fit these blocks: with propagation all processes at one, else each those that it owns. Returns:
        which of them this process has charged to its ledger."""
        if self.plan.propagate:
            for index in indices:
                streams = TwoStreams.start(self.workspace, self.replay, index, rounds=self.method.rounds)
                found = FittedBlock(self.together(index, streams))
                streams.finish()
                if self.replay.world.leads:
                    self.workspace.put(fit_step(index), found)
            return list(indices)
        own = [index for index in indices if self.replay.world.owns(index)]
        for index in own:
            self.workspace.put(fit_step(index), FittedBlock(self.alone(index)))
        return own

    def alone(self, index: int) -> dict[str, Fitted]:
        """All layers of one block by the dense model's statistics, in this process."""
        fitted: dict[str, Fitted] = {}
        for group in self.replay.layout.blocks[index].groups:
            statistics = self.observation.statistics[group.name]
            targets = partial(dense_targets, self.replay, group, statistics, self.method)
            fitted |= self._fit_group(group.linears, targets)
        return fitted

    def together(self, index: int, streams: TwoStreams) -> dict[str, Fitted]:
        """All layers of one block and its outputs, on the compressed model's activations; of layers that
        read the same inputs, processes fit one each."""
        model, rank, fitted = self.replay.model, self.replay.world.rank, dict[str, Fitted]()
        moved = False
        for group in self.replay.layout.blocks[index].groups:
            owners = self._owners(group)
            mine = [spec for spec in group.linears if owners[spec.name] == rank]
            statistics = self.observation.statistics[group.name]
            before = _affine(model, group.name)
            if group.token_aligned:
                helper = next((r for r in range(self.replay.world.size) if r not in owners.values()), 0)
                users = {*owners.values(), helper}
                pair = pair_moments(self.replay, index, group, streams, statistics.tokens, users)
                release_freed()
                ends = pair.ends
                found = self._fit_pair(group, pair, statistics, mine, helper)
                del pair  # many squares of the group's width
            else:
                targets = partial(dense_targets, self.replay, group, statistics, self.method)
                found = self._fit_group(mine, targets)
                ends = False
            fitted |= self._exchanged(owners, found)
            if ends:
                streams.move_on(before, _affine(model, group.name))
                moved = True
        if not moved:
            self.replay.pass_(index, streams.compressed, streams.compressed_outputs)
        return fitted

    def _fit_pair(
        self,
        group: InputGroup,
        pair: Pair,
        statistics: GroupStatistics,
        mine: Sequence[LinearSpec],
        helper: int,
    ) -> dict[str, Fitted]:
        """helper: the process that looks for the way to the targets, while those that fit layers, `mine`,
        prepare them."""
        failed: SolverError | None = None
        prepared: PropagatedTargets | None = None
        ways: list[Way] = []
        try:
            if mine:
                prepared = PropagatedTargets.of(self.replay, group, pair, statistics, self.method)
        except SolverError as error:
            failed = error
        try:
            ways = self._ways(group, pair, helper)  # by all processes, whatever one of them ran into
        except SolverError as error:
            failed = failed or error

        def targets() -> dict[str, Target]:
            if failed is not None:
                raise failed
            assert prepared is not None
            return prepared.along(ways)

        return self._fit_group(mine, targets)

    def _ways(self, group: InputGroup, pair: Pair, helper: int) -> list[Way]:
        """Found by one process, told to all. Raises: SolverError if there is no solution, in all of them."""
        world, W_OI = self.replay.world, weights_of(self.replay, group)
        device = self.replay.solver_device(group.in_features)
        table = torch.full((len(RIDGES), 2, len(W_OI)), math.nan, device=device)
        if world.rank == helper:
            with suppress(SolverError):
                found = ways_of(pair, W_OI)
                table.copy_(torch.stack([torch.stack([way.slopes_O, way.curvatures_O]) for way in found]))
        world.tell_([table], helper)
        if not bool(table.isfinite().all()):
            raise SolverError("there is no weight that makes up for the errors of its inputs")
        return [Way(ridge, *rows) for ridge, rows in zip(RIDGES, table, strict=True)]

    def _owners(self, group: InputGroup) -> dict[str, int]:
        """Which process fits which layer: the largest one first, to whoever has least to do; of the block
        that closes the budget, layer after layer, one process all."""
        shapes = {spec.name: spec.shape for spec in group.linears}
        if self.ledger.is_last:
            return dict.fromkeys(shapes, 0)
        tasks, owners = [0] * self.replay.world.size, {}
        for name in sorted(shapes, key=lambda name: -shapes[name].dense_bytes):
            owners[name] = tasks.index(min(tasks))
            tasks[owners[name]] += shapes[name].dense_bytes
        return {name: owners[name] for name in shapes}

    def _exchanged(self, owners: Mapping[str, int], mine: dict[str, Fitted]) -> dict[str, Fitted]:
        """The layers of a group; the weights of those of other processes are put in place."""
        world = self.replay.world
        if world.size == 1:
            return mine
        for name, layer in mine.items():
            self.workspace.put(f"passing-{name}", layer)
        world.wait()
        found = {}
        for name, owner in owners.items():
            slot = weight_slot(self.replay.model, name)
            # Apart from the layer's own, which is float32 where the model keeps it so.
            W_OI = slot.read().clone(memory_format=torch.contiguous_format)
            world.tell_([W_OI], owner)
            if owner == world.rank:
                found[name] = mine[name]
                continue
            found[name] = self.workspace.read(f"passing-{name}", Fitted)
            self.ledger.charge(name, found[name].choice.nbytes)
            slot.write(W_OI, found[name].tensors.get("bias"))
        return found

    def _fit_group(
        self, specs: Sequence[LinearSpec], targets: Callable[[], Mapping[str, Target]]
    ) -> dict[str, Fitted]:
        """specs: those layers of a group that this process fits."""
        if not specs:
            return {}
        fitted = {}
        try:
            found = targets()
        except SolverError as error:
            return {spec.name: self._left_dense(spec.name, str(error)) for spec in specs}
        for spec in specs:
            if (reason := self.observation.unsolved.get(spec.name)) is not None:
                fitted[spec.name] = self._left_dense(spec.name, reason)
            else:
                slot = weight_slot(self.replay.model, spec.name)
                fitted[spec.name] = self._fit_layer(slot, found[spec.name])
        release_freed()
        return fitted

    def _fit_layer(self, slot: WeightSlot, target: Target) -> Fitted:
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
