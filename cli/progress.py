"""Progress on stderr: bars on a terminal, plain lines in a log."""

import platform
import shlex
import sys
import time
from collections import deque
from importlib.metadata import version

import torch
from tqdm import tqdm

from lrsd.progress import Progress

# Seconds between two lines of one stage in a log, so that a long job stays readable.
_LINE_EVERY = 10.0
# Steps that the time left is told by: few, as those at the beginning differ, and enough to even out.
_RECENT = 6


def make_progress() -> Progress:
    return BarProgress() if sys.stderr.isatty() else LineProgress()


def log_header(asked: str, device: torch.device, processes: int = 1) -> str:
    """What a reader of a log wants to know: when and where this ran, on what, and the command.

    asked: the device as it was asked for; processes: that share the work.
    """
    found = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    found = found or "auto found no accelerator" * (asked == "auto" and device.type == "cpu")
    versions = f"lrsd {version('lrsd')}, torch {torch.__version__}"
    place = f"{device}{f' ({found})' * bool(found)}, {torch.get_num_threads()} threads"
    place += f", {processes} processes" * (processes > 1)
    command = shlex.join(["lrsd", *sys.argv[1:]])
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {platform.node()}: {versions}, {place}: {command}"


class BarProgress(Progress):
    """One tqdm bar per stage."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def stage(self, name: str, steps: int) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = tqdm(total=steps, desc=name, file=sys.stderr)

    def step(self, what: str) -> None:
        assert self._bar is not None, "stage() comes first"
        self._bar.set_postfix_str(what, refresh=False)
        self._bar.update()
        if self._bar.n == self._bar.total:
            self._bar.close()

    def note(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)


class LineProgress(Progress):
    """A line when a stage begins and ends, and every ten seconds in between, with the time that is left."""

    def __init__(self) -> None:
        self._name, self._steps, self._start, self._last = "", 0, 0.0, 0.0
        self._ends = deque[float](maxlen=_RECENT + 1)
        self._done = 0

    def stage(self, name: str, steps: int) -> None:
        self._name, self._steps, self._done = name, steps, 0
        self._start = self._last = time.monotonic()
        self._ends.clear()
        self._ends.append(self._start)
        self.note(f"{name}: {steps} steps")

    def step(self, what: str) -> None:
        self._done += 1
        now = time.monotonic()
        self._ends.append(now)
        if self._done == self._steps or now - self._last >= _LINE_EVERY:
            self._last = now
            spent = f"{now - self._start:.0f} s"
            self.note(f"{self._name}: {self._done}/{self._steps} {what} ({spent}{self._left()})")

    def _left(self) -> str:
        """As the last steps went: the first ones compile, and those that an earlier run did take no time."""
        left = self._steps - self._done
        seconds = left * (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return f", about {tqdm.format_interval(seconds)} left" if left else ""

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
