"""The main job: model and text in, a compressed checkpoint directory out."""

import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, linear, log_softmax

from lrsd.config import CalibrationSettings, CompressionSettings, recipe
from lrsd.data import read_text, self_calibration, token_blocks
from lrsd.errors import BudgetError, InputError
from lrsd.model.hf import mark_packed
from lrsd.model.layout import InputGroup, LinearSpec, find_layout, read_weight
from lrsd.model.linear import LowRankSparseLinear
from lrsd.model.load import LoadedModel, check_finite, fingerprint, load_model
from lrsd.model.replay import Replay, Stream
from lrsd.numerics.allocate import (
    LayerCurve,
    LayerPlan,
    Plan,
    allocate_by_weight,
    allocate_energy,
    allocate_uniform,
    dense_bytes,
    plan_bytes,
)
from lrsd.numerics.moments import CrossMoments, Moments
from lrsd.numerics.solver import (
    Decomposition,
    decompose,
    decompose_thresholded,
    propagated_target,
    relative_error,
)
from lrsd.progress import Progress
from lrsd.report import model_card
from lrsd.storage.checkpoint import (
    RECIPE_NAME,
    LayerRecord,
    Manifest,
    new_directory,
    require_free,
    stored_bytes,
    write_manifest,
)
from lrsd.survey import Survey, metric, survey_model

# One sample in eight is kept out of the fit: it chooses the blend and the plan.
_HELD_OUT = 8
# Samples on which plans are compared: their dense logits are held in memory meanwhile.
_COMPARED_SAMPLES = 4
# Least fraction of the average bytes that the allocation may leave a layer: sensitivities are
# local, and a layer far below the average has an error they say nothing about.
_FLOOR = 0.3
# Time of the fit over time of the survey, as measured on SmolLM2-135M; for the dry run's guess only.
_FIT_PER_SURVEY = 1.3


@dataclass(frozen=True)
class Fitted:
    """One layer's result: what is stored, what was planned, and how far its target moved."""

    packed: LowRankSparseLinear | None
    plan: LayerPlan
    error: float
    blend: float
    status: str
    history: tuple[float, ...] = ()


