"""Paging of weights: those of a large model are read from its files again whenever they are used."""

import ctypes
import re
import resource
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lrsd.work.onloading import Onloading
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
# Pinned memory that the copying of a block takes, of its bytes: torch rounds every tensor's to a power of 2.
_PINNED = 2
# Bytes from which a tensor's memory is released at once, for weights that stay in memory and for paged ones:
# 8 MiB cost no time and lowered the peak for SmolLM2-135M by a tenth, 1 MiB cost a third of the fit's.
_LARGE = {False: 2**23, True: 2**20}


class Residence:
    """Which weights stay in memory, and which are on an accelerator. Those of a model that takes much of
    memory, and is mapped from safetensors files of the type it computes in, are paged (streamed from disk):
    released as soon as they were used, and read again when needed. What waits for an accelerator always is.

    paged: whether weights are read from the files whenever they are used; onloading: what brings them to an
    accelerator, where there is one.
    """

    def __init__(self, model: nn.Module, limit: int | None, process: Process | None = None) -> None:
        """limit: bytes of memory allowed. From here on, until `close`, a paged module's weights go when it
        has run."""
        self._model, self._mapped = model, MappedFiles()
        self.paged = limit is not None and self._bytes(model) > _RESIDENT * limit
        self.onloading: Onloading | None = None
        self._hooks: list[RemovableHandle] = []
        (process or Process()).release_at_once(_LARGE[self.paged])
        if self.paged:
            for module in model.modules():
                pages = self._mapped.pages(module.parameters(recurse=False))
                self._hooks.append(module.register_forward_hook(partial(_release, pages)))

    def onload(self, blocks: Sequence[str], device: torch.device, limit: int | None) -> None:
        """Have the model run on that accelerator, see `Onloading`. Raises: InputError."""
        self._unhook()
        self.paged = False
        self.onloading = Onloading(self._model, blocks, device, limit, self._release_tensors)

    def offload(self) -> None:
        """All weights on the host."""
        if self.onloading is not None:
            self.onloading.offload()

    def close(self) -> None:
        """Take the hooks off the model; all weights on the host."""
        self._unhook()
        if self.onloading is not None:
            self.onloading.close()

    def _unhook(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _release_tensors(self, tensors: Iterable[Tensor]) -> None:
        self._mapped.release(self._mapped.pages(tensors))

    def passing(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight by its name, released when the next one is asked for."""
        for name, weight in self._model.state_dict().items():
            yield name, weight
            if self.paged or self.onloading is not None:
                self._release_tensors([weight])

    def release(self, module: nn.Module) -> None:
        """What was freed, and a module's weights, which will not be used for a while."""
        if self.onloading is not None:
            self.onloading.finished(module)
        if self.paged:
            self._release_tensors(module.parameters())
        release_freed()

    def at_rest(self) -> int:
        """Bytes in memory with none of the mapped weights."""
        self._release_tensors(self._model.parameters())
        release_freed()
        return current_rss()

    def weights(self, blocks: Iterable[str], budget: int) -> int:
        """Bytes of mapped weights that will be in memory at once: all, plus those that take their place,
        or those of one block and of none; with an accelerator what is on its way there. blocks: the names of
        the model's."""
        if self.onloading is not None:
            return _PINNED * self.onloading.largest
        if not self.paged:
            return self._bytes(self._model) + budget
        sizes = [self._bytes(self._model.get_submodule(block)) for block in blocks]
        return self._bytes(self._model) - sum(sizes) + max(sizes)

    def _bytes(self, module: nn.Module) -> int:
        return sum(weight.nbytes for weight in module.parameters() if weight in self._mapped)


def _release(pages: list[tuple[int, int]], module: nn.Module, arguments: Any, output: Any) -> None:
    MappedFiles.release(pages)
