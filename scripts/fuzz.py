"""Hostile files by the thousand: whatever is in them, reading ends in a result or in an LrsdError.

A tiny random model, compressed checkpoints of it, the journal of an unfinished run and texts are made once;
every case copies one of them, damages it, and reads it as the commands do. A case fails if
  crash    another error than an LrsdError escapes, or the process dies
  slow     it takes more than --seconds, or no end is seen (a fifo, /dev/zero, ten million layers)
  memory   it takes more than --megabytes on top of what the process had
  outside  a file outside the directory is opened, or what it holds is accepted
  canary   a pickle or a program beside the weights was run
Cases run in a forked child, which is replaced when it dies or hangs. Case n of a seed is always the same.
Failures of one kind, error and place are reported once, with their number and a case to look at.
Examples:
  OMP_NUM_THREADS=1 python scripts/fuzz.py --count 10000
  OMP_NUM_THREADS=1 python scripts/fuzz.py --only config --count 500
  OMP_NUM_THREADS=1 python scripts/fuzz.py --only config --first 321 --count 1 --keep /tmp/case
"""

import argparse
import faulthandler
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any

import click
import torch
import transformers
from fuzz_cases import KINDS, OUTSIDE_VALUE, Fixtures, make_fixtures
from lrsd_cli.compress import compress as compress_command
from lrsd_cli.options import given_options, method_fields

from lrsd.checkpoint.manifest import read_manifest
from lrsd.checkpoint.verify import verify
from lrsd.data.sources import read_labelled, read_pairs, read_tensors, read_text, text_identity
from lrsd.data.tokens import tokenize
from lrsd.errors import LrsdError
from lrsd.export.dense import export_dense
from lrsd.model.kinds.speech import Speech
from lrsd.model.load import load_model
from lrsd.model.samples import Samples, try_running
from lrsd.recipe import GROUPS, Recipe
from lrsd.report.tables import summary_lines
from lrsd.steps.fit import FittedBlock
from lrsd.steps.observe import ObservedBlock
from lrsd.steps.plan import Plan
from lrsd.steps.statistics import BlockStatistics
from lrsd.work.journal import Journal

# A child that has not answered after so many times --seconds is killed; address space beyond what it has.
_PATIENCE = 4
_ADDRESS_SPACE = 6 << 30
_SETTINGS = {"method", *method_fields(), *(field.name for kind in GROUPS.values() for field in fields(kind))}
_RECORDS = {
    "text": Samples, "observe": ObservedBlock, "moments": BlockStatistics, "plan": Plan, "fit": FittedBlock,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000, help="cases (10000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (0)")
    parser.add_argument("--seed", type=int, default=0, help="seed (0)")
    parser.add_argument("--only", choices=sorted(KINDS), help="one kind of case (all in turn)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time of one case (1)")
    parser.add_argument("--megabytes", type=int, default=300, help="memory of one case (300)")
    parser.add_argument("--keep", type=Path, help="copy the last case's directory here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        fixtures = make_fixtures(Path(place))
        start = time.perf_counter()
        failures, ends = run(options, fixtures)
        spent = time.perf_counter() - start
        if options.keep:
            shutil.copytree(fixtures.case, options.keep, symlinks=True)
    print(f"\n{options.count} cases in {spent:.0f} s, {options.count / spent:.0f} per second")
    print(
        "\n".join(f"  {kind:9} " + ", ".join(f"{n} {end}" for end, n in ends[kind].items()) for kind in ends)
    )
    for (failure, kind, where), cases in sorted(failures.items()):
        number, message = cases[0]
        print(f"{failure} {kind} x{len(cases)}: {where}\n    case {number}: {message}")
    sys.exit(1 if failures else 0)


def run(
    options: argparse.Namespace, fixtures: Fixtures
) -> tuple[dict[tuple[str, str, str], list[tuple[int, str]]], dict[str, Counter[str]]]:
    """All cases. Returns: failures by what, kind and place; how the cases of each kind ended."""
    failures: dict[tuple[str, str, str], list[tuple[int, str]]] = {}
    ends: dict[str, Counter[str]] = {kind: Counter() for kind in ([options.only] if options.only else KINDS)}
    number, last = options.first, options.first + options.count
    while number < last:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            work(range(number, last), options, fixtures, writer)
        os.close(writer)
        with os.fdopen(reader) as answers:
            while number < last:
                ready, _, _ = select.select([answers], [], [], _PATIENCE * options.seconds + 1)
                line = answers.readline() if ready else ""
                kind = kind_of(number, options.only)
                if not line and not ready:
                    os.kill(child, signal.SIGUSR1)  # has the child's faulthandler say where it is
                    time.sleep(0.2)
                found = json.loads(line) if line else lost(fixtures, hangs=not ready)
                ends[kind][found["end"]] += 1
                for failure, where, message in found["failures"]:
                    failures.setdefault((failure, kind, where), []).append((number, message))
                    if len(failures[failure, kind, where]) == 1:
                        print(f"{failure} {kind} {where}: case {number}: {message}", flush=True)
                number += 1
                if not line:
                    os.kill(child, signal.SIGKILL)
                    break
        os.waitpid(child, 0)
    return failures, ends


def lost(fixtures: Fixtures, *, hangs: bool) -> dict[str, Any]:
    """The report of a case that never ended, or ended its process."""
    frames = re.findall(r'File "(\S+)", line (\d+),? in (\w+)', fixtures.trace.read_text())
    ours = [f"{Path(file).name}:{line} {name}" for file, line, name in frames if "/lrsd/" in file]
    where = ours[0] if ours else " < ".join(name for _, _, name in frames[-3:])
    return {"end": "hung" if hangs else "died", "failures": [("slow" if hangs else "crash", where, "no end")]}


def kind_of(number: int, only: str | None) -> str:
    return only or list(KINDS)[number % len(KINDS)]


def work(numbers: range, options: argparse.Namespace, fixtures: Fixtures, writer: int) -> None:
    """The child: one line of JSON per case; never returns."""
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + _ADDRESS_SPACE,) * 2)
    trace = fixtures.trace.open("w")
    faulthandler.register(signal.SIGUSR1, trace)
    faulthandler.enable(trace)  # SIGSEGV, SIGBUS
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    try:
        for number in numbers:
            found = attempt(number, kind_of(number, options.only), options, fixtures, opened)
            os.write(writer, (json.dumps(found) + "\n").encode())
    except BaseException:
        traceback.print_exc(file=trace)
    finally:
        trace.flush()
        os._exit(0)


