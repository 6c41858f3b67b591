"""A simulated accelerator, for machines without one: tensors that say they are on cuda:0.

Such a tensor is an ordinary one of a class of its own, so that views, derivatives and parameters work as
ever, and results are those of a CPU to the byte. What makes it a device is looked at whenever Python calls
torch: tensors of two devices do not meet, numpy cannot read it, and what is copied and waited for is counted.
Nothing has to be compiled, and nothing of torch's is changed for good.
"""

import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lrsd
from lrsd.progress import Progress

DEVICE, HOST = torch.device("cuda", 0), torch.device("cpu")
# Numbers that a CPU may work on: indices, tables, scales of a layer, a batch's tokens.
LARGE = 4096
_PACKAGE = str(Path(lrsd.__file__).parent)

# Attributes of tensors that are tensors.
_ATTRIBUTES = {"data", "grad", "T", "mT", "H", "mH", "real", "imag"}
_TO_NUMPY = {"numpy", "__array__"}
_MOVES = {"to", "cpu", "cuda", "type_as", "new_tensor"}
# Calls that read no more than shape and type of their further tensors.
_SHAPES = {"view_as", "reshape_as", "expand_as", "is_same_size", "_has_compatible_shallow_copy_type", "grad"}
_MIXING = {"copy_"} | _MOVES | _SHAPES
_INDEXING = {"__getitem__", "__setitem__", "index_put_"}
# What ATen calls the operations that a program waits for: it needs to know a value, or how many there are.
_WAITS = {
    "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "_linalg_check_errors",
}  # fmt: skip
# Those that start nothing.
_FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh"}


class OnDevice(Tensor):
    """A tensor on the simulated device."""

    # What is asked of it is looked at by `Simulation`.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:
        return DEVICE

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_cpu(self) -> bool:
        return False

    def __repr__(self, **options: Any) -> str:
        return f"OnDevice(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.dim() == 0 else repr(self), spec)


