"""The calibration pass: moments of every input group, what each layer offers, and how sensitive the output
is."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lrsd.errors import SolverError
from lrsd.methods.base import LayerProblem, Method, Probe
from lrsd.model.derivatives import with_derivatives
from lrsd.model.layout import Block, InputGroup
from lrsd.model.load import check_finite
from lrsd.model.replay import Replay
from lrsd.model.samples import Samples
from lrsd.model.slots import weight_slot
from lrsd.numerics.menu import Menu
from lrsd.numerics.metric import Metric
from lrsd.numerics.moments import Moments
from lrsd.numerics.weights import row_exponents, token_weights
from lrsd.steps.sensitivity import BlockProbe, with_unreached_experts
from lrsd.work.journal import Workspace
from lrsd.work.process import release_freed
from lrsd.work.streams import Stream

# One sample in eight is kept out of the fit: it chooses the interpolation weight and the plan.
HELD_OUT = 8
# Samples whose derivatives weigh the output channels: means over thousands of tokens.
_DERIVED = 8


@dataclass(frozen=True)
class GroupStatistics:
    """Moments of a group's inputs, each token weighed by `tokens`; by number of batch, none: alike.

    rows: sums of squared derivatives by output channel, by layer; none: channels count alike.
    """

    moments: Moments
    rows: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[int, Tensor] = field(default_factory=dict)

    def __add__(self, other: "GroupStatistics") -> "GroupStatistics":
        rows = dict(self.rows)
        for name, sums_O in other.rows.items():
            rows[name] = rows[name] + sums_O if name in rows else sums_O
        return GroupStatistics(self.moments + other.moments, rows, self.tokens | other.tokens)

    def exponents(self, layer: str) -> Tensor | None:
        """Row exponents of one layer of the group, see `numerics.weights`."""
        return row_exponents(self.rows[layer]) if layer in self.rows else None


@dataclass(frozen=True)
class Observation:
    """menus: what each layer offers; sensitivity: KL of the output per unit of relative error.

    statistics: by input group. routed: calibration tokens that reached each expert's layers. unsolved:
    layers that offer nothing, and why.
    """

    statistics: Mapping[str, GroupStatistics]
    menus: dict[str, Menu]
    sensitivity: dict[str, float]
    routed: dict[str, int] = field(default_factory=dict)
    unsolved: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ObservedBlock:
    """What is kept of one block. probe: the hidden states of the probe's samples after the block;
    unweighted: why its channels and tokens count alike, where they were to be weighed."""

    menus: dict[str, Menu]
    sensitivity: dict[str, float]
    routed: dict[str, int]
    unsolved: dict[str, str]
    probe: Tensor | None
    unweighted: str = ""


@dataclass(frozen=True)
class BlockStatistics:
    """`GroupStatistics` by group, moments as `Moments.state`, tokens' weights by batch: a record of its own,
    read when the block is fitted."""

    moments: dict[str, dict[str, Tensor]]
    rows: dict[str, dict[str, Tensor]]
    tokens: dict[str, dict[str, Tensor]]

    @staticmethod
    def of(groups: Mapping[str, GroupStatistics]) -> "BlockStatistics":
        return BlockStatistics(
            {name: group.moments.state() for name, group in groups.items()},
            {name: group.rows for name, group in groups.items()},
            {name: {str(n): t for n, t in group.tokens.items()} for name, group in groups.items()},
        )

    def group(self, name: str, device: torch.device | str) -> GroupStatistics:
        rows = {layer: sums_O.to(device) for layer, sums_O in self.rows[name].items()}
        tokens = {int(number): weights_T.to(device) for number, weights_T in self.tokens[name].items()}
        return GroupStatistics(Moments.from_state(self.moments[name], device), rows, tokens)


def observe_model(
    replay: Replay,
    samples: Samples,
    method: Method,
    ratio: float,
    *,
    probing: bool = True,
    progress: Callable[[str], None] = lambda block: None,
    note: Callable[[str], None] = lambda line: None,
    workspace: Workspace | None = None,
    statistics: Mapping[str, GroupStatistics] | None = None,
    sensitivity: Mapping[str, float] | None = None,
) -> Observation:
    """One dense pass, block by block: moments per input group, menus, sensitivities.

    Args: samples: what the replay's batches and the probes are cut from; ratio: of the linear weights;
        probing: whether sensitivities are measured; note: told of blocks that cannot be differentiated;
        workspace: where finished blocks are kept, and which are not observed again; statistics, sensitivity:
        of an earlier observation of the same model and text, which spare the pass and the probes.
    """
    workspace = Workspace() if workspace is None else workspace
    probing = probing and sensitivity is None
    probe: BlockProbe | None = None
    observed: list[ObservedBlock] = []
    for index, block in enumerate(replay.layout.blocks):
        step = observe_step(index)
        if step not in workspace:
            if probing and probe is None:
                last = observed[-1].probe if index else None
                probe = BlockProbe(replay.model, replay.layout, samples, index, last)
            found, outputs, unweighted = statistics, None, ""
            if found is None:
                before = (
                    replay.inputs[block.stack]
                    if block.is_first
                    else workspace.stream(observe_step(index - 1))
                )
                outputs = workspace.new_stream(step)
                weights = Weights(method.weighs_rows, method.weighs_tokens)
                found = block_statistics(replay, index, before, outputs, weights)
                unweighted = weights.missing
            routed = {g.name: found[g.name].moments.count for g in block.groups if g.routed}
            found = share_among_experts(block, found)
            record = _observe_block(replay, block, found, routed, method, ratio, probe)
            keep = [step] if outputs is not None else []
            own = {group.name: found[group.name] for group in block.groups}
            workspace.put(_statistics_of(step), BlockStatistics.of(own))
            workspace.finish(step, replace(record, unweighted=unweighted), keep=keep)
        observed.append(workspace.read(step, ObservedBlock))
        if observed[-1].unweighted:
            note(f"{block.name}: channels and tokens count alike, {observed[-1].unweighted}")
        replay.finished(replay.block(index))
        progress(block.name)
    menus = {name: menu for block in observed for name, menu in block.menus.items()}
    unmeasured = 0.0 if probing else 1.0
    if sensitivity is None:
        sensitivity = {name: weight for block in observed for name, weight in block.sensitivity.items()}
    return Observation(
        _Stored(workspace, replay) if statistics is None else statistics,
        menus,
        {name: sensitivity.get(name, unmeasured) for name in menus},
        {name: count for block in observed for name, count in block.routed.items()},
        {name: reason for block in observed for name, reason in block.unsolved.items()},
    )


def fitted_samples(count: int) -> int:
    """Of so many samples, those that are fitted to; the others, the last ones, are held out."""
    return count - max(1, count // HELD_OUT)


def observe_step(index: int) -> str:
    """The name of a block's step in the journal, and of the stream of its outputs."""
    return f"observe-{index:04d}"


