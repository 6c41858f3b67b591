"""Processes that work on one compression: which of them this is, and what they pass to each other."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from lrsd.errors import InputError, OthersGoneError

# What torchrun sets, and a batch script may.
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# How long a process waits for the others to start, and for one that solves a large layer, samples text from
# the model or writes a checkpoint. Whoever started them ends them sooner where one has died.
_STARTING, _WORKING = timedelta(minutes=10), timedelta(hours=2)


@dataclass(frozen=True)
class World:
    """One of several processes that share the batches and blocks of one compression; alone by default.

    They are dealt out by their numbers in the whole model and text, sums over batches are the same in any
    order (see `numerics.moments`), and nothing that is kept says who made it: the result is the same, byte by
    byte, for any number of processes, and any number can go on with what another left.
    """

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank must be in 0..{self.size - 1}, got {self.rank}")

    @property
    def leads(self) -> bool:
        """Whether this is the process that journals, writes the result, and tells the user."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Numbers of the batches, of `count`, that are this process's."""
        return range(self.rank, count, self.size)

    def owner(self, number: int) -> int:
        """The process whose batch or block of that number it is."""
        return number % self.size

    def owns(self, number: int) -> bool:
        return self.owner(number) == self.rank

    def wait(self) -> None:
        """Until all processes are here."""

    def add_(self, sums: Iterable[Tensor], owner: int | None = None) -> None:
        """Add up what all processes have, in place. owner: who needs it, the others then hold nothing of use;
        all by default."""

    def tell_(self, values: Iterable[Tensor], owner: int) -> None:
        """Give all processes the values of one, in place."""

    def told(self, values: Tensor | None, owner: int) -> Tensor:
        """A vector of one process's, of a length that only that one knows, known to all."""
        assert values is not None
        return values

    def tell(self, text: str) -> str:
        """A text of the leading process, known to all."""
        return text

    def least(self, number: int | None) -> int | None:
        """The least of all processes' numbers; None: of those that have one."""
        return number


@dataclass(frozen=True)
class ManyProcesses(World):
    """The same through torch.distributed, whose default group has been joined."""

    def wait(self) -> None:
        with _others_gone():
            dist.barrier()

    def add_(self, sums: Iterable[Tensor], owner: int | None = None) -> None:
        with _others_gone():
            for part in sums:
                dist.all_reduce(part) if owner is None else dist.reduce(part, owner)

    def tell_(self, values: Iterable[Tensor], owner: int) -> None:
        with _others_gone():
            for value in values:
                dist.broadcast(value, owner)

    def told(self, values: Tensor | None, owner: int) -> Tensor:
        found = [values.cpu() if values is not None and self.rank == owner else None]
        with _others_gone():
            dist.broadcast_object_list(found, owner)
        assert found[0] is not None
        return found[0]

    def tell(self, text: str) -> str:
        with _others_gone():
            found = [text]
            dist.broadcast_object_list(found, 0)
        return found[0]

    def least(self, number: int | None) -> int | None:
        with _others_gone():
            found: list[int | None] = [None] * self.size
            dist.all_gather_object(found, number)
        return min((one for one in found if one is not None), default=None)


@contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """The processes that torchrun, or a batch script that sets the same variables, has started; otherwise
    this one alone. Each takes the accelerator of its local rank, or the one that a batch system lets it see.

    Raises: InputError for variables that contradict each other, OthersGoneError if the others do not come.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        yield World()
        return
    if missing := [name for name in _VARIABLES if name not in os.environ]:
        raise InputError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set; start the "
            "processes with torchrun, or set these in the batch script"
        )
    if torch.accelerator.is_available() and device != "cpu":
        local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.accelerator.device_count()
        if there == 1 and "SLURM_STEP_ID" in os.environ:
            local = 0
        if local >= there:
            raise InputError(
                f"process {local} of this machine has no accelerator of its own, there are {there}; start "
                "as many processes"
            )
        torch.accelerator.set_device_index(local)
    with _others_gone():
        store, rank, size = next(rendezvous("env://", timeout=_STARTING))
        dist.init_process_group(store=store, rank=rank, world_size=size, timeout=_WORKING)
    yield ManyProcesses(rank, size)
    dist.destroy_process_group()


def local_processes() -> int:
    """How many of the processes share this machine, its memory and its cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.is_initialized() else 1


@contextmanager
def _others_gone() -> Iterator[None]:
    """Whatever torch.distributed raises when a process has ended is one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, dist.DistError) as error:
        raise OthersGoneError(
            f"another process of this run does not answer ({str(error).splitlines()[0]:.100}); its own "
            "message says why"
        ) from error