class Simulation(TorchFunctionMode):
    """The device, for as long as the context lasts, and what was counted meanwhile, all of it by phase.

    launches: kernels started, one for every operation of ATen's on a CPU that is no view: real devices may
    start more or fewer. syncs: times that the program waited for the device. places: the same by phase and
    function of the package. to_device, to_host: bytes. host_work: calls by phase and function that worked on
    more than `LARGE` numbers elsewhere. phase: what is counted now.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.launches, self.syncs = Counter[str](), Counter[str]()
        self.to_device, self.to_host = Counter[str](), Counter[str]()
        self.places, self.host_work = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
        # Where torch is at work: None while it copies from one to the other.
        self._at_work: torch.device | None = HOST

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.__name__
        if name in ("__get__", "__set__"):
            name = func.__self__.__name__
            if func.__name__ == "__set__" and name == "data":
                return self._exchange(func, *args)
            if func.__name__ == "__get__" and name not in _ATTRIBUTES:
                return func(*args)
        elif name == "device":  # a torch.device is made
            return func(*args, **(kwargs or {}))
        kwargs = dict(kwargs or {})
        given = _tensors((args, kwargs))
        self._require_together(name, args, given)
        if name in _TO_NUMPY:
            self._read_by_numpy(given[0])
        if name == "tolist" and isinstance(given[0], OnDevice):
            self._copied(given[0], HOST)
        args, wanted = _destination(name, args, kwargs)
        if wanted is not None and name in _MOVES:
            return self._moved(func, args, kwargs, wanted)
        if name in ("tensor", "as_tensor", "asarray") and wanted == DEVICE:
            return self._moved(Tensor.to, (self._run(func, args, kwargs, HOST),), {"copy": True}, DEVICE)
        if name == "copy_" and len({isinstance(tensor, OnDevice) for tensor in given}) > 1:
            self._copied(given[1], _device_of(given[0]), asynchronous=bool(kwargs.get("non_blocking")))
            return self._run(func, args, kwargs, None)
        deciding = given[:1] if name in _SHAPES else given
        where = wanted or (DEVICE if any(isinstance(tensor, OnDevice) for tensor in deciding) else HOST)
        if where == DEVICE and isinstance(kwargs.get("generator"), torch.Generator):
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        result = self._run(func, args, kwargs, where)
        return _put(result, DEVICE) if where == DEVICE else result

    @property
    def at_work(self) -> torch.device | None:
        return self._at_work

    def waits(self) -> None:
        """The program waits for the device."""
        self.syncs[self.phase] += 1
        self.places[self.phase, _place()] += 1

    def works_on_host(self) -> None:
        self.host_work[self.phase, _place()] += 1

    def _run(self, func: Callable[..., Any], args: Any, kwargs: Any, where: torch.device | None) -> Any:
        before, self._at_work = self._at_work, where
        try:
            return func(*args, **kwargs)
        finally:
            self._at_work = before

    def _moved(
        self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], wanted: torch.device
    ) -> Tensor:
        source = args[0]
        crosses = _device_of(source) != wanted and DEVICE in (_device_of(source), wanted)
        if crosses and wanted.type != "meta":
            self._copied(source, wanted, asynchronous=bool(kwargs.get("non_blocking")))
        result: Tensor = self._run(func, args, kwargs, None if crosses else wanted)
        if crosses and result.data_ptr() == source.data_ptr():
            result = self._run(Tensor.clone, (result,), {}, None)
        return _put(result, wanted)

    def _copied(self, source: Tensor, to: torch.device, *, asynchronous: bool = False) -> None:
        (self.to_device if to == DEVICE else self.to_host)[self.phase] += source.nbytes
        if not asynchronous:
            self.waits()

    def _exchange(self, func: Callable[..., Any], tensor: Tensor, value: Tensor) -> None:
        """`tensor.data = value`: from then on it is where that was."""
        func(tensor, value)
        _put(tensor, _device_of(value))

    def _read_by_numpy(self, tensor: Tensor) -> None:
        if isinstance(tensor, OnDevice):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if tensor.numel() > LARGE:
            self.works_on_host()

    def _require_together(self, name: str, args: tuple[Any, ...], given: list[Tensor]) -> None:
        """Raises: RuntimeError where CUDA would. Numbers may be anywhere, and indices of what is on the
        device, which are copied to it; so is what is put into a slice."""
        if (
            len({isinstance(tensor, OnDevice) for tensor in given}) < 2
            or name in {"copy_"} | _MOVES | _SHAPES
        ):
            return
        others = [t for t in given if not isinstance(t, OnDevice) and t.dim() > 0 and not t.is_meta]
        if others and name in _INDEXING and isinstance(args[0], OnDevice):
            indexed = bool(_tensors(args[1]))
            stray = [t for t in _tensors(args[2:]) if any(t is other for other in others)]
            if not (indexed and stray):
                for tensor in others:
                    self._copied(tensor, DEVICE)
                return
        if others:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
                f"cpu! ({name})"
            )


class _Kernels(TorchDispatchMode):
    """Counts the operations of ATen's."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__()
        self._simulation = simulation

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, simulation = func._schema.name.partition("::")[2], self._simulation
        works = not func.is_view and name not in _FREE
        if simulation.at_work == DEVICE:
            if name in _WAITS or (name.startswith("index") and _has_mask(args)):
                simulation.waits()
            simulation.launches[simulation.phase] += works
        elif simulation.at_work == HOST and works and _largest((args, kwargs)) > LARGE:
            simulation.works_on_host()
        return func(*args, **(kwargs or {}))


class Phases(Progress):
    """Tells a simulation what of a compression is going on: "load", "observe", "compress", then "write".

    blocks: how many blocks each stage has been through.
    """

    def __init__(self, simulation: Simulation) -> None:
        self._simulation, self._left = simulation, 0
        self.blocks = Counter[str]()
        simulation.phase = "load"

    def stage(self, name: str, steps: int) -> None:
        self._simulation.phase, self._left = name, steps

    def step(self, what: str) -> None:
        self.blocks[self._simulation.phase] += 1
        self._left -= 1
        if self._simulation.phase == "compress" and not self._left:
            self._simulation.phase = "write"