@dataclass
class Clock:
    """Seconds per phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def compress(
    source: str,
    output: Path,
    settings: CompressionSettings,
    calibration: CalibrationSettings,
    progress: Progress | None = None,
) -> Manifest:
    """Compress the model at `source` into the new directory `output`.

    Survey the dense model on calibration text, allocate the byte budget among its layers, fit them
    block by block behind the compressed prefix, and write the packed checkpoint.

    Raises: LrsdError; nothing is left at `output` then.
    """
    require_free(output)
    progress, clock = progress or Progress(), Clock()
    with torch.inference_mode():
        prepared = prepare(source, settings, calibration, progress, clock)
        with clock("solve"):
            fitted = fit_blocks(prepared, settings, progress)
    with clock("write"):
        return write_checkpoint(prepared, fitted, output, settings, calibration, clock)


@dataclass(frozen=True)
class Prepared:
    """Everything known before the first layer is changed; what `--dry-run` shows."""

    loaded: LoadedModel
    fingerprint: str
    tokens: Tensor
    replay: Replay
    stream: Stream
    survey: Survey
    plan: Plan
    budget: int
    candidates: dict[str, float]
    chosen: str
    seconds: dict[str, float]

    @property
    def curves(self) -> dict[str, LayerCurve]:
        return self.survey.curves

    @property
    def remaining_seconds(self) -> float:
        """A rough guess at the fit, from the survey, which runs the same model over the same tokens."""
        return _FIT_PER_SURVEY * self.seconds["survey"]

    def to_dict(self) -> dict[str, Any]:
        return {
            "budget_bytes": self.budget,
            "planned_bytes": plan_bytes(self.plan, self.curves),
            "dense_linear_bytes": dense_bytes(self.curves),
            "allocation": self.candidates,
            "allocation_chosen": self.chosen,
            "seconds": self.seconds,
            "remaining_seconds": self.remaining_seconds,
            "layers": {
                name: {**asdict(layer), "bytes": layer.nbytes(self.curves[name].shape)}
                for name, layer in self.plan.items()
            },
        }


def dry_run(
    source: str,
    settings: CompressionSettings,
    calibration: CalibrationSettings,
    progress: Progress | None = None,
) -> Prepared:
    """Survey and allocate only; nothing is written."""
    with torch.inference_mode():
        return prepare(source, settings, calibration, progress or Progress(), Clock())


def prepare(
    source: str,
    settings: CompressionSettings,
    calibration: CalibrationSettings,
    progress: Progress,
    clock: Clock,
) -> Prepared:
    """Load, read calibration text, survey, allocate."""
    with clock("load"):
        loaded = load_model(source, dtype=settings.dtype, device=settings.device)
        if getattr(loaded.model, "is_quantized", False):
            raise InputError(f"{source} is already compressed; compress the dense model it was made from")
        layout = find_layout(loaded.model)
        for name, parameter in loaded.model.named_parameters():
            check_finite(name, parameter)
        identity = fingerprint(loaded.model)
    with clock("calibration text"):
        tokens = calibration_tokens(loaded, identity, calibration, progress)
    with clock("survey"):
        replay, stream = Replay.start(loaded.model, layout, tokens.split(settings.batch))
        progress.stage("survey", len(layout.blocks))
        survey = survey_model(replay, stream, tokens, settings, progress.step)
    with clock("allocate"):
        budget = int(dense_bytes(survey.curves) / settings.ratio)
        plan, candidates, chosen = choose_plan(replay, survey, tokens, budget, settings, progress)
    return Prepared(
        loaded, identity, tokens, replay, stream, survey, plan, budget, candidates, chosen, clock.seconds
    )


def calibration_tokens(
    loaded: LoadedModel, identity: str, calibration: CalibrationSettings, progress: Progress
) -> Tensor:
    """(samples, seqlen) token ids: sampled from the model itself, or cut from text."""
    limit = loaded.context_length
    if limit is not None and calibration.seqlen > limit:
        raise InputError(f"the model reads at most {limit} tokens; lower --seqlen from {calibration.seqlen}")
    if calibration.source == "self":
        return self_calibration(loaded.model, loaded.tokenizer, identity, calibration, progress)
    text = read_text(calibration.source, split="train", option="--calib")
    return token_blocks(
        loaded.tokenizer, text, samples=calibration.samples, seqlen=calibration.seqlen, seed=calibration.seed
    )


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
    if settings.rank is not None:
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
    held_out = tokens[-max(1, tokens.shape[0] // _HELD_OUT) :][:_COMPARED_SAMPLES].to(model.device)
    originals: dict[str, nn.Parameter] = {}
    reference = [log_softmax(model(batch, use_cache=False).logits.float(), -1) for batch in held_out.split(1)]
    for group in replay.layout.groups:
        gram_II = metric(settings, survey.moments[group.name]).float()
        for spec in group.linears:
            layer, curve = plan[spec.name], survey.curves[spec.name]
            if not layer.is_dense:
                # Columns and rows as surveyed: to improve them here would take most of the time.
                found = solve_layer(
                    read_weight(model, spec), gram_II, layer, curve, settings, alternate=False
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


def exchange_weight(model: nn.Module, spec: LinearSpec, W_OI: Tensor) -> nn.Parameter:
    """Put another weight in place; the old one is returned."""
    module = model.get_submodule(spec.name)
    original = module.weight
    assert isinstance(original, nn.Parameter)
    stored = (W_OI.T if spec.transposed else W_OI).to(original.dtype).contiguous()
    module.weight = nn.Parameter(stored, requires_grad=False)
    return original


def fit_blocks(prepared: Prepared, settings: CompressionSettings, progress: Progress) -> dict[str, Fitted]:
    """Fit every planned layer, in the order in which the model runs them.

    With propagation two streams of hidden states go through the model side by side, one dense and
    one behind the layers fitted so far; without it the survey's moments are all that is needed.
    """
    replay, model = prepared.replay, prepared.loaded.model
    progress.stage("compress", len(replay.layout.blocks))
    fitted: dict[str, Fitted] = {}
    dense_stream, stream = prepared.stream, prepared.stream
    for index, block in enumerate(replay.layout.blocks):
        after: Stream | None = None
        if settings.propagates:
            dense_inputs, dense_stream = _dense_pass(replay, index, dense_stream)
        for group in block.groups:
            if settings.propagates:
                pair = _pair_moments(replay, index, group, dense_inputs.pop(group.name), dense_stream, stream)
                aims = {spec.name: _propagated_aim(model, spec, pair) for spec in group.linears}
            else:
                moments = prepared.survey.moments[group.name]
                aims = {spec.name: _plain_aim(model, spec, moments, settings) for spec in group.linears}
            before = _affine(model, group.linears[0])
            for spec in group.linears:
                fitted[spec.name] = _fit_layer(prepared, spec, aims[spec.name], settings)
            if settings.propagates and pair.closing is not None:
                after = _moved(pair.closing, before, _affine(model, group.linears[0]))
        if settings.propagates:
            stream = after or [replay.run(index, hidden) for hidden in stream]
        progress.step(block.name)
    return fitted


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


def _plain_aim(model: nn.Module, spec: LinearSpec, moments: Moments, settings: CompressionSettings) -> _Aim:
    """The layer's own weight on the dense model's inputs."""
    W_OI = read_weight(model, spec).double()
    return _Aim(W_OI, metric(settings, moments), W_OI @ moments.mean, moments.mean, blend=0.0)


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
    held_out = max(1, sum(len(hidden) for hidden in stream) // _HELD_OUT)
    first_held_out = sum(len(hidden) for hidden in stream) - held_out
    seen = 0
    closing: list[tuple[Tensor, Tensor]] = []
    for hidden, dense_x, dense_y in zip(stream, dense_inputs, dense_after, strict=True):
        if closes:
            y, inputs = replay.run_with_inputs(index, hidden)
            x, t = inputs[group.name], dense_y.float() - y.float()
            closing.append((y, x))
        else:
            x, t = replay.input_of(index, group.name, hidden), dense_x
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


def _propagated_aim(model: nn.Module, spec: LinearSpec, pair: _Pair) -> _Aim:
    """A weight between W and W*, which makes up for the prefix's errors, as far as held-out text agrees.

    The held-out error is quadratic along W + b (W* - W), so that the best blend b has a closed form.
    """
    W_OI = read_weight(model, spec).double()

    def target(moments: Moments, cross: CrossMoments) -> Tensor:
        if pair.closing is not None:
            return W_OI @ moments.gram + cross.mean
        return W_OI @ cross.mean

    moments, cross = pair.fit + pair.held_out, pair.fit_cross + pair.held_out_cross
    step_OI = propagated_target(W_OI, pair.fit.gram, target(pair.fit, pair.fit_cross)) - W_OI
    held_out_II = pair.held_out.gram
    curvature = float(((step_OI @ held_out_II) * step_OI).sum())
    slope = float((step_OI * (target(pair.held_out, pair.held_out_cross) - W_OI @ held_out_II)).sum())
    blend = min(max(slope / curvature, 0.0), 1.0) if curvature > 0 else 0.0
    full_OI = propagated_target(W_OI, moments.gram, target(moments, cross))
    input_mean_I = moments.mean
    target_mean_O = (
        W_OI @ input_mean_I + cross.target_mean if pair.closing is not None else W_OI @ cross.target_mean
    )
    return _Aim(W_OI + blend * (full_OI - W_OI), moments.gram, target_mean_O, input_mean_I, blend)


def _fit_layer(prepared: Prepared, spec: LinearSpec, aim: _Aim, settings: CompressionSettings) -> Fitted:
    """Solve and pack one layer; what it decodes to goes into the model, for the layers behind it.

    The packed form itself goes in at the end: until then the dense product is faster to run. A layer
    left dense still takes the propagated weight.
    """
    model, plan = prepared.loaded.model, prepared.plan[spec.name]
    if plan.is_dense:
        if aim.blend:
            exchange_weight(model, spec, aim.W_OI)
        return Fitted(None, plan, 0.0, aim.blend, "dense")
    found = solve_layer(
        aim.W_OI, aim.gram_II, plan, prepared.curves[spec.name], settings, alternate=settings.alternations > 1
    )
    old = model.get_submodule(spec.name)
    bias_O = old.bias.double() if isinstance(old.bias, Tensor) else None
    if plan.bias or (bias_O is not None and settings.mean_correction):
        shift_O = aim.target_mean_O - found.dense() @ aim.input_mean_I
        bias_O = shift_O if bias_O is None else bias_O + shift_O
    weight = old.weight
    assert isinstance(weight, Tensor)
    packed = LowRankSparseLinear.pack(found, plan, bias_O, weight.dtype, transposed=spec.transposed)
    W_OI = packed.dense_weight(torch.float64).to(aim.W_OI.device)
    exchange_weight(model, spec, W_OI)
    if bias_O is not None:
        old.bias = nn.Parameter(bias_O.to(weight.dtype), requires_grad=False)
    error = relative_error(aim.W_OI, W_OI, aim.gram_II)
    return Fitted(packed, plan, error, aim.blend, found.status, found.history)


def solve_layer(
    W_OI: Tensor,
    gram_II: Tensor,
    plan: LayerPlan,
    curve: LayerCurve,
    settings: CompressionSettings,
    *,
    alternate: bool,
) -> Decomposition:
    """The decomposition that a plan asks for, from the columns or rows that the survey found."""
    support = curve.support_of(plan)
    assert plan.rank is not None, "dense layers are not solved"
    assert support is not None, "a plan's support is one of its curve's"
    if plan.entries is not None:
        return decompose_thresholded(
            W_OI, gram_II, rank=plan.rank, columns=plan.columns, entries=plan.entries,
            iterations=settings.alternations if alternate else 1,
        )  # fmt: skip
    start = None if support.kept is None else support.kept.to(W_OI.device)
    return decompose(
        W_OI, gram_II, rank=plan.rank, columns=plan.columns, rows=plan.rows, start=start, alternate=alternate
    )


def _dense_pass(replay: Replay, index: int, stream: Stream) -> tuple[dict[str, Stream], Stream]:
    """Inputs of every group of a block that is still dense, and the hidden states behind it."""
    inputs: dict[str, Stream] = {group.name: [] for group in replay.layout.blocks[index].groups}
    after: Stream = []
    for hidden in stream:
        output, seen = replay.run_with_inputs(index, hidden)
        for name, x in seen.items():
            inputs[name].append(x)
        after.append(output)
    return inputs, after


def write_checkpoint(
    prepared: Prepared,
    fitted: dict[str, Fitted],
    output: Path,
    settings: CompressionSettings,
    calibration: CalibrationSettings,
    clock: Clock,
) -> Manifest:
    """The checkpoint directory: packed weights, tokenizer, manifest, model card."""
    loaded, curves = prepared.loaded, prepared.curves
    formats = {name: layer.packed.layout for name, layer in fitted.items() if layer.packed is not None}
    for name, layer in fitted.items():
        if layer.packed is not None:
            loaded.model.set_submodule(name, layer.packed)
    mark_packed(loaded.model, formats)
    with new_directory(output) as aside:
        loaded.model.save_pretrained(aside)
        loaded.tokenizer.save_pretrained(aside)
        layers = {name: _record(prepared, name, layer) for name, layer in fitted.items()}
        added = sum(layer.bytes for layer in layers.values())
        total = dense_bytes(curves)
        everything = stored_bytes(aside)
        manifest = Manifest(
            base_model=Path(prepared.loaded.source).name,
            base_fingerprint=prepared.fingerprint,
            base_stored_as=loaded.stored_as,
            lrsd_version=version("lrsd"),
            environment=environment(),
            calibration=asdict(calibration),
            settings=asdict(settings),
            ratio=total / added,
            checkpoint_ratio=(everything - added + total) / everything,
            linear_bytes=added,
            dense_linear_bytes=total,
            budget_bytes=prepared.budget,
            bits_per_weight=16 * added / total,
            macs_per_token=sum(_macs(fitted[name], curve) for name, curve in curves.items()),
            dense_macs_per_token=total // 2,
            allocation=prepared.candidates,
            allocation_chosen=prepared.chosen,
            seconds={phase: round(seconds, 2) for phase, seconds in clock.seconds.items()},
            layers=layers,
            untouched=prepared.replay.layout.untouched,
        )
        write_manifest(aside, manifest)
        (aside / RECIPE_NAME).write_text(json.dumps(recipe(settings, calibration), indent=1) + "\n")
        (aside / "README.md").write_text(model_card(manifest), encoding="utf-8")
    return manifest


def _record(prepared: Prepared, name: str, layer: Fitted) -> LayerRecord:
    shape = prepared.curves[name].shape
    return LayerRecord(
        out_features=shape.out_features,
        in_features=shape.in_features,
        rank=layer.plan.rank,
        columns=layer.plan.columns,
        rows=layer.plan.rows,
        entries=layer.plan.entries,
        bias=layer.plan.bias,
        bytes=layer.plan.nbytes(shape),
        dense_bytes=shape.dense_bytes,
        error=layer.error,
        predicted_error=layer.plan.error,
        sensitivity=prepared.survey.sensitivity[name],
        blend=layer.blend,
        status=layer.status,
        history=layer.history,
    )


def _macs(layer: Fitted, curve: LayerCurve) -> int:
    """Multiply-adds per token: one for every stored value."""
    if layer.packed is None:
        return curve.shape.dense_bytes // 2
    return sum(
        p.numel() for p in layer.packed.parameters() if p.is_floating_point() and p is not layer.packed.bias
    )


def environment() -> dict[str, str]:
    """Versions that a result may depend on."""
    packages = ("torch", "transformers", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
