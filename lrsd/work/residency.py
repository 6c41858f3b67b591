"""Paging of weights: those of a large model are read from its files again whenever they are used."""

import ctypes
import re
import resource
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lrsd.work.process import Process, _libc, _read, current_rss, release_freed

_MADV_DONTNEED = 4


class MappedFiles:
    """Tensors that are mapped from files and were never written to: their memory can be released at any
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
        """Return the memory of these pages to the system."""
        for start, length in pages:
            _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_DONTNEED)


def _clean_mappings() -> Iterable[tuple[int, int]]:
    """Addresses of this process's private mappings of files, no page of which it has written to."""
    pattern = r"^([0-9a-f]+)-([0-9a-f]+) \S+p \S+ \S+ [1-9]\d* +/.*\n(?:\w+:.*\n)*?Anonymous: +0 kB"
    for match in re.finditer(pattern, _read("/proc/self/smaps"), re.MULTILINE):
        yield int(match[1], 16), int(match[2], 16)


# A model that takes more than this share of the memory allowed is paged.
_RESIDENT = 1 / 4
# Bytes from which a tensor's memory is released at once, for weights that stay in memory and for paged ones:
# 8 MiB cost no time and lowered the peak for SmolLM2-135M by a tenth, 1 MiB cost a third of the fit's.
_LARGE = {False: 2**23, True: 2**20}


class Residence:
    """Which weights stay in memory. Those of a model that takes much of it, and is mapped from safetensors
    files of the type it computes in, are paged (streamed from disk): released as soon as they were used, and
    read again when needed.

    paged: whether that is so.
    """

    def __init__(self, model: nn.Module, limit: int | None, process: Process | None = None) -> None:
        """limit: bytes of memory allowed. From here on, until `close`, a paged module's weights go when it
        has run."""
        self._model, self._mapped = model, MappedFiles()
        self.paged = limit is not None and self._bytes(model) > _RESIDENT * limit
        self._hooks: list[RemovableHandle] = []
        (process or Process()).release_at_once(_LARGE[self.paged])
        if self.paged:
            for module in model.modules():
                pages = self._mapped.pages(module.parameters(recurse=False))
                self._hooks.append(module.register_forward_hook(partial(_release, pages)))

    def close(self) -> None:
        """Take the hooks off the model."""
        while self._hooks:
            self._hooks.pop().remove()

    def passing(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight by its name, released when the next one is asked for."""
        for name, weight in self._model.state_dict().items():
            yield name, weight
            if self.paged:
                self._mapped.release(self._mapped.pages([weight]))

    def release(self, module: nn.Module) -> None:
        """What was freed, and a module's weights."""
        if self.paged:
            self._mapped.release(self._mapped.pages(module.parameters()))
        release_freed()

    def at_rest(self) -> int:
        """Bytes in memory with none of the mapped weights."""
        self._mapped.release(self._mapped.pages(self._model.parameters()))
        release_freed()
        return current_rss()

    def weights(self, blocks: Iterable[str], budget: int) -> int:
        """Bytes of mapped weights that will be in memory at once: all, plus those that take their place,
        or those of one block and of none. blocks: the names of the model's."""
        if not self.paged:
            return self._bytes(self._model) + budget
        sizes = [self._bytes(self._model.get_submodule(block)) for block in blocks]
        return self._bytes(self._model) - sum(sizes) + max(sizes)

    def _bytes(self, module: nn.Module) -> int:
        return sum(weight.nbytes for weight in module.parameters() if weight in self._mapped)


def _release(pages: list[tuple[int, int]], module: nn.Module, arguments: Any, output: Any) -> None:
    MappedFiles.release(pages)