@contextmanager
def simulated_device(*, counts_kernels: bool = True) -> Iterator[Simulation]:
    """A machine with one accelerator, whatever this one has.

    counts_kernels: else launches, waits within an operation and work on the host are not counted, which
    spares a quarter of the time.
    """
    simulation = Simulation()
    machine: dict[str, Callable[..., Any]] = {
        "torch.accelerator.is_available": lambda: True,
        "torch.accelerator.current_accelerator": lambda: DEVICE,
        "torch.cuda.get_device_name": lambda device=None: "simulated",
        "torch.cuda.max_memory_allocated": lambda device=None: 0,
        "torch.cuda.synchronize": lambda device=None: simulation.waits(),
    }
    with ExitStack() as stack:
        for name, function in machine.items():
            stack.enter_context(patch(name, function))
        stack.enter_context(simulation)
        if counts_kernels:
            stack.enter_context(_Kernels(simulation))
        yield simulation


@contextmanager
def reckoning_alike() -> Iterator[None]:
    """A CPU that computes what an accelerator is asked to: products of 16-bit numbers by torch's own kernels,
    derivatives of attention by the plain formula."""
    with ExitStack() as stack:
        for module in ("samples", "replay"):
            stack.enter_context(patch(f"lrsd.model.{module}.fast_products", lambda *_: nullcontext()))
        stack.enter_context(
            patch("lrsd.model.derivatives._repeatable", lambda _: sdpa_kernel(SDPBackend.MATH))
        )
        yield


def bytes_on_device() -> int:
    """What tensors that Python knows of take there."""
    found = [thing for thing in gc.get_objects() if type(thing) is OnDevice]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
    return sum(storages.values())


def _device_of(tensor: Tensor) -> torch.device:
    return DEVICE if isinstance(tensor, OnDevice) else tensor.device


def _tensors(value: Any, found: list[Tensor] | None = None) -> list[Tensor]:
    """Those within tuples, lists and dictionaries, in order."""
    found = [] if found is None else found
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, tuple | list):
        for item in value:
            _tensors(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            _tensors(item, found)
    return found


def _destination(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], torch.device | None]:
    """A call's arguments with a CPU in the place of the device, and where it wants its result, if it says so.

    Raises: RuntimeError for a device that the machine does not have.
    """
    if name in ("cpu", "cuda"):
        return args[:1], HOST if name == "cpu" else DEVICE
    wanted: torch.device | None = None

    def here(value: Any) -> Any:
        nonlocal wanted
        if isinstance(value, Tensor):
            wanted = _device_of(value)
            return value
        if not isinstance(value, str | torch.device):
            return value
        wanted = torch.device(value)
        if wanted.type != "cuda":
            return value
        if wanted.index not in (None, 0):
            raise RuntimeError("CUDA error: invalid device ordinal")
        wanted = DEVICE
        return HOST

    if name in ("to", "type_as"):
        args = (*args[:1], *(here(value) for value in args[1:]))
    for key in ("device", "other"):
        if kwargs.get(key) is not None and (key == "device" or name in _MOVES):
            kwargs[key] = here(kwargs[key])
    return args, wanted


def _put(result: Any, device: torch.device) -> Any:
    """Everything of a result is taken to be on that device from now on."""
    for tensor in _tensors(result):
        is_parameter = isinstance(tensor, nn.Parameter)
        if device == DEVICE and not isinstance(tensor, OnDevice):
            tensor.__class__ = OnDevice
            if is_parameter:
                tensor._is_param = True  # by which torch knows parameters of other classes
        elif device != DEVICE and isinstance(tensor, OnDevice):
            tensor.__class__ = nn.Parameter if is_parameter else Tensor
    return result


def _largest(arguments: Any) -> int:
    return max((tensor.numel() for tensor in _tensors(arguments) if not tensor.is_meta), default=0)


def _has_mask(args: tuple[Any, ...]) -> bool:
    """Whether something is indexed by a mask: how many places that has has to be counted first."""
    return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in _tensors(args[1:2]))


def _place() -> str:
    """The function of the package that is at work."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    if frame is None:
        return "elsewhere"
    file = Path(frame.f_code.co_filename).relative_to(_PACKAGE)
    return f"{file}:{frame.f_code.co_qualname.partition('.<locals>')[0]}"
