"""All layers at a glance: maps of block over kind of layer, one for each number of theirs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from lrsd.report.facts import Facts, LayerFacts, finite
from lrsd.report.figures import Figure
from lrsd.report.svg import STEPS, axes_of_size, boxes, drawing, inline, room_for
from lrsd.report.words import clipped

# Of a map; more blocks share a column, and kinds of fewer bytes are left out.
_MOST_BLOCKS, _MOST_KINDS = 96, 24
# Cells of one map that tell their number to a pointer: each takes about 200 bytes.
_MOST_TITLES = 1500
# Numbers that differ more than so much are shown by their logarithms.
_RANGE = 20.0
# Decades of a logarithmic scale: what is lower is as good as nothing.
_DECADES = 4
_ROW, _LABEL = 17, 20

Cells = dict[tuple[int, int], list[LayerFacts]]


@dataclass(frozen=True)
class Quantity:
    """One map. value: of the layers of a cell; ramp: the scale of colors."""

    name: str
    title: str
    caption: str
    ramp: str
    value: Callable[[Sequence[LayerFacts]], float]
    shown: Callable[[float], str]


def _percent(value: float) -> str:
    return f"{100 * value:.2g} %" if value < 0.995 else f"{100 * value:.0f} %"


def _two_digits(value: float) -> str:
    return f"{value:.2g}" if value < 99.5 else f"{value:,.0f}"


QUANTITIES = (
    Quantity(
        "bits", "Bits per weight", "All that is stored of a layer over its number of weights.", "cool",
        lambda cell: sum(8 * layer.record.bytes for layer in cell) / sum(layer.weights for layer in cell),
        lambda value: f"{value:.3g}",
    ),
    Quantity(
        "rank", "Rank of L", "As a share of the full rank.", "cool",
        lambda cell: sum(layer.rank_share for layer in cell) / len(cell), _percent,
    ),
    Quantity(
        "kept", "Kept by S", "Share of the weights that stay at 16 bit one by one, as channels or entries.",
        "cool", lambda cell: sum(layer.kept for layer in cell) / len(cell), _percent,
    ),
    Quantity(
        "error", "Output error", "Relative energy of what is wrong in a layer's output.", "warm",
        lambda cell: max(finite(layer.record.error) for layer in cell), _two_digits,
    ),
    Quantity(
        "sensitivity", "Sensitivity", "KL of the output, in nats per token, for a unit of a layer's error.",
        "warm", lambda cell: max(finite(layer.record.sensitivity) for layer in cell),
        _two_digits,
    ),
    Quantity(
        "loss", "Sensitivity × error", "What a layer adds to the loss, nats per token.", "warm",
        lambda cell: sum(layer.loss for layer in cell), _two_digits,
    ),
)  # fmt: skip


def heat_maps(facts: Facts) -> list[Figure]:
    """A map of every quantity that any layer has; none where no layer is in a block."""
    kinds = _kinds_of_maps(facts)
    cells, blocks_per_column = _cells(facts, kinds)
    maps = []
    for quantity in QUANTITIES:
        if not facts.measured and quantity.name in ("sensitivity", "loss"):
            continue
        values = {place: quantity.value(cell) for place, cell in cells.items()}
        if any(values.values()):
            maps.append(_heat_map(quantity, values, cells, kinds, blocks_per_column))
    return maps


def note_on_maps(facts: Facts) -> str:
    """What the maps sum up or leave out, in a sentence or none."""
    kinds = _kinds_of_maps(facts)
    cells, blocks_per_column = _cells(facts, kinds)
    most = max(map(len, cells.values()), default=0)
    outside = sum(layer.block is None for layer in facts.layers)
    dropped = len({kind for kind, _ in facts.cells}) - len(kinds)
    several = "the experts of a block" if blocks_per_column == 1 else f"{blocks_per_column} blocks each"
    sentences = []
    if most > 1:
        sentences.append(
            f"A cell is of {several}, {most} layers at most: bits, rank and kept weights are means, error "
            "and sensitivity those of the worst, and losses are added up."
        )
    if dropped:
        sentences.append(f"{dropped} kinds of layers with fewer bytes are not shown.")
    if outside:
        sentences.append(f"Layers outside of the blocks ({outside}) are in the list below.")
    return " ".join(sentences)


def _kinds_of_maps(facts: Facts) -> list[str]:
    sizes: dict[str, int] = {}
    for (kind, _), cell in facts.cells.items():
        sizes[kind] = sizes.get(kind, 0) + sum(layer.record.dense_bytes for layer in cell)
    largest = set(sorted(sizes, key=lambda kind: -sizes[kind])[:_MOST_KINDS])
    return [kind for kind in facts.kinds if kind in largest]


def _cells(facts: Facts, kinds: Sequence[str]) -> tuple[Cells, int]:
    """By row and column, and how many blocks a column is of."""
    rows = {kind: row for row, kind in enumerate(kinds)}
    last = max((block for _, block in facts.cells), default=0)
    together = -(-(last + 1) // _MOST_BLOCKS)
    found: Cells = {}
    for (kind, block), cell in facts.cells.items():
        if kind in rows:
            found.setdefault((rows[kind], block // together), []).extend(cell)
    return found, together


def _heat_map(
    quantity: Quantity,
    values: dict[tuple[int, int], float],
    cells: Cells,
    kinds: Sequence[str],
    together: int,
) -> Figure:
    scale = Scale.of([value for value in values.values() if value > 0])
    columns = 1 + max(column for _, column in values)
    titles: dict[str, list[str]] = {}
    squares: dict[int, list[tuple[float, float, float, float]]] = {}
    for (row, column), value in values.items():
        step = scale.step(value)
        squares.setdefault(step, []).append((column - 0.5, row - 0.5, 1, 1))
        if len(values) <= _MOST_TITLES:
            title = f"{_named(cells[row, column])}: {quantity.shown(value)}"
            titles.setdefault(f"step{step}", []).append(title)
    labels = [clipped(kind, _LABEL) for kind in kinds]
    with drawing(f"map {quantity.name}"):
        axes = axes_of_size(_ROW * len(kinds) + 56, left=room_for(labels), bottom=52, top=4)
        for step, found in squares.items():
            width = 0.6 if columns <= 64 else 0.2
            boxes(axes, found, f"{quantity.ramp}{step}", gid=f"step{step}", edge="page", width=width)
        axes.set(xlim=(-0.5, columns - 0.5), ylim=(len(kinds) - 0.5, -0.5))
        axes.set_yticks(range(len(kinds)), labels)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter(
            lambda place, _: f"{place * together:.0f}" if 0 <= place < columns else ""
        )
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        _draw_scale(axes, scale, quantity)
        svg = inline(axes, f"{quantity.title} of every layer, by block and kind", titles)
    return Figure(svg, quantity.caption, quantity.title)


def _named(cell: Sequence[LayerFacts]) -> str:
    more = f" and {len(cell) - 1} more" if len(cell) > 1 else ""
    return clipped(cell[0].name, 80) + more


@dataclass(frozen=True)
class Scale:
    """STEPS colors from `low` to `high`, in equal steps of the value or of its logarithm."""

    low: float
    high: float
    logarithmic: bool

    @staticmethod
    def of(values: Sequence[float]) -> "Scale":
        """values: positive."""
        high = max(values)
        low = max(min(values), high / 10**_DECADES)
        return Scale(low, high, low > 0 and high / low > _RANGE)

    def step(self, value: float) -> int:
        if self.high <= self.low:
            return STEPS // 2
        place = (self._on(value) - self._on(self.low)) / (self._on(self.high) - self._on(self.low))
        return min(STEPS - 1, max(0, int(place * STEPS)))

    def at(self, place: float) -> float:
        """The value at a place from 0 to 1."""
        on = self._on(self.low) + place * (self._on(self.high) - self._on(self.low))
        return 10**on if self.logarithmic else on

    def _on(self, value: float) -> float:
        return math.log10(max(value, self.low)) if self.logarithmic else value


def _draw_scale(axes: Axes, scale: Scale, quantity: Quantity) -> None:
    """The colors and what they stand for, below a map."""
    varied = scale.high > scale.low
    steps = range(STEPS) if varied else [STEPS // 2]
    places = (
        [(place, place / STEPS) for place in (0, STEPS // 2, STEPS)] if varied else [((STEPS + 1) / 2, 0.5)]
    )
    box, pixel = axes.get_position(), 1 / axes.figure.bbox.height
    bar = axes.figure.add_axes((box.x0 + box.width / 4, 20 * pixel, box.width / 2, 10 * pixel))
    for step in steps:
        boxes(bar, [(step, 0, 1, 1)], f"{quantity.ramp}{step}")
    bar.set(xlim=(0, STEPS), ylim=(0, 1), yticks=[])
    bar.set_xticks([place for place, _ in places], [quantity.shown(scale.at(part)) for _, part in places])
    bar.tick_params(length=0, pad=2)
    bar.spines[:].set_visible(False)
