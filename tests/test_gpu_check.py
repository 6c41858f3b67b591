"""scripts/gpu_check.sh where there is no GPU: it says so, and what it would do is what the commands take."""

import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lrsd_cli.main import commands
from recipes import on

from lrsd.checkpoint.manifest import write_manifest
from lrsd.compress import compress
from lrsd.errors import TRY_AGAIN
from lrsd.evaluate import evaluate
from lrsd.recipe import Recipe
from lrsd.settings import Calibration

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts/gpu_check.sh"
# In the place of Python: takes down what it was asked; there is a GPU, and one test fails.
PYTHON = """#!/usr/bin/env bash
printf '%q ' "$@" >>"$(dirname "$0")/asked"
echo >>"$(dirname "$0")/asked"
[[ $1 != -m || $2 != pytest ]] || { echo "1 failed"; exit 3; }
"""


def check(python: str | Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHON": str(python), **environment},
    )  # fmt: skip


def test_without_a_gpu_it_is_to_be_tried_elsewhere(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    ended = check(sys.executable, "-o", tmp_path / "report.md")
    assert (ended.returncode, ended.stdout) == (TRY_AGAIN, "")
    assert ended.stderr.startswith(
        "gpu_check: no GPU here that torch can use: device 'cuda' is not available"
    )
    assert not list(tmp_path.iterdir())


def test_wrong_usage_and_a_missing_environment() -> None:
    assert (check("true", "--help").returncode, check("true", "--nothing").returncode) == (0, 2)
    ended = check("false")
    assert (ended.returncode, "run bash scripts/test.sh once" in ended.stderr) == (2, True)


def test_its_commands_are_those_that_there_are(tmp_path: Path) -> None:
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    ended = check(tmp_path / "python", "-o", tmp_path / "report.md", LRSD_MODEL="some/model", LRSD_RATIO="3x")
    assert ended.returncode == 0, ended.stderr
    asked = [shlex.split(line) for line in (tmp_path / "asked").read_text().splitlines()]
    called = [words[2:] for words in asked if words[:2] == ["-m", "lrsd_cli.main"]]
    assert [words[0] for words in called] == ["compress"] * 3 + ["eval"] * 3
    for name, *words in called:
        command = commands.get_command(None, name)  # type: ignore[arg-type]
        assert command is not None
        command.make_context(name, words)
    assert [words[words.index("--device") + 1] for _, *words in called] == [
        "cuda",
        "cuda",
        "cpu",
        *["cuda"] * 3,
    ]
    tests = next(words[2:] for words in asked if words[:2] == ["-m", "pytest"])
    assert all((ROOT / path).exists() for path in tests if path.startswith("tests/"))
    # That the tests failed, and how, reaches the report.
    assert asked[-1][:2] == ["scripts/gpu_report.py", "write"]
    assert asked[-1][3:] == ["--tests", "3", "--report", str(tmp_path / "report.md")]


@pytest.fixture
def results(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> Path:
    """What the script has gathered, of a model that was compressed once."""
    text = Calibration(calib=str(text_file), samples=3, seqlen=16)
    compress(str(tiny_model_dir), tmp_path / "cpu", on(Recipe.of(ratio=1.6, method="svd-llm"), text))
    for name in ("device", "again"):
        shutil.copytree(tmp_path / "cpu", tmp_path / name)
    measured = evaluate(
        str(tmp_path / "cpu"),
        (str(text_file),),
        seqlen=16,
        windows=1,
        dense=str(tiny_model_dir),
        with_speed=True,
    )
    found: dict[str, Any] = measured.to_dict()
    for name in ("device", "cpu", "dense"):
        (tmp_path / f"{name}.eval.json").write_text(json.dumps(found))
        (tmp_path / f"{name}.load.json").write_text(json.dumps({"seconds": 0.5, "bytes": 12_000_000}))
    (tmp_path / "dense.eval.json").write_text(json.dumps(found | {"divergence": []}))
    (tmp_path / "machine.json").write_text(json.dumps({"card": "one of them"}))
    (tmp_path / "tests.txt").write_text("....\n4 passed in 1 s\n")
    return tmp_path


def test_the_report_says_what_differs(results: Path) -> None:
    report = runpy.run_path(str(ROOT / "scripts/gpu_report.py"))["report"]
    text, sound = report(results, 0)
    assert sound
    assert "NOT OK" not in text
    for part in ("- card: one of them", "| observe, s |", "| decoding, tokens/s |", "device tests: 4 passed"):
        assert part in text
    assert not report(results, 1)[1]

    manifest = report.__globals__["read_manifest"](results / "again")
    write_manifest(
        results / "again", replace(manifest, files={**manifest.files, "model.safetensors": "other"})
    )
    text, sound = report(results, 0)
    assert not sound
    assert "- **NOT OK**: two runs on the device give the same bytes" in text

    worse = json.loads((results / "device.eval.json").read_text())
    worse["divergence"][0]["kl"] += 1
    (results / "device.eval.json").write_text(json.dumps(worse))
    assert "- **NOT OK**: KL" in report(results, 0)[0]


def test_the_script_is_sound() -> None:
    shellcheck = str(Path(sys.executable).with_name("shellcheck"))
    found = subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