def attempt(
    number: int, kind: str, options: argparse.Namespace, fixtures: Fixtures, opened: list[str]
) -> dict[str, Any]:
    """One case. Returns: how it ended, and its failures with place and message."""
    KINDS[kind](fixtures, Random(f"{options.seed} {kind} {number}"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start, end, failures = memory(), time.perf_counter(), "accepted", []
    opened.clear()
    try:
        values = read(kind, fixtures)
        if any(value.numel() and bool((value == OUTSIDE_VALUE).all()) for value in values):
            failures.append(("outside", "tensor", "values from outside were accepted"))
    except (LrsdError, click.ClickException):
        end = "refused"
    except BaseException as error:
        end = "crashed"
        failures.append(("crash", f"{type(error).__name__} {place(error)}", str(error)[:200]))
    seconds, grown = time.perf_counter() - start, memory() - before
    if seconds > options.seconds:
        failures.append(("slow", end, f"{seconds:.1f} s"))
    if grown > options.megabytes:
        failures.append(("memory", end, f"{grown:.0f} MB"))
    for path in {os.path.realpath(path) for path in opened}:
        if path.startswith(str(fixtures.outside)) or path in ("/dev/zero", "/etc/passwd"):
            failures.append(("outside", "open", path))
    if fixtures.canary.exists():
        fixtures.canary.unlink()
        failures.append(("canary", end, "a program in the directory was run"))
    return {"end": end, "failures": failures}


def read(kind: str, fixtures: Fixtures) -> list[torch.Tensor]:
    """Read the case as the commands would. Returns: the tensors that were accepted.

    Raises: LrsdError, if it is the case that is at fault; anything else if it is lrsd.
    """
    case = fixtures.case
    if kind == "text":
        return read_texts(next(case.iterdir()))
    if kind == "recipe":
        arguments = ["MODEL", "--ratio", "2x", "-o", "OUT", "--recipe", str(next(case.iterdir()))]
        context = compress_command.make_context("compress", arguments)
        Recipe.of(
            **{name: v for name, v in given_options(context, context.params).items() if name in _SETTINGS}
        )
        return []
    if kind == "manifest":
        summary_lines(read_manifest(case))
        verify(case)
        return []
    if kind == "journal":
        return read_journal(case)
    if kind.startswith("export"):
        shutil.rmtree(fixtures.exported, ignore_errors=True)
        export_dense(case, fixtures.exported)
        return list(load_model(str(fixtures.exported)).model.parameters())
    source = case / "model.gguf" if kind == "gguf" else case
    loaded = load_model(str(source), device="cpu")
    tokenize(loaded.require_tokenizer(), "One sentence, then another.\n\n")
    try_running(loaded.model, loaded.kind.example(loaded.model))
    return list(loaded.model.parameters())


def read_texts(path: Path) -> list[torch.Tensor]:
    """By every reader there is. Raises: the first error that is no LrsdError, else the first LrsdError."""
    refused: list[LrsdError] = []
    for reader in (
        lambda name: read_text(name, split="train", option="--calib"), read_pairs, read_labelled,
        lambda name: read_tensors(name, Speech(), "--calib"), text_identity,
    ):  # fmt: skip
        try:
            reader(str(path))
        except LrsdError as error:
            refused.append(error)
    if refused:
        raise refused[0]
    return []


def read_journal(directory: Path) -> list[torch.Tensor]:
    """Every record and stream that the journal names."""
    with closing(Journal(directory)) as journal:
        for path in directory.glob("*.safetensors"):
            step, _, part = path.stem.partition(".")
            if step in journal:
                journal.read(path.stem, _RECORDS[part or step.partition("-")[0]])
        streams = [journal.stream(path.stem) for path in directory.glob("*.stream")]
        return [stream[number] for stream in streams for number in range(len(stream))]


def memory() -> float:
    """The peak since it last began anew, in megabytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1000


def place(error: BaseException) -> str:
    """The innermost line of lrsd that the error came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/lrsd/" in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}" if frames else "not lrsd"


if __name__ == "__main__":
    main()
