"""What compression needs to know of a model before it decides anything: curves and sensitivities."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from lrsd.errors import SolverError
from lrsd.methods.base import Perturbation
from lrsd.methods.curves import coded_curve, layer_curve, metric, rounded, truncated
from lrsd.model.layout import Block, InputGroup, read_weight
from lrsd.model.load import check_finite, exact_device
from lrsd.model.replay import Replay
from lrsd.model.samples import Samples
from lrsd.numerics.allocate import LayerCurve
from lrsd.numerics.lowrank import spectrum
from lrsd.numerics.moments import Moments
from lrsd.numerics.quantize import feedback
from lrsd.settings import CompressionSettings
from lrsd.steps.sensitivity import Probe
from lrsd.work.journal import Workspace
from lrsd.work.process import release_freed
from lrsd.work.streams import Stream

# One sample in eight is kept out of the fit: it chooses the blend and the plan.
HELD_OUT = 8


@dataclass(frozen=True)
class Survey:
    """curves: what each layer offers; sensitivity: KL of the output per unit of relative error.

    routed: calibration tokens that reached each expert's layers. unsolved: layers without a curve, and why.
    """

    moments: Mapping[str, Moments]
    curves: dict[str, LayerCurve]
    sensitivity: dict[str, float]
    routed: dict[str, int] = field(default_factory=dict)
    unsolved: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SurveyedBlock:
    """What is kept of one block besides its moments. probe: the hidden states of the probe's samples after
    the block."""

    curves: dict[str, LayerCurve]
    sensitivity: dict[str, float]
    routed: dict[str, int]
    unsolved: dict[str, str]
    probe: Tensor | None


@dataclass(frozen=True)
class BlockMoments:
    """Moments of one block: `Moments.state` by input group. Apart from the curves, since the fit reads these
    only."""

    states: dict[str, dict[str, Tensor]]


def survey_model(
    replay: Replay,
    samples: Samples,
    settings: CompressionSettings,
    progress: Callable[[str], None] = lambda block: None,
    workspace: Workspace | None = None,
    moments: Mapping[str, Moments] | None = None,
    sensitivity: Mapping[str, float] | None = None,
) -> Survey:
    """One dense pass, block by block: moments per input group, error curves, sensitivities.

    Args: samples: what the replay's batches and the probes are cut from; workspace: where finished blocks
        are kept, and which are not surveyed again; moments, sensitivity: of an earlier survey of the same
        model and text, which spare the pass and the probes.
    """
    blocks = replay.layout.blocks
    workspace = Workspace() if workspace is None else workspace
    probing = sensitivity is None and needs_sensitivity(settings)
    probe: Probe | None = None
    surveyed: list[SurveyedBlock] = []
    for index, block in enumerate(blocks):
        step = survey_step(index)
        if step not in workspace:
            if probing and probe is None:
                probe = Probe(
                    replay.model, replay.layout, samples, index, surveyed[-1].probe if index else None
                )
            found, behind = moments, None
            if found is None:
                before = (
                    replay.entering[block.stack] if block.leads else workspace.stream(survey_step(index - 1))
                )
                behind = workspace.new_stream(step)
                found = block_moments(replay, index, before, behind)
            shared = share_among_experts(block, found)
            routed = {group.name: found[group.name].count for group in block.groups if group.routed}
            record = _survey_block(replay, block, shared, routed, settings, probe)
            states = {group.name: shared[group.name].state() for group in block.groups}
            workspace.put(_moments_of(step), BlockMoments(states))
            workspace.finish(step, record, keep=[step] if behind is not None else [])
        replay.finished(replay.block(index))
        surveyed.append(workspace.read(step, SurveyedBlock))
        progress(block.name)
    curves = {name: curve for block in surveyed for name, curve in block.curves.items()}
    unmeasured = 0.0 if probing else 1.0
    if sensitivity is None:
        sensitivity = {name: weight for block in surveyed for name, weight in block.sensitivity.items()}
    return Survey(
        _StoredMoments(workspace, replay) if moments is None else moments,
        curves,
        {name: sensitivity.get(name, unmeasured) for name in curves},
        {name: count for block in surveyed for name, count in block.routed.items()},
        {name: reason for block in surveyed for name, reason in block.unsolved.items()},
    )


def survey_step(index: int) -> str:
    """The name of a block's step in the journal, and of the stream behind the block."""
    return f"survey-{index:04d}"


