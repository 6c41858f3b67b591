"""The scripts that the README cites can at least be started: their imports are the program's of today."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parent.parent / "scripts").glob("*.py"))


@pytest.mark.parametrize(
    "script", [path for path in SCRIPTS if "peer_llm" not in path.name], ids=lambda p: p.name
)
def test_script_imports(script: Path) -> None:
    program = f"import sys; sys.path.insert(0, {str(script.parent)!r}); import {script.stem}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
