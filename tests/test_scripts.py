"""The scripts that the README cites start and explain themselves: they import the program of today."""

import runpy
import sys
from pathlib import Path

import pytest
from forks import run_in_fork

SCRIPTS = sorted((Path(__file__).parent.parent / "scripts").glob("*.py"))


@pytest.mark.parametrize(
    "script", [path for path in SCRIPTS if "peer_llm" not in path.name], ids=lambda p: p.name
)
def test_script_starts(script: Path) -> None:
    command = "parser(" in script.read_text().lower() and "__main__" in script.read_text()

    def start() -> None:
        sys.argv, sys.path[:0] = [str(script), "--help"], [str(script.parent)]
        runpy.run_path(str(script), run_name="__main__" if command else script.stem)

    ended = run_in_fork(start)
    assert ended.returncode == 0, ended.stderr
    if command:
        assert ended.stdout.startswith(f"usage: {script.name} ")
