"""Figures of matplotlib as SVG within a page, whose colors are the page's, light or dark.

A figure is drawn in stand-in colors, one for each role; they become the page's CSS variables.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

# Steps of a scale of colors; more cannot be told apart.
STEPS = 8
# Lines and dots of different things; more are drawn alike.
MOST_COLORS = 8
_ROLES = (
    "ink", "muted", "line", "soft", "page",
    *(f"cool{step}" for step in range(STEPS)), *(f"warm{step}" for step in range(STEPS)),
    *(f"part{number}" for number in range(MOST_COLORS)),
)  # fmt: skip
# Near black: where a stand-in were left, it would still be seen.
_STAND_INS = {role: f"#0000{number:02x}" for number, role in enumerate(_ROLES, 1)}
_ROLE_OF = {color: role for role, color in _STAND_INS.items()}

# Groups with an id, definitions, and what is drawn.
_DRAWN = re.compile(
    r'<g id="(?P<gid>[^"]*)">|(?P<defs><defs>.*?</defs>)|(?P<opening><(?P<tag>path|use)\b[^>]*)/>', re.DOTALL
)
# Pixels of a figure's width: on a telephone it is scaled to four fifths, and its text is still read.
WIDTH = 440
_DPI = 72
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names are no formulas
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 12,
    "axes.labelsize": 12,
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "path.simplify": True,
}


def color(role: str) -> str:
    """What stands for a color of the page in a figure."""
    return _STAND_INS[role]


@contextmanager
def drawing(name: str) -> Iterator[None]:
    """matplotlib's settings for a figure of that name, which alone and its content decide the SVG."""
    ink, muted = color("ink"), color("muted")
    colors: dict[str, Any] = {
        "text.color": ink, "axes.labelcolor": muted, "axes.edgecolor": color("line"), "xtick.color": muted,
        "ytick.color": muted, "grid.color": color("line"), "figure.facecolor": "none",
        "axes.facecolor": "none", "savefig.facecolor": "none",
    }  # fmt: skip
    with matplotlib.rc_context(), warnings.catch_warnings():
        # Letters of a name that the font lacks are measured wrong, and drawn by the browser's font.
        warnings.simplefilter("ignore", UserWarning)
        matplotlib.rcdefaults()
        settings: Any = _STYLE | colors | {"svg.hashsalt": name}
        matplotlib.rcParams.update(settings)
        yield


def axes_of_size(height: float, *, left: float, bottom: float, top: float = 8, right: float = 8) -> Axes:
    """In a figure of its own. Sizes in pixels, those of the margins given: measuring the text would take
    longer than drawing it, and the browser has another font."""
    figure = Figure(figsize=(WIDTH / _DPI, height / _DPI), dpi=_DPI)
    room = (left / WIDTH, bottom / height, 1 - (left + right) / WIDTH, 1 - (bottom + top) / height)
    return figure.add_axes(room)


def room_for(labels: Iterable[str]) -> float:
    """Pixels that the widest of some labels beside a picture takes."""
    return 16 + 6.6 * max(map(len, labels), default=0)


def boxes(
    axes: Axes,
    found: Sequence[tuple[float, float, float, float]],
    role: str,
    *,
    gid: str | None = None,
    edge: str = "none",
    width: float = 0.0,
) -> None:
    """Filled rectangles (x, y, width, height) of one color; all at once, since a patch of each takes
    far longer."""
    corners = [[(x, y), (x + w, y), (x + w, y + h), (x, y + h)] for x, y, w, h in found]
    edges = edge if edge == "none" else color(edge)
    axes.add_collection(
        PolyCollection(corners, facecolor=color(role), edgecolor=edges, linewidth=width, gid=gid),
        autolim=False,
    )


def inline(axes: Axes, label: str, titles: Mapping[str, Sequence[str]] | None = None) -> Markup:
    """The figure of these axes as an `svg` element.

    label: what it shows, for readers that do not see it; titles: what is said of each part of a collection
    when it is pointed at, by the collection's gid.
    """
    file = StringIO()
    figure: Any = axes.figure
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = _titled(text, titles or {})
    text = re.sub(r"(fill|stroke): (#0000[0-9a-f]{2})\b", _colored, text)
    text = text.replace("'DejaVu Sans', sans-serif", "var(--font)").replace("'DejaVu Sans'", "var(--font)")
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    text = re.sub(r' (?:d|x|y|width|height|transform)="[^"]*"', _shortened, text)
    width, height = (float(found) for found in re.findall(r'(?:width|height)="([\d.]+)pt"', text)[:2])
    opening = f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width:g} {height:g}">'
    return Markup(opening + re.sub(r">\s+<", "><", text[text.index(">") + 1 :].strip()))


def _titled(text: str, titles: Mapping[str, Sequence[str]]) -> str:
    """What is drawn in a group of such an id gets its titles, one after the other. All ids of groups go:
    those of another figure are the same."""
    waiting: Iterator[str] = iter(())

    def one(found: re.Match[str]) -> str:
        nonlocal waiting
        if found["gid"] is not None:
            waiting = iter(titles.get(found["gid"], ()))
            return "<g>"
        title = None if found["defs"] else next(waiting, None)
        opening, tag = found["opening"], found["tag"]
        return found[0] if title is None else f"{opening}><title>{escape(title)}</title></{tag}>"

    return _DRAWN.sub(one, text)


def _colored(found: re.Match[str]) -> str:
    """A name may have in it what looks like a color; it stays as it is."""
    role = _ROLE_OF.get(found[2])
    return found[0] if role is None else f"{found[1]}: var(--{role})"


def _shortened(found: re.Match[str]) -> str:
    """Places to a hundredth of a pixel."""
    return re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), found[0])
