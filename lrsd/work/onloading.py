"""Onloading: weights that wait on the host, and are on an accelerator for as long as it has room for them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lrsd.errors import InputError

# Share of the memory allowed that is left to activations before the preflight knows what they take: text is
# sampled from the model before that, whose keys and values are several gigabytes of a large one.
_UNKNOWN = 1 / 4
# Share of what is free that is not counted on by default: torch's cache has holes, libraries have workspaces.
_SPARE = 1 / 16
# Where a model keeps its `Onloading`, and a tensor its data on the host with the address of their copy.
_ONLOADING, _HOME = "_onloading", "_home"


def compute_device(model: nn.Module) -> torch.device:
    """Where a model runs: where its weights are brought to, or else where they are."""
    found = vars(model).get(_ONLOADING)
    return next(model.parameters()).device if found is None else found.device


def is_too_wide(model: nn.Module, width: int) -> bool:
    """Whether the squares of a layer's width are to stay on the host, since an accelerator has no room for
    those that its solution takes."""
    found = vars(model).get(_ONLOADING)
    return found is not None and found.widest is not None and width > found.widest


def bring_outside(model: nn.Module) -> None:
    """Bring what is in no block of a model to where it runs, if it is to be changed there."""
    if (found := vars(model).get(_ONLOADING)) is not None:
        found.bring_outside()


def free_memory(device: torch.device) -> int | None:
    """Bytes of an accelerator that may be taken by default; None where it does not say."""
    free: int | None = None
    if device.type == "cuda" and torch.cuda.is_available():
        free = torch.cuda.mem_get_info(device)[0]
    elif device.type != "cpu" and (ask := getattr(torch.accelerator, "get_memory_info", None)):
        try:
            free = ask(device)[0]
        except (RuntimeError, ValueError):  # of one that has the host's
            return None
    return None if free is None else int((1 - _SPARE) * free)


class Onloading:
    """Brings a model's weights to an accelerator: a block when it is about to run, what is in no block when
    the model is. They stay until the room is needed, so that a model that fits is brought once.

    Parameters stay the same objects; their data change places. device: where they are brought to; least:
    bytes of the largest block and of what is in none; largest: of that block; limit: bytes of the device
    allowed; reserved: of these, not for weights; widest: of layers whose squares have room on the device.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        device: torch.device,
        limit: int | None,
        release: Callable[[list[Tensor]], None] = lambda tensors: None,
    ) -> None:
        """blocks: the names of the model's; release: told of data on the host that were copied.

        Raises: InputError if a block does not fit beside what is in none.
        """
        self.device = torch.empty(0, device=device).device  # with its number
        self.limit, self._release = limit, release
        self._blocks = [_Part(model.get_submodule(name)) for name in blocks]
        within = {module for block in self._blocks for module in block.modules()}
        self._outside = _Part(*(module for module in model.modules() if module not in within))
        self.largest, name = max((part.nbytes, name) for part, name in zip(self._blocks, blocks, strict=True))
        self.least = self.largest + self._outside.nbytes
        if limit is not None and self.least > limit:
            raise InputError(
                f"{name} takes {self.largest / 1e9:.2f} GB, embeddings, head and norms take "
                f"{self._outside.nbytes / 1e9:.2f} GB, {limit / 1e9:.2f} GB of {device} are allowed; allow "
                "more with --device-memory, or take a device with more or --device cpu"
            )
        self.reserved = 0 if limit is None else min(int(_UNKNOWN * limit), limit - self.least)
        self.widest: int | None = None
        self._running: list[_Part] = []
        self._used: dict[_Part, None] = {}  # in the order of their last use
        self._finished: set[_Part] = set()
        self._copying = torch.cuda.Stream(self.device) if torch.cuda.is_available() else None
        self._model, self._handles = model, list[RemovableHandle]()
        for block, following in pairwise([*self._blocks, None]):
            assert block is not None
            self._hook(block.top, block, following)
        for holder in sorted({holder for block in blocks for holder in _holders(block)}):
            self._hook(model.get_submodule(holder), self._outside)
        setattr(model, _ONLOADING, self)

    def finished(self, module: nn.Module) -> None:
        """A block's weights will not be read for a while: they are the first to leave."""
        self._finished.update(block for block in self._blocks if block.top is module)

    def bring_outside(self) -> None:
        self._enter(self._outside)

    def offload(self) -> None:
        """All weights on the host again."""
        for part in (self._outside, *self._blocks):
            self._leave(part)

    def close(self) -> None:
        """The same, and the model as it was."""
        self.offload()
        while self._handles:
            self._handles.pop().remove()
        vars(self._model).pop(_ONLOADING, None)

    def held(self) -> int:
        """Bytes of weights that are on the device."""
        tensors = {id(t): t for part in (self._outside, *self._blocks) for t in part.tensors()}
        return sum(tensor.nbytes for tensor in tensors.values() if tensor.device == self.device)

    def _hook(self, module: nn.Module, part: "_Part", following: "_Part | None" = None) -> None:
        def enter(module: nn.Module, args: Any) -> None:
            if "forward" not in vars(module):  # else its input is handed through, see `Replay`
                self._enter(part)
            self._running.append(part)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if part in self._running:
                self._running.remove(part)
            # No output: the pass was given up.
            if following is not None and output is not None and "forward" not in vars(module):
                self._prefetch(following, part)

        self._handles += [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave, always_call=True),
        ]

    def _enter(self, part: "_Part") -> None:
        if missing := part.elsewhere(self.device):
            self._make_room(sum(tensor.nbytes for tensor in missing))
            self._bring(part, missing)
        if part.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(part.copied)
            part.copied = None
        self._used.pop(part, None)
        self._used[part] = None
        self._finished.discard(part)

    def _prefetch(self, part: "_Part", last: "_Part") -> None:
        """Begin to copy the block that is likely to be next, while `last` is still computed; nothing where
        copies are not made beside computations, or where there is no room for both."""
        if self._copying is None or not (missing := part.elsewhere(self.device)):
            return
        if self._make_room(sum(tensor.nbytes for tensor in missing), last):
            self._bring(part, missing)
            self._used[part] = None

    def _make_room(self, nbytes: int, last: "_Part | None" = None) -> bool:
        """Whether there is room for so many bytes, others having left. last: stays.

        Finished blocks go first, then the one used last: a model's blocks run in a circle, so that it is the
        last to be used again.
        """
        if self.limit is None:
            return True
        free = self.limit - self.reserved - self.held()
        candidates = [part for part in reversed(self._used) if part not in self._running and part is not last]
        for part in sorted(candidates, key=lambda part: part not in self._finished):
            if free >= nbytes:
                break
            free += self._leave(part)
        return free >= nbytes

    def _bring(self, part: "_Part", tensors: list[Tensor]) -> None:
        homes = [tensor.data for tensor in tensors]
        # Not in inference mode, which may be on: what is made there cannot take part in a derivative.
        with torch.inference_mode(False), torch.no_grad(), self._beside():
            for tensor, home in zip(tensors, homes, strict=True):
                tensor.data = self._copied(home)
                vars(tensor)[_HOME] = home, tensor.data_ptr()
        if self._copying is not None:
            part.copied = self._copying.record_event()
        self._release(homes)

    def _copied(self, home: Tensor) -> Tensor:
        if self._copying is None:
            return home.to(self.device)
        # torch keeps the pinned memory until it is copied, and then for the next tensor; and the memory of
        # the copy, once that is given up, until what was begun with it is done.
        copy = home.pin_memory().to(self.device, non_blocking=True)
        copy.record_stream(torch.cuda.current_stream(self.device))
        return copy

    def _beside(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._copying is None else torch.cuda.stream(self._copying)

    def _leave(self, part: "_Part") -> int:
        """Returns: bytes that left the device. What was written there goes to the host; the rest is there."""
        shared = {id(tensor) for other in self._running for tensor in other.tensors()}
        nbytes = 0
        with torch.inference_mode(False), torch.no_grad():
            for tensor in part.tensors():
                if tensor.device != self.device or id(tensor) in shared:
                    continue
                nbytes += tensor.nbytes
                home, address = vars(tensor).pop(_HOME, (None, None))
                tensor.data = home if tensor.data_ptr() == address else tensor.data.cpu()
        self._used.pop(part, None)
        return nbytes


class _Part:
    """Weights that are brought together: those of one module, a block, with all that is in it; or those that
    several have of their own. copied: the event after which their copies are there, until it was waited for.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.top, self._own = modules[0], modules[1:]
        self.copied: Any = None

    def modules(self) -> Iterable[nn.Module]:
        """Of a block those that are there now: its layers are exchanged for packed ones."""
        return (self.top, *self._own) if self._own else self.top.modules()

    def tensors(self) -> Iterable[Tensor]:
        """Parameters and buffers, each once."""
        found: dict[int, Tensor] = {}
        for module in self.modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    found[id(tensor)] = tensor
        return found.values()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def elsewhere(self, device: torch.device) -> list[Tensor]:
        return [tensor for tensor in self.tensors() if tensor.device != device]


def _holders(block: str) -> Iterator[str]:
    """Names of the modules that a block is in, the model's own "" among them."""
    return iter(["", *accumulate(block.split(".")[:-1], lambda name, part: f"{name}.{part}")])