def _statistics_of(step: str) -> str:
    return f"{step}.moments"


def layer_problem(
    replay: Replay, name: str, metric: Metric, ratio: float, rows_O: Tensor | None = None
) -> LayerProblem:
    """The dense layer's own weight in its metric. ratio: of an equal share; rows: its row exponents."""
    slot = weight_slot(replay.model, name)
    W_OI = slot.read().to(metric.gram)
    share = slot.shape.dense_bytes / ratio
    bias_O = None if slot.bias is None else slot.bias.to(W_OI)
    return LayerProblem(W_OI, metric, slot.parameter.dtype, share, bias_O=bias_O).weighted(rows_O)


def _observe_block(
    replay: Replay,
    block: Block,
    statistics: Mapping[str, GroupStatistics],
    routed: dict[str, int],
    method: Method,
    ratio: float,
    probe: BlockProbe | None,
) -> ObservedBlock:
    menus: dict[str, Menu] = {}
    unsolved: dict[str, str] = {}
    probes: dict[str, Probe] | None = {} if probe else None
    for group in block.groups:
        _observe_group(replay, group, statistics[group.name], method, ratio, menus, unsolved, probes)
        release_freed()
    measured: dict[str, float] = {}
    after: Tensor | None = None
    if probe:
        assert probes is not None
        measured = with_unreached_experts(block, probe.measure(probes), probe.reached, routed)
        after = probe.after
        probe.advance()
    return ObservedBlock(menus, measured, routed, unsolved, after)


def _observe_group(
    replay: Replay,
    group: InputGroup,
    statistics: GroupStatistics,
    method: Method,
    ratio: float,
    menus: dict[str, Menu],
    unsolved: dict[str, str],
    probes: dict[str, Probe] | None,
) -> None:
    """Menus of the layers of one group; one that cannot be solved offers nothing but its dense weight."""
    metric = method.metric(statistics.moments)
    check_finite(f"the input of {group.name}", metric.gram)
    for spec in group.linears:
        problem = layer_problem(replay, spec.name, metric, ratio, statistics.exponents(spec.name))
        try:
            menu = method.offer(problem)
            if probes is not None:
                probes[spec.name] = method.probe(problem, menu)
        except SolverError as error:
            menu, unsolved[spec.name] = Menu.of(spec.shape.dense_bytes), str(error)
        menus[spec.name] = menu


