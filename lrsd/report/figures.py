"""The pictures of a report: bytes, layers at a glance, losses, convergence, spectra."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from lrsd.report.facts import Facts, LayerFacts, finite
from lrsd.report.spectra import Spectrum
from lrsd.report.svg import MOST_COLORS, WIDTH, axes_of_size, boxes, color, drawing, inline, room_for
from lrsd.report.words import clipped, megabytes

# Rows of the picture of bytes; what takes less is summed up.
_MOST_KINDS = 14
# Letters of a label beside a picture.
_LABEL = 22
_ROW = 21
# Dots of the picture of losses, those of the largest.
_MOST_DOTS = 1500
# Bars side by side.
_MOST_BARS = 128
# Layers whose numbers stand beside their dots.
_NUMBERED = 5
# Quantiles of the errors of all layers that the picture of convergence shows.
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Figure:
    """svg: the drawing; caption: what it shows; legend: role of a color, and what has it."""

    svg: Markup
    caption: str
    title: str = ""
    legend: list[tuple[str, str]] = field(default_factory=list)


def bytes_figure(facts: Facts) -> Figure:
    """Every kind of layer: its bytes at 16 bit as a frame, those stored within, by what they are."""
    groups: dict[str, list[LayerFacts]] = {}
    for layer in facts.layers:
        groups.setdefault(layer.kind, []).append(layer)
    largest = sorted(groups, key=lambda kind: -sum(layer.record.dense_bytes for layer in groups[kind]))
    rows = {kind: groups[kind] for kind in largest[: _MOST_KINDS - 1]}
    if more := [layer for kind in largest[_MOST_KINDS - 1 :] for layer in groups[kind]]:
        rows[f"{len(largest) - _MOST_KINDS + 1} other kinds"] = more
    roles = {part: f"part{number}" for number, part in enumerate(facts.parts)}
    widest = max(sum(layer.record.dense_bytes for layer in found) for found in rows.values())
    labels = [clipped(kind, _LABEL) for kind in rows]
    with drawing("bytes"):
        axes = axes_of_size(_ROW * len(rows) + 8, left=room_for(labels), bottom=4, top=4)
        for place, found in enumerate(rows.values()):
            dense, start, top = sum(layer.record.dense_bytes for layer in found), 0, place - 0.37
            boxes(axes, [(0, top, dense, 0.74)], "soft", edge="line", width=0.8)
            for part, role in roles.items():
                size = sum(layer.parts.get(part, 0) for layer in found)
                boxes(axes, [(start, top, size, 0.74)], role)
                start += size
            text, end = f"{megabytes(dense)} → {megabytes(start)}", max(dense, start) + widest / 60
            axes.text(end, place, text, va="center", fontsize=11, color=color("muted"))
        axes.set(xlim=(0, 1.5 * widest), ylim=(len(rows) - 0.5, -0.5), xticks=[])
        axes.set_yticks(range(len(rows)), labels)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        svg = inline(axes, "Bytes of every kind of layer, at 16 bit and as stored")
    legend = [(role, part) for part, role in roles.items()]
    return Figure(
        svg, "Layers of one kind together: 16-bit size (frame) and what is stored of it.",
        legend=[("soft", "16-bit size"), *legend],
    )  # fmt: skip


def loss_figure(facts: Facts) -> Figure | None:
    """Sensitivity over error, one dot for a layer, or for the experts of a block. None if nothing was
    measured, or all layers are exact."""
    dots = [layer for cell in facts.cells.values() for layer in [max(cell, key=lambda layer: layer.loss)]]
    dots += [layer for layer in facts.layers if layer.block is None]
    dots = sorted(dots, key=lambda layer: -layer.loss)[:_MOST_DOTS]
    shown = [
        (layer, finite(layer.record.error), finite(layer.record.sensitivity))
        for layer in dots
        if finite(layer.record.error) and finite(layer.record.sensitivity)
    ]
    if not facts.measured or len(shown) < 2:
        return None
    there = {layer.kind for layer, _, _ in shown}
    roles = {kind: role for kind, role in kind_roles(facts.kinds).items() if kind in there}
    numbers = {layer.name: number for number, layer in enumerate(facts.worst[:_NUMBERED], 1)}
    errors, weights = (np.array(values) for values in list(zip(*shown, strict=True))[1:])
    with drawing("loss"):
        axes = axes_of_size(330, left=56, bottom=42)
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="relative output error",
            ylabel="sensitivity, nats per unit of error",
        )
        low, high = errors.min() / 1.5, errors.max() * 1.5
        highest = int(np.ceil(np.log10((errors * weights).max())))
        for power in range(highest - 8, highest + 1):
            axes.plot([low, high], [10.0**power / low, 10.0**power / high], "--", color=color("line"), lw=0.9)
        titles: dict[str, list[str]] = {}
        for number, (kind, role) in enumerate(roles.items()):
            own = [found for found in shown if found[0].kind == kind]
            titles[f"dots{number}"] = [
                f"{clipped(layer.name, 120)}: {layer.loss:.3g} nats" for layer, *_ in own
            ]
            axes.scatter(
                [error for _, error, _ in own], [weight for *_, weight in own], s=30, lw=0.5,
                ec=color("page"), fc=color(role), gid=f"dots{number}", zorder=3,
            )  # fmt: skip
        for layer, error, weight in shown:
            if layer.name in numbers:
                axes.annotate(
                    str(numbers[layer.name]), (error, weight), xytext=(5, 3), textcoords="offset points",
                    fontsize=11, fontweight="bold", zorder=4,
                )  # fmt: skip
        axes.set(xlim=(low, high), ylim=(weights.min() / 1.7, weights.max() * 1.7))
        _label_plainly(axes.xaxis, axes.yaxis)
        svg = inline(axes, "Sensitivity of every layer over its error", titles)
    caption = (
        "A dot is a layer"
        + " (of experts the one that lost most)" * any(len(cell) > 1 for cell in facts.cells.values())
        + "; all on one dashed line add the same to the loss, ten times as much on the next one up. "
        "Numbers are those of the list."
    )  # fmt: skip
    return Figure(svg, caption, legend=_kind_legend(roles))


def depth_figure(facts: Facts) -> Figure | None:
    """The loss of every block, by kinds of layers. None where no layer of a block has any."""
    there = {kind for kind, _ in facts.cells}
    kinds = [kind for kind in facts.kinds if kind in there]
    last = max((block for _, block in facts.cells), default=0)
    heights = np.zeros((len(kinds), last // (together := last // _MOST_BARS + 1) + 1))
    for (kind, block), cell in facts.cells.items():
        heights[kinds.index(kind), block // together] += sum(layer.loss for layer in cell)
    if not heights.any():
        return None
    roles = {kind: role for kind, role in kind_roles(facts.kinds).items() if kind in there}
    told_apart = bool(_kind_legend(roles))
    drawn = heights if told_apart else heights.sum(axis=0, keepdims=True)
    with drawing("depth"):
        axes = axes_of_size(330, left=56, bottom=42)
        base = np.zeros(drawn.shape[1])
        for number, row in enumerate(drawn):
            bars = enumerate(zip(base, row, strict=True))
            found = [((x - 0.4) * together, low, 0.8 * together, size) for x, (low, size) in bars if size]
            boxes(axes, found, roles[kinds[number]])
            base = base + row
        axes.set(xlim=(-0.8 * together, (len(base) - 0.2) * together), ylim=(0, 1.05 * base.max()))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        axes.set(xlabel="block", ylabel="loss, nats per token" if facts.measured else "error, summed up")
        svg = inline(axes, "Loss of every block, by kinds of layers")
    several = f" {together} blocks are one bar." if together > 1 else ""
    return Figure(svg, f"Where in depth the loss is.{several}", legend=_kind_legend(roles))


def _label_plainly(*scales: Axis) -> None:
    """Powers of ten as numbers, or 1, 2 and 5 of them where they are few."""
    for scale in scales:
        low, high = scale.get_view_interval()
        few = high / low < 300
        scale.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
        scale.set_major_formatter(lambda value, _: f"{value:g}")
        scale.set_minor_locator(NullLocator())


def kind_roles(kinds: Sequence[str]) -> dict[str, str]:
    """A color for each, if there are enough."""
    if len(kinds) > MOST_COLORS:
        return dict.fromkeys(kinds, "part0")
    return {kind: f"part{number}" for number, kind in enumerate(kinds)}


def _kind_legend(roles: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(role, kind) for kind, role in roles.items()] if len({*roles.values()}) == len(roles) else []


def convergence_figure(facts: Facts) -> Figure | None:
    """Errors of the alternation, relative to its first round's. None where nothing alternates."""
    histories = [[finite(error) for error in layer.record.history] for layer in facts.layers]
    found = [history for history in histories if len(history) > 1 and history[0] > 0]
    if not found:
        return None
    rounds = max(map(len, found))
    # One that stood still stays where it ended; the best of its rounds is what is stored.
    relative = np.array([[*history, *[history[-1]] * (rounds - len(history))] for history in found])
    relative /= relative[:, :1]
    levels = np.quantile(relative, _QUANTILES, axis=0)
    with drawing("convergence"):
        axes = axes_of_size(240, left=46, bottom=42)
        numbers = range(1, rounds + 1)
        axes.fill_between(numbers, levels[0], levels[4], color=color("cool1"), lw=0)
        axes.fill_between(numbers, levels[1], levels[3], color=color("cool2"), lw=0)
        axes.plot(numbers, levels[2], "o-", ms=4, color=color("cool5"), lw=1.8)
        axes.axhline(1, color=color("line"), lw=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="round", ylabel="error / that of round 1", xlim=(1, rounds))
        svg = inline(axes, "Error after every round of the alternation")
    ends = float(np.median(relative.min(axis=1)))
    return Figure(
        svg,
        f"{len(found):,} of {len(facts.layers):,} layers alternated; the best of {rounds} rounds has, in the "
        f"median, {ends:.1%} of the first one's error.",
        legend=[("cool5", "median layer"), ("cool2", "half of the layers"), ("cool1", "nine tenths")],
    )


