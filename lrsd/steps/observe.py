"""The calibration pass: moments of every input group, what each layer offers, and how sensitive the output
is."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lrsd.errors import SolverError
from lrsd.methods.base import LayerProblem, Method, Probe
from lrsd.model.layout import Block, InputGroup
from lrsd.model.load import check_finite, exact_device
from lrsd.model.replay import Replay
from lrsd.model.samples import Samples
from lrsd.model.slots import weight_slot
from lrsd.numerics.menu import Menu
from lrsd.numerics.metric import Metric
from lrsd.numerics.moments import Moments
from lrsd.steps.sensitivity import BlockProbe
from lrsd.work.journal import Workspace
from lrsd.work.process import release_freed
from lrsd.work.streams import Stream

# One sample in eight is kept out of the fit: it chooses the interpolation weight and the plan.
HELD_OUT = 8


@dataclass(frozen=True)
class Observation:
    """menus: what each layer offers; sensitivity: KL of the output per unit of relative error.

    moments: by input group. routed: calibration tokens that reached each expert's layers. unsolved: layers
    that offer nothing, and why.
    """

    moments: Mapping[str, Moments]
    menus: dict[str, Menu]
    sensitivity: dict[str, float]
    routed: dict[str, int] = field(default_factory=dict)
    unsolved: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ObservedBlock:
    """What is kept of one block. probe: the hidden states of the probe's samples after the block."""

    menus: dict[str, Menu]
    sensitivity: dict[str, float]
    routed: dict[str, int]
    unsolved: dict[str, str]
    probe: Tensor | None


@dataclass(frozen=True)
class BlockMoments:
    """`Moments.state` by input group: a record of its own, read when the block is fitted."""

    states: dict[str, dict[str, Tensor]]


def observe_model(
    replay: Replay,
    samples: Samples,
    method: Method,
    ratio: float,
    *,
    probing: bool = True,
    progress: Callable[[str], None] = lambda block: None,
    workspace: Workspace | None = None,
    moments: Mapping[str, Moments] | None = None,
    sensitivity: Mapping[str, float] | None = None,
) -> Observation:
    """One dense pass, block by block: moments per input group, menus, sensitivities.

    Args: samples: what the replay's batches and the probes are cut from; ratio: of the linear weights;
    probing:
        whether sensitivities are measured; workspace: where finished blocks are kept, and which are not
        observed again; moments, sensitivity: of an earlier observation of the same model and text, which
        spare the pass and the probes.
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
            found, outputs = moments, None
            if found is None:
                before = (
                    replay.inputs[block.stack]
                    if block.is_first
                    else workspace.stream(observe_step(index - 1))
                )
                outputs = workspace.new_stream(step)
                found = block_moments(replay, index, before, outputs)
            routed = {g.name: found[g.name].count for g in block.groups if g.routed}
            found = share_among_experts(block, found)
            record = _observe_block(replay, block, found, routed, method, ratio, probe)
            states = BlockMoments({group.name: found[group.name].state() for group in block.groups})
            keep = [step] if outputs is not None else []
            workspace.put(_moments_of(step), states)
            workspace.finish(step, record, keep=keep)
            observed.append(record)
        else:
            observed.append(workspace.read(step, ObservedBlock))
        replay.finished(replay.block(index))
        progress(block.name)
    menus = {name: menu for block in observed for name, menu in block.menus.items()}
    unmeasured = 0.0 if probing else 1.0
    if sensitivity is None:
        sensitivity = {name: weight for block in observed for name, weight in block.sensitivity.items()}
    return Observation(
        _StoredMoments(workspace, replay) if moments is None else moments,
        menus,
        {name: sensitivity.get(name, unmeasured) for name in menus},
        {name: count for block in observed for name, count in block.routed.items()},
        {name: reason for block in observed for name, reason in block.unsolved.items()},
    )


def observe_step(index: int) -> str:
    """The name of a block's step in the journal, and of the stream of its outputs."""
    return f"observe-{index:04d}"


def _moments_of(step: str) -> str:
    return f"{step}.moments"


