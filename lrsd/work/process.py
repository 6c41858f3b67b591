"""The process that lrsd runs in: how much memory it holds and may hold, and what lrsd may change of it."""

import ctypes
import re
import resource
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from pathlib import Path

import torch

_M_MMAP_THRESHOLD = -3


class Process:
    """What lrsd may change of the process that it runs in: nothing, where another program calls it."""

    def release_at_once(self, large: int) -> None:
        """Give every tensor of at least `large` bytes back to the system as soon as it is freed."""


class OwnProcess(Process):
    """A process that runs lrsd and nothing else."""

    def release_at_once(self, large: int) -> None:
        """glibc otherwise learns to keep such tensors. This leaves no holes between them, but costs time."""
        if sys.platform.startswith("linux") and hasattr(_libc(), "mallopt"):
            _libc().mallopt(_M_MMAP_THRESHOLD, large)


@contextmanager
def own_process(*changes: AbstractContextManager[None]) -> Iterator[Process]:
    """All that lrsd changes beyond its own modules, for as long as the context lasts. The command line enters
    it; a library call never does. changes: those to other packages.
    """
    with ExitStack() as stack:
        for change in (exact_products(), *changes):
            stack.enter_context(change)
        yield OwnProcess()


@contextmanager
def exact_products() -> Iterator[None]:
    """Products and convolutions in float32 are just that on an accelerator, and the same in every run.

    NVIDIA's containers ask for TF32 (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE), whose ten bits are no better than
    those of the weights; cuDNN uses it unasked, and has kernels that add in an order of the moment.
    """
    before = _set_products("highest", False, True)
    try:
        yield
    finally:
        _set_products(*before)


def _set_products(precision: str, tf32: bool, repeatable: bool) -> tuple[str, bool, bool]:
    """Returns: what was set before."""
    cudnn = torch.backends.cudnn
    # torch 2.9 warns of these, but what it has in their place does not set what its older parts look at.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.deterministic
        torch.set_float32_matmul_precision(precision)
        cudnn.allow_tf32, cudnn.deterministic = tf32, repeatable
    return before


def rounds_products(device: torch.device) -> bool:
    """Whether products in float32 are rounded to TF32 there."""
    return device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"


def device_peak(device: torch.device) -> int | None:
    """Most bytes that tensors have taken there at once; None of a CPU, and where torch does not count."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def peak_rss() -> int:
    """Most bytes that this process has held in memory at once."""
    # Linux's getrusage also counts what the process that started this one held.
    if match := re.search(r"VmHWM:\s+(\d+) kB", _read("/proc/self/status")):
        return 1024 * int(match[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def current_rss() -> int:
    """Bytes that this process holds in memory; where the system does not say, the most it has held."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_rss()


def allowed_memory() -> int | None:
    """Bytes that this process may hold: the machine's, or less where a cgroup or ulimit -d says so."""
    limits = [resource.getrlimit(resource.RLIMIT_DATA)[0], *_cgroup_limits()]
    if match := re.search(r"MemTotal:\s+(\d+) kB", _read("/proc/meminfo")):
        limits.append(1024 * int(match[1]))
    return min((limit for limit in limits if limit >= 0), default=None)


def release_freed() -> None:
    """Give freed memory back to the system, where the C library keeps it (glibc): a block's worth of
    matrices otherwise stays with the process, several times over."""
    if trim := _malloc_trim():
        trim(0)


def _cgroup_limits() -> Iterable[int]:
    """Limits of the cgroups that this process is in, of either version, and of those above them."""
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        root, name = ("", "memory.max") if not controllers else ("memory", "memory.limit_in_bytes")
        if controllers in ("", "memory"):
            for group in (Path(path), *Path(path).parents):
                limit = _read(f"/sys/fs/cgroup/{root}/{group}/{name}").strip()
                if limit.isdigit():
                    yield int(limit)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


@cache
def _malloc_trim() -> "ctypes._FuncPointer | None":
    return getattr(_libc(), "malloc_trim", None) if sys.platform.startswith("linux") else None
