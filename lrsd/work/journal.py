"""The journal: finished work on disk, so that a run that was stopped goes on where it was.

    OUT.partial/journal.jsonl      what the run is, then one line per finished step
    OUT.partial/STEP.safetensors   what a step found; STEP.PART.safetensors: parts of it that are read alone
    OUT.partial/NAME.stream/       hidden states after the last step, one file per batch

A step counts once its line is in the journal; all that it needs is on disk by then. Of several processes
(`work.world`) the leading one holds the journal; the others follow it, on a file system that all of them see.
"""

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

import torch

from lrsd.errors import CheckpointError, InputError, LaterError, StorageError
from lrsd.work.files import refusals, sync
from lrsd.work.records import read_record, write_record
from lrsd.work.streams import Stream, StreamOnDisk
from lrsd.work.world import World

T = TypeVar("T")

JOURNAL = "journal.jsonl"
_STREAM = ".stream"
_WAIT = "wait for it or stop it, then repeat the command with --resume"
# How often a directory that other processes may still write into is emptied, and seconds in between.
_TRIES, _PAUSE = 50, 0.1
# What flock says of a file that another process holds; of network file systems, some say EACCES.
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


def partial_directory(output: Path) -> Path:
    """Where the finished work of a run that is to write `output` is kept."""
    output = output.absolute()
    return output.with_name(f"{output.name}.partial")


class Workspace:
    """Finished steps and streams of hidden states, in memory: for as long as the process lives.

    world: the processes that share it. `finish` and `new_stream` are called by all of them, and return when
    all are there.
    """

    def __init__(self, world: World | None = None) -> None:
        self.world = World() if world is None else world
        self._records: dict[str, Any] = {}
        self._streams: dict[str, Stream] = {}
        self._kept: tuple[str, ...] = ()

    def __contains__(self, step: str) -> bool:
        return step in self._records

    def read(self, name: str, kind: type[T]) -> T:
        """What a finished step found, or a part of it."""
        found = self._records[name]
        assert isinstance(found, kind)
        return found

    def put(self, part: str, record: Any) -> None:
        """Keep a part of what the step under way found, under a name of its own ("STEP.PART"): whoever reads
        the step does not read it. It counts once the step is finished.

        Raises: StorageError.
        """
        self._records[part] = record

    def finish(self, step: str, record: Any = None, keep: Sequence[str] = ()) -> None:
        """Keep what a step found, if anything: of several processes one has found it.

        keep: names of the streams that the next step begins with; those that the last one kept may go.
        Raises: StorageError.
        """
        self._write(step, record, keep)
        for name in set(self._kept) - set(keep):
            if self.world.leads:
                self.stream(name).drop()
        self._kept = tuple(keep)

    def forget(self, step: str) -> None:
        """Delete what a finished step found, which a later one has replaced; it stays finished."""
        self._records[step] = None

    def made(self, step: str, kind: type[T], make: Callable[[], T]) -> T:
        """What a step found that one process makes for all, where it is not there yet."""
        if step not in self:
            self.finish(step, make() if self.world.leads else None)
        return self.read(step, kind)

    def new_stream(self, name: str) -> Stream:
        """An empty stream, gone after an interruption unless a step keeps it."""
        self._streams[name] = Stream()
        return self._streams[name]

    def stream(self, name: str) -> Stream:
        """A stream of this run, or one that the last finished step kept."""
        return self._streams[name]

    def drop(self, *streams: Stream) -> None:
        """Forget streams that no process will read again."""
        self.world.wait()
        for stream in streams if self.world.leads else ():
            stream.drop()

    def _write(self, step: str, record: Any, keep: Sequence[str]) -> None:
        if record is not None or step not in self._records:  # else it was `put`
            self._records[step] = record


