"""Imports run one way: cli -> (survey, compress, ...) -> (model, data, storage) -> numerics."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for room in ("lrsd", "cli") for path in (ROOT / room).rglob("*.py"))
# By first name below lrsd; higher may import lower or its own floor. What is not listed is on the
# floor of survey and compress.
FLOORS = {
    "config": 0,
    "errors": 0,
    "memory": 0,
    "progress": 0,
    "numerics": 1,
    "model": 2,
    "data": 2,
    "storage": 2,
}
DEFAULT_FLOOR, CLI_FLOOR = 3, 4


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


def floor(name: str) -> int | None:
    """None for a package that is not ours."""
    room, _, rest = name.partition(".")
    if room in ("cli", "lrsd_cli"):
        return CLI_FLOOR
    return FLOORS.get(rest.partition(".")[0], DEFAULT_FLOOR) if room == "lrsd" else None


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_never_point_upwards(path: Path) -> None:
    own = floor(module_name(path))
    assert own is not None
    upwards = [name for name in imported(path) if (there := floor(name)) is not None and there > own]
    assert upwards == []


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_foreign_packages_stay_in_their_rooms(path: Path) -> None:
    foreign = {name.partition(".")[0] for name in imported(path)}
    name = module_name(path)
    if name.startswith("lrsd.numerics"):
        assert foreign.isdisjoint({"transformers", "safetensors", "datasets", "tokenizers", "pathlib"})
    if not name.startswith("cli"):
        assert foreign.isdisjoint({"click", "tqdm"})


def test_the_rule_sees_every_floor() -> None:
    """Guards the test itself: a renamed room would otherwise fall to the default floor unnoticed."""
    found = {floor(module_name(path)) for path in FILES}
    assert found == {0, 1, 2, DEFAULT_FLOOR, CLI_FLOOR}
    assert all(any(module_name(path).startswith(f"lrsd.{room}") for path in FILES) for room in FLOORS)