def _moments_of(step: str) -> str:
    return f"{step}.moments"


def _survey_block(
    replay: Replay,
    block: Block,
    moments: Mapping[str, Moments],
    routed: dict[str, int],
    settings: CompressionSettings,
    probe: Probe | None,
) -> SurveyedBlock:
    curves: dict[str, LayerCurve] = {}
    unsolved: dict[str, str] = {}
    perturbations: list[Perturbation] = []
    for group in block.groups:
        asked = perturbations if probe else None
        curves |= _survey_group(replay, group, moments[group.name], settings, unsolved, asked)
        release_freed()
    measured: dict[str, float] = {}
    behind: Tensor | None = None
    if probe:
        measured, behind = probe.measure(perturbations), probe.behind
        probe.advance()
    return SurveyedBlock(curves, measured, routed, unsolved, behind)


def _survey_group(
    replay: Replay,
    group: InputGroup,
    moments: Moments,
    settings: CompressionSettings,
    unsolved: dict[str, str],
    perturbations: list[Perturbation] | None,
) -> dict[str, LayerCurve]:
    """Curves of the layers of one group; one that cannot be solved offers nothing but its dense weight.

    unsolved: these are added to it; perturbations: what a probe perturbs the others by is added to it.
    """
    curves: dict[str, LayerCurve] = {}
    gram_II = metric(settings, moments)
    check_finite(f"the input of {group.name}", gram_II)
    carry = feedback(gram_II) if has_codes(settings) else None
    for spec in group.linears:
        W_OI = read_weight(replay.model, spec).to(gram_II)
        try:
            if carry is not None:
                curve = coded_curve(W_OI, gram_II, carry, spec, settings)
                perturbation = partial(rounded, spec, W_OI, gram_II, carry)
            else:
                whole = spectrum(W_OI, gram_II)
                curve = layer_curve(W_OI, gram_II, whole, spec, settings)
                perturbation = partial(truncated, spec, W_OI, whole)
            if perturbations is not None:
                perturbations.append(perturbation(curve, settings))
        except SolverError as error:
            curve, unsolved[spec.name] = LayerCurve(spec.shape, ()), str(error)
        curves[spec.name] = curve
    return curves


class _StoredMoments(Mapping[str, Moments]):
    """Moments of every input group, read from the finished survey when asked for: about two bytes per entry
    of G, of all layers of a large model, do not fit in memory beside it."""

    def __init__(self, workspace: Workspace, replay: Replay) -> None:
        self._workspace, self._device = workspace, exact_device(replay.model.device)
        blocks = enumerate(replay.layout.blocks)
        self._steps = {group.name: survey_step(index) for index, block in blocks for group in block.groups}
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


def needs_sensitivity(settings: CompressionSettings) -> bool:
    by_rank = settings.rank is not None and not has_codes(settings)
    return settings.allocates_by in ("auto", "kl") and not by_rank


def has_codes(settings: CompressionSettings) -> bool:
    return settings.entropy_coded or bool(settings.code_widths)


def block_moments(replay: Replay, index: int, before: Stream, behind: Stream) -> dict[str, Moments]:
    """Moments of every input group of one block; the hidden states behind it are appended to `behind`."""
    block = replay.layout.blocks[index]
    device = exact_device(replay.model.device)
    moments = {group.name: Moments(group.in_features, device) for group in block.groups}
    for batch, hidden in enumerate(before):
        output, inputs = replay.run_with_inputs(index, batch, hidden)
        for name, x in inputs.items():
            moments[name].update_(x)
        behind.append(output)
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
    shared = dict(moments)
    for group in block.groups:
        missing = group.in_features - moments[group.name].count
        if group.routed and missing > 0:
            shared[group.name] = moments[group.name] + pools[group.routed].scaled(missing)
    return shared
