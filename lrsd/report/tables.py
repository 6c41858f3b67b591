"""What was done, in lines for a terminal: the per-layer table, its plot, what was measured."""

from pathlib import Path

from lrsd.checkpoint.card import _mb, result_lines
from lrsd.checkpoint.manifest import LayerRecord, Manifest
from lrsd.errors import InputError
from lrsd.evaluate import EvalResult
from lrsd.numerics.menu import Choice
from lrsd.runtimes.lm_eval import TaskScore
from lrsd.steps.prepare import Prepared


def summary_lines(manifest: Manifest) -> list[str]:
    """What came of it, and what it took."""
    seconds = ", ".join(f"{phase} {value:.0f} s" for phase, value in manifest.seconds.items())
    lines = result_lines(manifest)
    if manifest.seconds:
        lines.append(f"time            {seconds}")
    if {"peak", "predicted"} <= manifest.memory.keys():
        peak, predicted = manifest.memory["peak"], manifest.memory["predicted"]
        lines.append(f"memory          {_mb(peak)} of the host's at most, {_mb(predicted)} predicted")
    if (there := manifest.memory.get("device_predicted")) is not None:
        most = manifest.memory.get("device_peak")
        line = "" if most is None else f"{_mb(most)} at most, "
        lines.append(f"device memory   {line}{_mb(there)} predicted")
    return lines


def layer_table(manifest: Manifest) -> str:
    """One row per linear weight."""
    rows = [
        f"{'layer':<40} {'shape':>11} {'bits':>5} {'KB':>7} {'ratio':>6} {'error':>8} {'interp.':>7}  "
        f"{'stored as':<32} status"
    ]
    for name, layer in manifest.layers.items():
        bits = 8 * layer.bytes / (layer.out_features * layer.in_features)
        status = layer.state + (f", damping {layer.damping:.0e}" if layer.damping else "")
        rows.append(
            f"{name:<40} {layer.out_features:>5}x{layer.in_features:<5} {bits:>5.2f} "
            f"{layer.bytes / 1e3:>7.1f} {layer.dense_bytes / layer.bytes:>6.3f} {layer.error:>8.2e} "
            f"{layer.interpolation:>7.2f}  {layer.stored_as:<32} {status}"
            + f": {layer.reason}"
            * bool(layer.reason)
        )
    return "\n".join(rows)


def plan_table(prepared: Prepared) -> str:
    """What a dry run shows: the plan per layer, its bytes, and about how long the rest would take."""
    source, plan = prepared.source, prepared.plan
    rows = [f"{'layer':<40} {'shape':>11} {'KB':>7} {'predicted error':>15}  stored as"]
    for name, choice in plan.choices.items():
        shape = source.shapes[name]
        rows.append(
            f"{name:<40} {shape.out_features:>5}x{shape.in_features:<5} {choice.nbytes / 1e3:>7.1f} "
            f"{choice.error:>15.2e}  {_parameters(choice)}"
        )
    total, planned = source.linear_bytes, plan.nbytes
    return "\n".join([
        *rows,
        "",
        f"linear weights  {_mb(total)} -> {_mb(planned)}, {total / planned:.4g}x "
        f"(budget {source.budget:,} bytes)",
        f"allocation      {plan.name}, {_expected(plan.expected_kl)}calibrated on the "
        f"{'compressed' if plan.propagate else 'dense'} model's activations",
        f"time            {sum(prepared.seconds.values()):.0f} s so far, "
        f"about {prepared.remaining_seconds:.0f} s to go",
        f"memory          {_mb(prepared.resources.memory)} at most, as estimated",
        *(
            [f"device memory   {_mb(prepared.resources.device)} at most, as estimated"]
            if prepared.resources.device
            else []
        ),
        f"disk            {_mb(prepared.resources.disk)} at most beside the output, as estimated",
    ])  # fmt: skip


def _parameters(choice: Choice) -> str:
    """An offer's own numbers, those that say anything."""
    if choice.parameters is None:
        return "dense"
    return ", ".join(f"{name} {value:.4g}" for name, value in choice.parameters.items() if value > 0)


def _expected(kl: float | None) -> str:
    return "" if kl is None else f"expected KL {kl:.3g} nats per token, "


def evaluation_lines(result: EvalResult) -> list[str]:
    """A few lines per text, the protocol beside the number."""
    lines = []
    for score in result.perplexity:
        lines.append(f"perplexity {score.perplexity:.4g}  {score.text}")
        lines.append(
            f"  {score.windows} windows of {score.seqlen}, {score.scored_tokens:,} tokens scored; "
            f"{score.protocol}"
        )
    for distance in result.divergence:
        lines.append(
            f"divergence {distance.kl:.4g} ({distance.measure}), "
            f"top-1 agreement {distance.top1_agreement:.1%}  {distance.text}"
        )
    lines += [_task_line(score) for score in result.tasks]
    if result.accuracy is not None:
        lines.append(
            f"accuracy   {result.accuracy.accuracy:.2%} of {result.accuracy.texts} texts  "
            f"{result.accuracy.text}"
        )
    if result.speed is not None:
        lines.append(
            f"speed      prefill {result.speed.prefill:.1f}, decode {result.speed.decode:.1f} tokens/s "
            f"(batch 1, {result.speed.device}, {result.speed.threads} threads)"
        )
    return lines


def _task_line(score: TaskScore) -> str:
    interval = "no interval" if score.low is None else f"{score.low:.4f} to {score.high:.4f} at 95 %"
    asked = f"{score.items} items, {score.shots} shots"
    return f"{score.metric:<10} {score.score:.4f} ({interval}), {asked}  {score.task}"


def plot_layers(manifest: Manifest, path: Path) -> None:
    """Error and size of every layer, as a PNG. Raises: InputError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("--plot needs matplotlib: pip install 'lrsd[plot]'") from error
    figure = Figure(figsize=(12, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    kinds: dict[str, list[tuple[int, LayerRecord]]] = {}
    for position, (name, layer) in enumerate(manifest.layers.items()):
        kinds.setdefault(name.rpartition(".")[2], []).append((position, layer))
    for kind, layers in kinds.items():
        positions = [position for position, _ in layers]
        upper.plot(positions, [max(layer.error, 1e-7) for _, layer in layers], "o-", label=kind, markersize=3)
        lower.plot(positions, [layer.bytes / layer.dense_bytes for _, layer in layers], "o-", markersize=3)
    upper.set(
        yscale="log", ylabel="relative output error", title=f"{manifest.base_model} at {manifest.ratio:.3g}x"
    )
    upper.legend(ncols=len(kinds), fontsize="small")
    lower.set(ylabel="bytes / dense bytes", xlabel="layer, in the order of the model", ylim=(0, 1.05))
    figure.savefig(path, dpi=120, format="png")