class _Stored(Mapping[str, GroupStatistics]):
    """Statistics of every input group, read from the finished steps when asked for: about two bytes per entry
    of G, of all layers of a large model, do not fit in memory beside it."""

    def __init__(self, workspace: Workspace, replay: Replay) -> None:
        self._workspace = workspace
        self._devices = {g.name: replay.solver_device(g.in_features) for g in replay.layout.groups}
        blocks = enumerate(replay.layout.blocks)
        self._steps = {group.name: observe_step(index) for index, block in blocks for group in block.groups}
        self._last: tuple[str, BlockStatistics | None] = "", None

    def __getitem__(self, group: str) -> GroupStatistics:
        step = self._steps[group]
        block = self._last[1]
        if block is None or self._last[0] != step:  # a block's groups follow each other, and share its record
            block = self._workspace.read(_statistics_of(step), BlockStatistics)
            self._last = step, block
        return block.group(group, self._devices[group])

    def __iter__(self) -> Iterator[str]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)


@dataclass
class Weights:
    """Which weights are asked for. missing: why there are none of a block, once it has been run."""

    rows: bool = False
    tokens: bool = False
    missing: str = ""


def block_statistics(
    replay: Replay, index: int, before: Stream, outputs: Stream, weights: Weights
) -> dict[str, GroupStatistics]:
    """Statistics of every input group of one block; the block's outputs go into `outputs`.

    weights: are noted as missing where the block cannot be differentiated.
    """
    block = replay.layout.blocks[index]
    devices = {g.name: replay.solver_device(g.in_features) for g in block.groups}
    found = {g.name: GroupStatistics(Moments(g.in_features, devices[g.name])) for g in block.groups}
    squares: dict[str, Tensor] = {}

    def run(index: int, batch: int, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        squares.clear()
        wanted = weights.tokens or (weights.rows and sum(replay.batch_sizes[:batch]) < _DERIVED)
        if wanted and not weights.missing:
            try:
                output, inputs, derivatives = with_derivatives(replay, index, batch, hidden)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # of whatever in a model has no derivative
                if any(group.rows or group.tokens for group in found.values()):
                    raise  # nothing is weighed by halves
                weights.missing = f"it cannot be differentiated: {str(error).splitlines()[0]:.200}"
            else:
                squares.update(derivatives)
                return output, inputs
        return replay.run_with_inputs(index, batch, hidden)

    def observe(batch: int, hidden: Tensor, output: Tensor, inputs: dict[str, Tensor]) -> None:
        for group in block.groups:
            if group.name not in inputs:
                continue
            statistics, weights_T = found[group.name], None
            for spec in group.linears:
                if weights.rows and spec.name in squares and squares[spec.name].isfinite().all():
                    sums_O = squares[spec.name].sum(0, dtype=torch.float32)
                    sums_O = sums_O.to(devices[group.name], torch.float64)
                    statistics.rows[spec.name] = statistics.rows.get(spec.name, 0.0) + sums_O
            if weights.tokens and group.name in squares:
                weights_T = token_weights(squares[group.name])
                if group.token_aligned:
                    statistics.tokens[batch] = weights_T
            statistics.moments.update_(inputs[group.name], weights_T)

    replay.pass_(index, before, outputs, observe, run=run)
    return found


def share_among_experts(
    block: Block, statistics: Mapping[str, GroupStatistics]
) -> dict[str, GroupStatistics]:
    """Statistics of a block, those of experts that saw fewer tokens than they have inputs made up to that
    number with the mean of all experts of the block: alone they would be singular, or nothing at all.
    """
    pools: dict[str, Moments] = {}
    for group in block.groups:
        if group.routed:
            own = statistics[group.name].moments
            pools[group.routed] = pools[group.routed] + own if group.routed in pools else own
    shared = {group.name: statistics[group.name] for group in block.groups}
    for group in block.groups:
        own = statistics[group.name].moments
        missing = group.in_features - own.count
        if group.routed and missing > 0:
            moments = own + pools[group.routed].scaled(missing)
            shared[group.name] = replace(statistics[group.name], moments=moments)
    return shared
