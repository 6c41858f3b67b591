"""Processes that need not import torch again: forks of the one that runs the tests."""

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run_in_fork(work: Callable[[], object], cwd: Path | None = None) -> Ended:
    """Run `work` in a child; its exit code, negative for a signal, and what it wrote."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        child = os.fork()
        if child == 0:
            _work(work, cwd, stdout.fileno(), stderr.fileno())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        written = []
        for file in (stdout, stderr):
            file.seek(0)
            written.append(file.read().decode())
    return Ended(code, *written)


def _work(work: Callable[[], object], cwd: Path | None, *files: int) -> None:
    code = 1
    try:
        for number, file in enumerate(files, 1):
            os.dup2(file, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        if cwd is not None:
            os.chdir(cwd)
        work()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