def layer_problem(replay: Replay, name: str, metric: Metric, ratio: float) -> LayerProblem:
    """The dense layer's own weight in its metric. ratio: of an equal share."""
    slot = weight_slot(replay.model, name)
    W_OI = slot.read().to(metric.gram)
    share = slot.shape.dense_bytes / ratio
    return LayerProblem(
        W_OI, metric, slot.parameter.dtype, share, bias_O=None if slot.bias is None else slot.bias.to(W_OI)
    )


def _observe_block(
    replay: Replay,
    block: Block,
    moments: Mapping[str, Moments],
    routed: dict[str, int],
    method: Method,
    ratio: float,
    probe: BlockProbe | None,
) -> ObservedBlock:
    menus: dict[str, Menu] = {}
    unsolved: dict[str, str] = {}
    probes: dict[str, Probe] | None = {} if probe else None
    for group in block.groups:
        _observe_group(replay, group, moments[group.name], method, ratio, menus, unsolved, probes)
        release_freed()
    measured: dict[str, float] = {}
    after: Tensor | None = None
    if probe:
        assert probes is not None
        measured, after = probe.measure(probes), probe.after
        probe.advance()
    return ObservedBlock(menus, measured, routed, unsolved, after)


def _observe_group(
    replay: Replay,
    group: InputGroup,
    moments: Moments,
    method: Method,
    ratio: float,
    menus: dict[str, Menu],
    unsolved: dict[str, str],
    probes: dict[str, Probe] | None,
) -> None:
    """Menus of the layers of one group; one that cannot be solved offers nothing but its dense weight."""
    metric = method.metric(moments)
    check_finite(f"the input of {group.name}", metric.gram)
    for spec in group.linears:
        problem = layer_problem(replay, spec.name, metric, ratio)
        try:
            menu = method.offer(problem)
            if probes is not None:
                probes[spec.name] = method.probe(problem, menu)
        except SolverError as error:
            menu, unsolved[spec.name] = Menu.of(spec.shape.dense_bytes), str(error)
        menus[spec.name] = menu


class _StoredMoments(Mapping[str, Moments]):
    """Moments of every input group, read from the finished steps when asked for: about two bytes per entry
    of G, of all layers of a large model, do not fit in memory beside it."""

    def __init__(self, workspace: Workspace, replay: Replay) -> None:
        self._workspace, self._device = workspace, exact_device(replay.model.device)
        blocks = enumerate(replay.layout.blocks)
        self._steps = {group.name: observe_step(index) for index, block in blocks for group in block.groups}
        self._last: tuple[str, dict[str, dict[str, Tensor]]] = "", {}

    def __getitem__(self, group: str) -> Moments:
        step = self._steps[group]
        if self._last[0] != step:  # the groups of a block follow each other, and share its record
            self._last = step, self._workspace.read(_moments_of(step), BlockMoments).states
        return Moments.from_state(self._last[1][group], self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)


def block_moments(replay: Replay, index: int, before: Stream, outputs: Stream) -> dict[str, Moments]:
    """Moments of every input group of one block; the block's outputs go into `outputs`."""
    block, device = replay.layout.blocks[index], exact_device(replay.model.device)
    moments = {group.name: Moments(group.in_features, device) for group in block.groups}

    def observe(batch: int, hidden: Tensor, output: Tensor, inputs: dict[str, Tensor]) -> None:
        for name, x in inputs.items():
            moments[name].update_(x)

    replay.pass_(index, before, outputs, observe)
    return moments


def share_among_experts(block: Block, moments: Mapping[str, Moments]) -> dict[str, Moments]:
    """Moments of a block, those of experts that saw fewer tokens than they have inputs made up to that number
    with the mean of all experts of the block: alone they would be singular, or nothing at all.
    """
    pools: dict[str, Moments] = {}
    for group in block.groups:
        if group.routed:
            own = moments[group.name]
            pools[group.routed] = pools[group.routed] + own if group.routed in pools else own
    shared = {group.name: moments[group.name] for group in block.groups}
    for group in block.groups:
        missing = group.in_features - moments[group.name].count
        if group.routed and missing > 0:
            shared[group.name] = moments[group.name] + pools[group.routed].scaled(missing)
    return shared
