"""What a stored form is: a frozen class that states its tensors. Its bytes, the checks on loading, its entry
in config.json, multiply-adds and export follow from that statement.

A layer (`forms.layer.Layer`) is a sum of forms on its free rows and columns. A new form is one file with one
class, and one line in `forms.FORMS`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrsd.numerics.lowrank import complement

# Bytes of a value in the model's own 16-bit type.
VALUE_BYTES = 2
# Of entropy-coded integers, in eighths of an octave: float32 ends at 2^127.
_LARGEST_EXPONENT = 8 * 127
# Largest number in an entry of config.json: more would be no layer of any model.
_LARGEST = 2**40

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """Output and input channels of one linear weight."""

    out_features: int
    in_features: int

    @property
    def dense_bytes(self) -> int:
        return VALUE_BYTES * self.out_features * self.in_features


@dataclass(frozen=True, slots=True)
class Spec:
    """Shape and type of one stored tensor; dtype None: the model's own 16-bit type.

    A size may be an array of as many offers as there are: `nbytes` is one then, too.
    """

    size: tuple[Any, ...]
    dtype: torch.dtype | None = None

    @property
    def nbytes(self) -> Any:
        return prod(self.size) * (VALUE_BYTES if self.dtype is None else self.dtype.itemsize)


Specs = dict[str, Spec]


class Form:
    """One summand of a stored layer. Subclasses are frozen dataclasses of numbers and flags."""

    # How config.json calls it.
    name: ClassVar[str]
    # Whether `load` makes something worth keeping between two passes.
    decodes: ClassVar[bool] = False
    # Tensors that need not be kept beside what `load` made of them, since `encode` makes them again.
    encoded: ClassVar[tuple[str, ...]] = ()

    def tensors(self, shape: Shape) -> Specs:
        """Every stored tensor by its name, for a form that spans `shape`. No form may store a bias."""
        raise NotImplementedError

    def forward(self, loaded: Tensors, x: Tensor, shape: Shape) -> Tensor:
        """Outputs (..., O) for x (..., I). loaded: what `load` made of the tensors."""
        raise NotImplementedError

    def dense(self, loaded: Tensors, shape: Shape) -> Tensor:
        """The matrix (O, I) that it stands for, in float32."""
        raise NotImplementedError

    def load(self, tensors: Tensors, shape: Shape) -> Tensors:
        """The tensors as `forward` reads them. Raises: ValueError for damaged ones."""
        return tensors

    def moved(self, loaded: Tensors, device: torch.device) -> Tensors:
        """What `load` made, on another device."""
        return {name: tensor.to(device) for name, tensor in loaded.items()}

    def encode(self, loaded: Tensors, tensors: Tensors) -> dict[str, Tensor]:
        """Those of `encoded` again, to the byte, from what `load` made of them and the other tensors."""
        raise NotImplementedError

    def fits(self, shape: Shape) -> bool:
        """Whether its sizes are ones that a weight of this shape can have."""
        return True

    def check(self, tensors: Tensors, shape: Shape) -> None:
        """Raises: ValueError if values contradict each other; sizes and types are checked by `tensors`."""

    def nbytes(self, shape: Shape) -> Any:
        return sum(spec.nbytes for spec in self.tensors(shape).values())

    def macs(self, shape: Shape) -> int:
        """Multiply-adds per token: one for every stored value."""
        return sum(prod(spec.size) for spec in self.tensors(shape).values() if spec.dtype is None)

    def describe(self) -> str:
        """In a few words, for people."""
        return self.name.replace("_", " ")

    def to_dict(self) -> dict[str, Any]:
        """The entry in config.json: name, and the fields that differ from their defaults."""
        defaults = {field.name: field.default for field in fields(self)}  # type: ignore[arg-type]
        mine = {k: v for k, v in asdict(self).items() if v != defaults[k]}  # type: ignore[call-overload]
        return {"form": self.name} | mine


def index_type(size: int) -> torch.dtype:
    """Of an index into `size` channels: int16 where it fits."""
    return torch.int16 if size <= torch.iinfo(torch.int16).max + 1 else torch.int32


def check_coded(stream: Any, exponent: int) -> None:
    """stream: bytes of entropy-coded integers, or an array of offers. Raises: ValueError if impossible."""
    if isinstance(stream, int) and stream < 0:
        raise ValueError(f"a stream of {stream} bytes")
    if abs(exponent) > _LARGEST_EXPONENT:
        raise ValueError(f"no usable exponent: {exponent}")


def check_numbers(kind: type, entry: Mapping[str, Any]) -> None:
    """Raises: ValueError if an entry of config.json has fields that `kind` lacks, or impossible values."""
    known = {field.name: field.type for field in fields(kind)}
    if unknown := sorted(set(entry) - set(known)):
        raise ValueError(f"it has no {unknown[0]!r}, only {', '.join(known)}")
    for name, value in entry.items():
        wanted = bool if known[name] in (bool, "bool") else int
        if type(value) is not wanted:
            raise ValueError(f"{name} must be {'true or false' if wanted is bool else 'a whole number'}")
        if wanted is int and not abs(value) < _LARGEST:
            raise ValueError(f"{name} is {value}")


def check_indices(what: str, indices: Tensor, size: int) -> None:
    """Raises: ValueError unless they are ascending numbers below `size`."""
    steps = indices.long().diff()
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= size or bool((steps < 1).any())):
        raise ValueError(f"{what} must be ascending numbers below {size}")


def interleave(chosen: Tensor, others: Tensor, indices: Tensor) -> Tensor:
    """Merge along the last dimension: `chosen` at `indices`, `others` in between, in order.

    Written into place: a gather of the concatenation takes longer than the products themselves.
    """
    size = chosen.shape[-1] + others.shape[-1]
    merged = chosen.new_empty(*chosen.shape[:-1], size)
    merged[..., indices.long()] = chosen
    merged[..., complement(indices, size)] = others
    return merged
