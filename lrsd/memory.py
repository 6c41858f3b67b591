"""Memory of this process: how much it holds and may hold, and giving back what it no longer uses."""

import ctypes
import re
import resource
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from torch import Tensor

_MADV_DONTNEED = 4
_M_MMAP_THRESHOLD = -3


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
    """Bytes that this process may hold: the machine's, or less where a control group or ulimit -d says so."""
    limits = [resource.getrlimit(resource.RLIMIT_DATA)[0], *_cgroup_limits()]
    if match := re.search(r"MemTotal:\s+(\d+) kB", _read("/proc/meminfo")):
        limits.append(1024 * int(match[1]))
    return min((limit for limit in limits if limit >= 0), default=None)


def release_freed() -> None:
    """Give freed memory back to the system, where the C library keeps it (glibc): a block's worth of
    matrices otherwise stays with the process, several times over."""
    if trim := _malloc_trim():
        trim(0)


def give_back_freed(large: int) -> None:
    """Have the C library (glibc) give every tensor of at least `large` bytes back to the system as soon as it
    is freed, where otherwise it learns to keep them: leaves no holes between them, but costs time."""
    if sys.platform.startswith("linux") and hasattr(_libc(), "mallopt"):
        _libc().mallopt(_M_MMAP_THRESHOLD, large)


class MappedFiles:
    """Tensors that are mapped from files and were never written to: their memory can be given back at any
    time, since it is read from the file again when it is next used. Linux only; elsewhere there are none.
    """

    def __init__(self) -> None:
        """The mappings of this moment."""
        self._ranges = list(_clean_mappings()) if sys.platform.startswith("linux") else []

    def __contains__(self, tensor: Tensor) -> bool:
        if tensor.device.type != "cpu" or tensor.is_meta:
            return False
        start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return any(low <= start and stop <= high for low, high in self._ranges)

    def pages(self, tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
        """Start and length of the whole pages of those tensors that are mapped."""
        page, found = resource.getpagesize(), []
        for tensor in tensors:
            start = -(-tensor.data_ptr() // page) * page
            stop = (tensor.data_ptr() + tensor.nbytes) // page * page
            if tensor in self and stop > start:
                found.append((start, stop - start))
        return found

    @staticmethod
    def release(pages: Iterable[tuple[int, int]]) -> None:
        """Give the memory of these pages back."""
        for start, length in pages:
            _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_DONTNEED)


def _clean_mappings() -> Iterable[tuple[int, int]]:
    """Addresses of this process's private mappings of files, no page of which it has written to."""
    pattern = r"^([0-9a-f]+)-([0-9a-f]+) \S+p \S+ \S+ [1-9]\d* +/.*\n(?:\w+:.*\n)*?Anonymous: +0 kB"
    for match in re.finditer(pattern, _read("/proc/self/smaps"), re.MULTILINE):
        yield int(match[1], 16), int(match[2], 16)


def _cgroup_limits() -> Iterable[int]:
    """Limits of the control groups that this process is in, of either version, and of those above them."""
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
