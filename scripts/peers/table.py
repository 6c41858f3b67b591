"""The table and the plot of bench_peers.py, from its rows."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Row = Mapping[str, Any]
# Bits per weight that a group is called by; a row is in the nearest one.
_GROUPS = (2.0, 3.0, 4.0, 4.25, 8.0, 9.0, 16.0)
# Which value is the best one, by score.
_BEST = {"perplexity": min, "KL": min, "top-1": max}
_FORMS = {
    "bits": ".3f", "perplexity": ",.2f", "KL": ".4f", "top-1": ".1%", "cpu seconds": ",.0f",
    "peak bytes": ",.0f",
}  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    """Rows by stored bits, the best score of a group in bold, whoever's it is; then what did not run.

    Several seeds of a setting are one row: means ± sample standard deviations.
    """
    measured = _by_setting(row for row in rows if "failed" not in row)
    groups: dict[float, list[list[Row]]] = {}
    for same in sorted(measured.values(), key=lambda same: -mean(row["bits"] for row in same)):
        groups.setdefault(group(mean(row["bits"] for row in same)), []).append(same)
    lines = [
        "| | bits per weight | perplexity | KL | top-1 | processor seconds | peak memory, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for bits, members in groups.items():
        best = {score: pick(_mean(same, score) for same in members) for score, pick in _BEST.items()}
        if bits != 16:
            lines.append(f"| *about {bits:g} bits* | | | | | | |")
        for same in members:
            cells = [_cell(same, key) for key in _FORMS]
            for index, key in enumerate(_FORMS):
                if len(members) > 1 and key in best and _mean(same, key) == best[key]:
                    cells[index] = f"**{cells[index]}**"
            lines.append(f"| {label(same[0])} | {' | '.join(cells)} |")
    failed = _by_setting(row for row in rows if "failed" in row)
    return "\n".join(
        lines + [""] + [f"{label(same[0])} did not run: {same[0]['failed']}" for same in failed.values()]
    ).rstrip()


def group(bits: float) -> float:
    """Example: 4.31 is about 4.25."""
    return min(_GROUPS, key=lambda one: abs(one - bits))


def label(row: Row) -> str:
    return f"{row['tool']} {row['setting']}"


def plot(rows: Sequence[Row], path: Path) -> None:
    """KL and perplexity against stored bits per weight, both on logarithmic axes, a line a tool."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    below = [row for row in rows if "failed" not in row and row["tool"] != "dense"]
    for axes, score in zip(figure.subplots(1, 2), ("KL", "perplexity"), strict=True):
        for tool in dict.fromkeys(row["tool"] for row in below):
            points = sorted((row["bits"], row[score]) for row in below if row["tool"] == tool)
            axes.plot(*zip(*points, strict=True), "o-", label=tool)
        for row in rows:
            if row["tool"] == "dense" and score == "perplexity":
                axes.axhline(row[score], color="gray", linestyle=":", label="dense")
        axes.set(yscale="log", xlabel="stored bits per weight, all included", ylabel=score)
        axes.legend()
    figure.savefig(path, dpi=120)


def _by_setting(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["tool"], row["setting"]), []).append(row)
    return found


def _mean(same: Sequence[Row], key: str) -> float:
    return mean(row[key] for row in same)


def _cell(same: Sequence[Row], key: str) -> str:
    values = [row[key] / (1e6 if key == "peak bytes" else 1) for row in same if key in row]
    if not values:
        return ""
    spread = f" ± {stdev(values):{_FORMS[key]}}" if len(values) > 1 and key in _BEST else ""
    return f"{mean(values):{_FORMS[key]}}{spread}"