class Journal(Workspace):
    """The same on disk, in a directory that one process at a time may hold.

    `claim` what the run is, then `begin`; until then nothing is written. Where an earlier run began, each
    claim is compared with what that one claimed.
    """

    def __init__(self, directory: Path, world: World | None = None) -> None:
        """Raises: InputError if another run is at work there, or the directory is no journal's."""
        super().__init__(world)
        self.directory = directory
        self.begun = False
        self._device: torch.device | str = "cpu"
        self._mine = False
        self._claims: dict[str, Any] = {}
        self._seconds: dict[str, float] = {}
        self._since = time.perf_counter()
        self._file: FileIO | None = None
        if not self.world.leads:
            self.world.wait()
            self._follow()
            self.world.wait()
            return
        if (directory / JOURNAL).is_file():
            self._open()
        elif directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise InputError(f"{directory} is in the way: finished work goes there; move it elsewhere")
        self.world.wait()  # it is open
        self.world.wait()  # the others have read it: from here on it may change

    @property
    def claims(self) -> Mapping[str, Any]:
        """What this run, or the one that began here, is."""
        return self._claims

    @property
    def worth_keeping(self) -> bool:
        """Whether more than the calibration text is there, or an earlier process began."""
        return self.finished_steps > 0 or not self._mine

    @property
    def finished_steps(self) -> int:
        """Finished steps after the first one, the reading of the calibration text."""
        return max(len(self._seconds) - 1, 0)

    def count(self, prefix: str) -> int:
        """Finished steps of that name."""
        return sum(step.startswith(prefix) for step in self._seconds)

    def seconds(self, prefix: str) -> float:
        """Time that the steps of that name took, in whatever process."""
        return sum(spent for step, spent in self._seconds.items() if step.startswith(prefix))

    def claim(self, **claims: Any) -> None:
        """Say what this run is. Raises: InputError naming what differs from the run that began here, or from
        what the leading process says of it."""
        claims = json.loads(json.dumps(claims))
        led = json.loads(self.world.tell(json.dumps(claims)))
        if differs := difference(led, claims):
            raise InputError(
                f"process {self.world.rank} is unlike process 0, and would not give its bytes: {differs}; "
                "run all of them in one environment, on machines of one kind"
            )
        if self.begun and (differs := difference(self._claims, claims)):
            raise InputError(
                f"{self.directory} holds the work of another run: {differs}; repeat its command, choose "
                "another output directory, or delete it"
            )
        if not self.begun:
            self._claims |= claims

    def begin(self, device: torch.device | str) -> None:
        """Create the directory, if no earlier run has. device: where streams are wanted.

        Raises: StorageError.
        """
        self._device, self._since = device, time.perf_counter()
        if self.begun:
            return
        self._mine = True
        if self.world.leads:
            self._create()
        self.begun = True
        self.world.wait()

    def _create(self) -> None:
        with refusals(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            sync(self.directory.parent)
            try:
                self._lock()
            except StorageError:  # where nobody can hold a lock, nobody is at work
                (self.directory / JOURNAL).unlink()
                self.directory.rmdir()
                raise
            assert self._file is not None
            if os.fstat(self._file.fileno()).st_size > 0:
                self.close()
                raise LaterError(f"another lrsd began in {self.directory} meanwhile; {_WAIT}")
            self._append(self._claims)
            sync(self.directory)

    def close(self) -> None:
        self.begun = False
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Delete the directory. What a journal without lines leaves behind counts as nothing."""
        self.begun = False
        if not self.world.leads:
            return
        assert self._file is not None
        self._file.truncate(0)
        os.fsync(self._file)
        for left in reversed(range(_TRIES if self.world.size > 1 else 1)):
            try:
                self._empty()
                break
            except OSError:  # another process, which has not noticed yet, has written a file meanwhile
                if not left:
                    raise
                time.sleep(_PAUSE)
        self.close()

    def _empty(self) -> None:
        for path in self.directory.iterdir():
            if path.name != JOURNAL:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        (self.directory / JOURNAL).unlink(missing_ok=True)
        self.directory.rmdir()

    def __contains__(self, step: str) -> bool:
        return step in self._seconds

    def read(self, name: str, kind: type[T]) -> T:
        """What a finished step found, mapped from its file. Raises: CheckpointError if that is damaged."""
        return read_record(self.directory / f"{name}.safetensors", kind)

    def put(self, part: str, record: Any) -> None:
        write_record(self.directory / f"{part}.safetensors", record)

    def forget(self, step: str) -> None:
        (self.directory / f"{step}.safetensors").unlink(missing_ok=True)

    def new_stream(self, name: str) -> Stream:
        stream = self._streams[name] = StreamOnDisk(self.directory / f"{name}{_STREAM}", self._device)
        if self.world.leads:
            stream.drop()
        self.world.wait()
        return stream

    def stream(self, name: str) -> Stream:
        if name not in self._streams:
            self._streams[name] = StreamOnDisk(self.directory / f"{name}{_STREAM}", self._device)
        return self._streams[name]

    def _write(self, step: str, record: Any, keep: Sequence[str]) -> None:
        for name in keep:
            stream = self.stream(name)
            assert isinstance(stream, StreamOnDisk)
            stream.sync()
        if record is not None:
            self.put(step, record)
        self.world.wait()  # what any process has found of the step is on disk
        now = time.perf_counter()
        if self.world.leads:
            with refusals(self.directory / JOURNAL):
                self._append({"step": step, "keep": list(keep), "seconds": round(now - self._since, 3)})
        self._seconds[step], self._since = now - self._since, now

    def _open(self) -> None:
        self._lock()
        assert self._file is not None
        try:
            self._file.seek(0)
            content = self._file.read()
            whole = content.rfind(b"\n") + 1  # an interruption may leave half a line at the end
            lines = [json.loads(line) for line in content[:whole].splitlines()]
            if not lines:  # stopped before it began, or while it was removed
                self.remove()
                return
            self._file.truncate(whole)
            self._know(lines)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.close()
            raise CheckpointError(
                f"{self.directory / JOURNAL} is damaged ({error}); delete {self.directory} to start anew"
            ) from error
        for path in self.directory.glob(f"*{_STREAM}"):
            if path.name.removesuffix(_STREAM) not in self._kept:
                shutil.rmtree(path)

    def _follow(self) -> None:
        """What the leading process has opened, which no other will write to."""
        path = self.directory / JOURNAL
        lines = [json.loads(line) for line in path.read_bytes().splitlines()] if path.is_file() else []
        if lines:
            self._know(lines)
            self.begun = True

    def _know(self, lines: Sequence[dict[str, Any]]) -> None:
        self._claims = dict(lines[0])
        self._seconds = {line["step"]: float(line["seconds"]) for line in lines[1:]}
        self._kept = tuple(lines[-1].get("keep", ()))

    def _lock(self) -> None:
        self._file = FileIO(self.directory / JOURNAL, "a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            if error.errno in _HELD:
                raise LaterError(f"another lrsd is at work in {self.directory}; {_WAIT}") from error
            raise StorageError(
                f"{self.directory} cannot be locked ({error.strerror}), so that two processes might write "
                "into it; choose an output directory on a local disk, or one that is mounted with locks"
            ) from error
        if os.fstat(self._file.fileno()).st_nlink == 0:
            self.close()
            raise LaterError(f"another lrsd has just ended in {self.directory}; repeat the command")
        self.begun = True

    def _append(self, line: dict[str, Any]) -> None:
        assert self._file is not None
        content = json.dumps(line).encode() + b"\n"
        while content:
            content = content[self._file.write(content) :]
        os.fsync(self._file)


def difference(before: dict[str, Any], now: dict[str, Any], where: str = "") -> str | None:
    """The first field of `now` that `before` has otherwise, with both values."""
    for key, value in now.items():
        name, known = f"{where}{key}", before.get(key)
        if isinstance(value, dict) and isinstance(known, dict):
            if inner := difference(known, value, f"{name}."):
                return inner
        elif value != known:
            return f"{name} was {known!r}, is {value!r}"
    return None
