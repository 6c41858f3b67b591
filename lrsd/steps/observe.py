"""The calibration pass: moments of every input group, what each layer offers, and how sensitive the output
is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from lrsd.errors import SolverError
from lrsd.methods.base import LayerProblem, Method, Probe
from lrsd.model.layout import InputGroup
from lrsd.model.load import check_finite
from lrsd.model.replay import Replay
from lrsd.model.samples import Samples
from lrsd.model.slots import weight_slot
from lrsd.numerics.menu import Menu
from lrsd.numerics.metric import Metric
from lrsd.steps.sensitivity import BlockProbe, with_unreached_experts
from lrsd.steps.statistics import (
    BlockStatistics,
    GroupStatistics,
    StoredStatistics,
    Weights,
    block_statistics,
    observe_step,
    share_among_experts,
    statistics_of,
)
from lrsd.work.journal import Workspace
from lrsd.work.process import release_freed

# One sample in eight is kept out of the fit: it chooses the interpolation weight and the plan.
HELD_OUT = 8


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
    for wave in replay.waves():
        missing = [index for index in wave if observe_step(index) not in workspace]
        if missing and probing and probe is None:
            last = workspace.read(observe_step(missing[0] - 1), ObservedBlock).probe if missing[0] else None
            probe = BlockProbe(replay.model, replay.layout, samples, missing[0], last)
        found = dict.fromkeys(missing, statistics) if statistics else {}
        unweighted: dict[int, str] = {}
        if statistics is None:
            for index in missing:
                weights = Weights(method.weighs_rows, method.weighs_tokens)
                seen = _pass_over(replay, index, workspace, weights)
                if replay.world.owns(index):
                    found[index], unweighted[index] = seen, weights.missing
        # What the wave's blocks were seen to do is made use of by all processes at the same time.
        for index in missing:
            if replay.world.owns(index):
                record = _observe_block(replay, index, found.pop(index), method, ratio, probe, workspace)
                workspace.put(observe_step(index), replace(record, unweighted=unweighted.get(index, "")))
            if probe:
                probe.advance()
        for index in wave:
            step, block = observe_step(index), replay.layout.blocks[index]
            if index in missing:
                workspace.finish(step, keep=[step] if statistics is None else [])
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
        StoredStatistics(workspace.read, replay),
        menus,
        {name: sensitivity.get(name, unmeasured) for name in menus},
        {name: count for block in observed for name, count in block.routed.items()},
        {name: reason for block in observed for name, reason in block.unsolved.items()},
    )


def fitted_samples(count: int) -> int:
    """Of so many samples, those that are fitted to; the others, the last ones, are held out."""
    return count - max(1, count // HELD_OUT)


def statistics_records(replay: Replay) -> list[str]:
    """Names of the records of all blocks' statistics, once the model is observed."""
    return [statistics_of(index) for index in range(len(replay.layout.blocks))]


def layer_problem(
    replay: Replay, name: str, metric: Metric, ratio: float, rows_O: Tensor | None = None
) -> LayerProblem:
    """The dense layer's own weight in its metric. ratio: of an equal share; rows: its row exponents."""
    slot = weight_slot(replay.model, name)
    W_OI = slot.read().to(metric.gram)
    share = slot.shape.dense_bytes / ratio
    bias_O = None if slot.bias is None else slot.bias.to(W_OI)
    return LayerProblem(W_OI, metric, slot.parameter.dtype, share, bias_O=bias_O).weighted(rows_O)


def _pass_over(
    replay: Replay, index: int, workspace: Workspace, weights: Weights
) -> dict[str, GroupStatistics]:
    block = replay.layout.blocks[index]
    before = replay.inputs[block.stack] if block.is_first else workspace.stream(observe_step(index - 1))
    return block_statistics(replay, index, before, workspace.new_stream(observe_step(index)), weights)


def _observe_block(
    replay: Replay,
    index: int,
    found: Mapping[str, GroupStatistics],
    method: Method,
    ratio: float,
    probe: BlockProbe | None,
    workspace: Workspace,
) -> ObservedBlock:
    """What a block's owner makes of its statistics, which are kept."""
    block = replay.layout.blocks[index]
    routed = {group.name: found[group.name].count for group in block.groups if group.routed}
    statistics = share_among_experts(block, found)
    workspace.put(statistics_of(index), BlockStatistics.of(statistics))
    menus: dict[str, Menu] = {}
    unsolved: dict[str, str] = {}
    probes: dict[str, Probe] | None = {} if probe else None
    for group in block.groups:
        own = statistics[group.name]
        own.moments.as_stored_()  # what is made of them is the same whoever reads them
        _observe_group(replay, group, own, method, ratio, menus, unsolved, probes)
        release_freed()
    measured: dict[str, float] = {}
    after: Tensor | None = None
    if probe:
        assert probes is not None
        measured = with_unreached_experts(block, probe.measure(probes), probe.reached, routed)
        after = probe.after
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
