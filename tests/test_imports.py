"""Imports run one way, down the list of rooms; every room is its own floor."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for room in ("lrsd", "cli") for path in (ROOT / room).rglob("*.py"))
# From the ground up: packages or files of lrsd. Files of one room may import each other.
GROUND = ("errors", "progress", "settings")
ROOMS = (
    "numerics", "work", "intake", "forms", "model", "data", "checkpoint", "runtimes", "export", "methods",
    "recipe", "steps", "evaluate", "training", "compress", "report",
)  # fmt: skip
FLOORS = dict.fromkeys(GROUND, 0) | {room: floor for floor, room in enumerate(ROOMS, 1)}
CLI_FLOOR = len(ROOMS) + 1
# The only rooms that know these packages.
HOMES = {
    "transformers": ("model", "runtimes", "training"),
    "click": ("cli",),
    "tqdm": ("cli",),
    "matplotlib": ("report",),
    "jinja2": ("report",),
    "vllm": ("runtimes",),
    "peft": ("runtimes",),
    "lm_eval": ("runtimes",),
    "scipy": ("runtimes",),
    "datasets": ("data",),
    "huggingface_hub": ("model", "checkpoint"),
    "safetensors": ("work", "intake", "model", "data", "checkpoint", "runtimes", "export"),
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> Iterator[str]:
    """Full names of everything a file imports, lazily or for type checking only included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute in this project"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(name: str) -> str | None:
    """The room that a module of ours stands in; None for a package that is not ours, or `lrsd` itself."""
    package, _, rest = name.partition(".")
    if package in ("cli", "lrsd_cli"):
        return "cli"
    return rest.partition(".")[0] or None if package == "lrsd" else None


def floor(name: str) -> int | None:
    room = room_of(name)
    return CLI_FLOOR if room == "cli" else None if room is None else FLOORS[room]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_never_point_upwards(path: Path) -> None:
    name = module_name(path)
    own = floor(name)
    if own is None:
        assert path == ROOT / "lrsd/__init__.py"
        return
    upwards = [
        other
        for other in imported(path)
        if (there := floor(other)) is not None
        and (there > own or (there == own and room_of(other) != room_of(name) and own > 0))
    ]
    assert upwards == []


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_foreign_packages_stay_at_home(path: Path) -> None:
    foreign = {name.partition(".")[0] for name in imported(path)}
    room = room_of(module_name(path))
    assert {name for name in foreign & HOMES.keys() if room not in HOMES[name]} == set()
    if room == "numerics":
        assert "pathlib" not in foreign


def test_every_room_has_its_floor() -> None:
    """Guards the test itself: a room that is not listed, or no longer there, is an error."""
    found = {room for path in FILES if (room := room_of(module_name(path)))}
    assert found == {*FLOORS, "cli"}
