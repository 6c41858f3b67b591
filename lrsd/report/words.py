"""Numbers and names as the report writes them."""

import re
from typing import Any


def megabytes(size: float) -> str:
    """In the unit that leaves a readable number."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}" if size < 999.5 * scale else f"{size / scale:,.0f} {unit}"
    return f"{size:.0f} B"


def clipped(name: str, length: int) -> str:
    """The name without letters that nothing is seen of (or that turn lines around), its middle left out
    where it is too long."""
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name[:4096])
    if len(text) <= length:
        return text
    head = (length - 1) // 3
    return f"{text[:head]}…{text[head + 1 - length :]}"


def breakable(name: str) -> Any:
    """A name that a narrow page may break after its dots, as markup."""
    from markupsafe import Markup  # comes with the libraries of a report

    return Markup("<wbr>").join(part for part in re.split(r"(?<=\.)", name) if part)


def share(part: float, whole: float) -> str:
    """In percent, small ones not as nothing."""
    value = part / whole if whole else 0.0
    return "under 0.1 %" if 0 < value < 0.001 else f"{value:.1%}".replace("%", " %")
