"""What was done, for people: the per-layer table, its plot, and the model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lrsd.errors import InputError
from lrsd.evaluate import EvalResult
from lrsd.numerics.allocate import dense_bytes, plan_bytes
from lrsd.storage.checkpoint import LayerRecord, Manifest

if TYPE_CHECKING:
    from lrsd.compress import Prepared


def summary_lines(manifest: Manifest) -> list[str]:
    """What came of it, and what it took."""
    seconds = ", ".join(f"{phase} {value:.0f} s" for phase, value in manifest.seconds.items())
    lines = result_lines(manifest)
    if manifest.seconds:
        lines.append(f"time            {seconds}")
    if {"peak", "predicted"} <= manifest.memory.keys():
        peak, predicted = manifest.memory["peak"], manifest.memory["predicted"]
        lines.append(f"memory          {_mb(peak)} of the host's at most, {_mb(predicted)} predicted")
    return lines


def result_lines(manifest: Manifest) -> list[str]:
    """A few lines: ratios, bits, multiply-adds."""
    kinds = _kinds(manifest)
    whole = manifest.settings.get("scope") == "checkpoint"
    kept = "embeddings and head in 8 bit" if whole else "embeddings, head and norms are kept"
    return [
        f"linear weights  {_mb(manifest.dense_linear_bytes)} -> {_mb(manifest.linear_bytes)}, "
        f"{manifest.ratio:.4g}x, {manifest.bits_per_weight:.3g} bits per weight",
        f"checkpoint      {manifest.checkpoint_ratio:.4g}x as a whole ({kept})",
        f"multiply-adds   {manifest.macs_per_token / 1e6:.1f} M per token in the linear weights, "
        f"dense {manifest.dense_macs_per_token / 1e6:.1f} M",
        f"layers          {', '.join(f'{count} {kind}' for kind, count in kinds.items())}",
        *_left_alone(manifest),
    ]


def _left_alone(manifest: Manifest) -> list[str]:
    """Lines on linear layers that stayed as they were and on experts that few tokens reached."""
    lines = []
    by_reason: dict[str, list[str]] = {}
    for name, reason in manifest.untouched.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(f"left dense      {shown} ({reason})")
    unsolved = {
        name: layer.status for name, layer in manifest.layers.items() if layer.status[:7] == "dense: "
    }
    lines += [f"left dense      {name} ({status[7:]})" for name, status in unsolved.items()]
    if damped := [name for name, layer in manifest.layers.items() if "damping" in layer.status]:
        lines.append(f"more damping    {len(damped)} layers, {damped[0]} among them; see lrsd inspect")
    starved = {
        name: layer.routed_tokens
        for name, layer in manifest.layers.items()
        if layer.routed_tokens is not None and layer.routed_tokens < layer.in_features
    }
    for name, tokens in starved.items():
        lines.append(f"few tokens      {name} saw {tokens}; made up with those of all experts of its block")
    return lines


def layer_table(manifest: Manifest) -> str:
    """One row per linear weight."""
    header = (
        f"{'layer':<40} {'shape':>11} {'rank':>5} {'cols':>5} {'rows':>5} {'codes':>7} {'bits':>5} {'KB':>7} "
        f"{'ratio':>6} {'error':>8} {'blend':>5}  status"
    )
    rows = [header]
    for name, layer in manifest.layers.items():
        rank = "dense" if layer.rank is None else str(layer.rank)
        bits = 8 * layer.bytes / (layer.out_features * layer.in_features)
        rows.append(
            f"{name:<40} {layer.out_features:>5}x{layer.in_features:<5} {rank:>5} {layer.columns:>5} "
            f"{layer.rows:>5} {_codes(layer):>7} {bits:>5.2f} {layer.bytes / 1e3:>7.1f} "
            f"{layer.dense_bytes / layer.bytes:>6.3f} {layer.error:>8.2e} {layer.blend:>5.2f}  {layer.status}"
        )
    return "\n".join(rows)


def _codes(layer: LayerRecord) -> str:
    if layer.coding is None:
        return "-"
    return layer.coding if layer.code_bits is None else f"{layer.code_bits} bit"


def plan_table(prepared: Prepared) -> str:
    """What a dry run shows: the plan per layer, its bytes, and about how long the rest would take."""
    rows = [
        f"{'layer':<40} {'shape':>11} {'rank':>5} {'cols':>5} {'rows':>5} {'KB':>7} {'predicted error':>15}"
    ]
    for name, layer in prepared.choice.plan.items():
        shape = prepared.curves[name].shape
        rank = "dense" if layer.rank is None else str(layer.rank)
        rows.append(
            f"{name:<40} {shape.out_features:>5}x{shape.in_features:<5} {rank:>5} {layer.columns:>5} "
            f"{layer.rows:>5} {layer.nbytes(shape) / 1e3:>7.1f} {layer.error:>15.2e}"
        )
    total, planned = dense_bytes(prepared.curves), plan_bytes(prepared.choice.plan, prepared.curves)
    return "\n".join([
        *rows,
        "",
        f"linear weights  {_mb(total)} -> {_mb(planned)}, {total / planned:.4g}x "
        f"(budget {prepared.budget:,} bytes)",
        f"allocation      {prepared.choice.name}, {_expected(prepared.choice.expected_kl)}"
        f"{'' if prepared.choice.propagate else 'not '}behind the compressed prefix",
        f"time            {sum(prepared.seconds.values()):.0f} s so far, "
        f"about {prepared.remaining_seconds:.0f} s to go",
        f"memory          {_mb(prepared.needs.memory)} at most, as predicted",
        f"disk            {_mb(prepared.needs.disk)} at most beside the output, as predicted",
    ])  # fmt: skip


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


def model_card(manifest: Manifest) -> str:
    """README.md of the checkpoint directory."""
    lines = "\n".join(f"    {line}" for line in result_lines(manifest))
    calibration = manifest.calibration
    return f"""---
base_model: {manifest.base_model}
library_name: transformers
tags: [lrsd, low-rank, sparse, compressed]
---
# {manifest.base_model}, compressed {manifest.ratio:.3g}x by lrsd {manifest.lrsd_version}

Each linear weight is stored as low rank + kept columns or rows + integer codes, fitted to its outputs on
{calibration["samples"]} x {calibration["seqlen"]} tokens of calibration text ({calibration["source"]}).
The source held its weights as {manifest.base_stored_as}.

{lines}

Load it with

```python
import lrsd  # registers the loader
from transformers import {manifest.model_class}

model = {manifest.model_class}.from_pretrained("this directory")
```

`lrsd eval` measures it, `lrsd inspect` shows every layer, `lrsd export --dense` writes plain weights.
"""


def _kinds(manifest: Manifest) -> dict[str, int]:
    counts: dict[str, int] = {}
    for layer in manifest.layers.values():
        parts = (
            (layer.rank, "low rank"),
            (layer.columns, "columns"),
            (layer.rows, "rows"),
            (layer.coding, f"{_codes(layer)} codes"),
        )
        kind = " + ".join(name for present, name in parts if present) if layer.rank is not None else "dense"
        counts[kind] = counts.get(kind, 0) + 1
    return counts


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
