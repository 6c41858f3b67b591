"""Processes that need not import torch again: forks of the one that runs the tests."""

import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run_in_fork(work: Callable[[], object], cwd: Path | None = None) -> Ended:
    """Run `work` in a child; its exit code, negative for a signal, and what it wrote."""
    with ExitStack() as files:
        return Fork(work, files, cwd).wait()


def run_in_world(size: int, work: Callable[[], object]) -> list[Ended]:
    """Run `work` in so many children, each with what torchrun would set for it."""
    with ExitStack() as files:
        return [child.wait() for child in start_world(size, work, files)]


def start_world(size: int, work: Callable[[], object], files: ExitStack) -> "list[Fork]":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def join(rank: int) -> None:
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
        }  # fmt: skip
        work()

    return [Fork(partial(join, rank), files) for rank in range(size)]


class Fork:
    """A child at work."""

    def __init__(self, work: Callable[[], object], files: ExitStack, cwd: Path | None = None) -> None:
        stdout = files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - of the caller's
        stderr = files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        self._files: list[IO[bytes]] = [stdout, stderr]
        self.process = os.fork()
        if self.process == 0:
            _work(work, cwd, *(file.fileno() for file in self._files))

    def wait(self) -> Ended:
        code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        written = []
        for file in self._files:
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
