"""Compiled code runs wherever Python does, and as many threads as torch has share the work."""

import importlib
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from forks import run_in_fork

import lrsd
from lrsd.numerics.compiled import in_threads


@pytest.mark.parametrize("where", ["package", "directory", "home", "nowhere"])
def test_the_cache_goes_where_it_can_and_without_one_all_the_same(tmp_path: Path, where: str) -> None:
    """Files in place of directories cannot be written into, not even by root."""
    package, blocked = tmp_path / "lrsd", tmp_path / "blocked"
    shutil.copytree(Path(lrsd.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    blocked.touch()
    if where != "package":
        (package / "numerics" / "__pycache__").touch()

    def use() -> None:
        os.environ["XDG_CACHE_HOME"] = str((tmp_path if where == "home" else blocked) / "home")
        numba.config.CACHE_DIR = str((tmp_path if where == "directory" else blocked) / "directory")
        sys.dont_write_bytecode = True
        lrsd.__path__[:] = [str(package)]
        for name in [name for name in sys.modules if name.startswith("lrsd.numerics")]:
            del sys.modules[name]
        for name in ("ans", "trellis"):
            importlib.import_module(f"lrsd.numerics.{name}")
        side = importlib.import_module("lrsd.numerics.ans_side")
        print(side._byte(np.arange(9, dtype=np.uint8), np.array([0, 0, 0, 7, 1])), side.__file__)

    ended = run_in_fork(use)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["7", str(package / "numerics" / "ans_side.py")]
    cached = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.nbc")}
    assert cached == {"nowhere": set(), "package": {"lrsd"}}.get(where, {where})


@pytest.mark.parametrize(
    ("threads", "calls", "used"), [(1, 8, 0), (4, 1, 0), (4, 0, 0), (3, 8, 3), (8, 3, 3)]
)
def test_calls_share_as_many_threads_as_torch_has(threads: int, calls: int, used: int) -> None:
    """No more threads than calls, and none for a single one. Results come in order."""
    before = torch.get_num_threads()
    together = threading.Barrier(max(used, 1), timeout=10)
    names: list[str] = []

    def call(argument: int) -> int:
        if argument < used:  # all of them at the same time, or never
            together.wait()
        names.append(threading.current_thread().name)
        return argument * argument

    torch.set_num_threads(threads)
    try:
        found = in_threads(call, iter(range(calls)))
    finally:
        torch.set_num_threads(before)
    assert found == [argument * argument for argument in range(calls)]
    others = set(names) - {threading.current_thread().name}
    assert len(others) == used


def test_an_error_in_a_thread_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda argument: 1 // argument, [1, 0, 1])


def test_numba_is_not_imported_before_its_first_use() -> None:
    """It takes half a second of every command; and vLLM's workers look into every module that is there."""
    code = """
import sys
import lrsd, lrsd.numerics.nibbles, numpy as np
from lrsd.numerics.ans_counts import fold
assert "numba" not in sys.modules
assert fold(np.int64(-3), np.int64(1)) == 1
assert "numba" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