def spectra_figure(spectra: Sequence[Spectrum]) -> Figure | None:
    """Singular values of some stored weights."""
    if not spectra:
        return None
    roles = kind_roles([spectrum.label for spectrum in spectra])
    with drawing("spectra"):
        axes = axes_of_size(300, left=56, bottom=42)
        lowest = 1.0
        for spectrum in spectra:
            values, count = spectrum.values, len(spectrum.values)
            if not count or values[0] <= 0:
                continue
            # As many places as there are pixels to tell them apart.
            places = np.unique(np.linspace(0, count - 1, min(count, WIDTH // 3)).round().astype(int))
            heights = np.maximum(values[places] / values[0], 1e-4)
            lowest = min(lowest, float(heights.min()))
            role = color(roles[spectrum.label])
            axes.plot((places + 1) / count, heights, color=role, lw=1.6)
            if 0 < spectrum.rank <= count:
                here = max(values[spectrum.rank - 1] / values[0], 1e-4)
                axes.plot(spectrum.rank / count, here, "o", ms=7, mfc=color("page"), mec=role, mew=1.8)
        axes.set(
            yscale="log",
            xlabel="singular value, as a share of their number",
            ylabel="of the largest",
            xlim=(0, 1),
        )
        axes.set_ylim(lowest / 1.3, 1.2)
        _label_plainly(axes.yaxis)
        svg = inline(axes, "Singular values of stored weights")
    marked = " A ring is at the rank of L." if any(spectrum.rank for spectrum in spectra) else ""
    return Figure(
        svg,
        f"Singular values of the weights as stored, in block {spectra[0].block}, the one that lost most."
        + marked,
        legend=_kind_legend(roles),
    )
