"""Frozen dataclasses as one safetensors file: tensors as tensors, all else as JSON in one more of them.

In the file's header, the menus of hundreds of experts would be more than safetensors reads.
"""

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lrsd.errors import CheckpointError
from lrsd.work.files import write_tensors

T = TypeVar("T")

_KEY = "record"


def write_record(path: Path, record: Any) -> None:
    """Write a dataclass durably under `path`. Its fields hold dataclasses, tuples, lists, dicts with text
    keys, tensors, numbers, texts and None, in any nesting.

    Raises: StorageError.
    """
    tensors: dict[str, Tensor] = {}
    content = _encode(record, "", tensors)
    text = bytearray(json.dumps(content).encode())
    write_tensors(path, {**tensors, _KEY: torch.frombuffer(text, dtype=torch.uint8)})


def read_record(path: Path, kind: type[T]) -> T:
    """What `write_record` wrote of a `kind`; its tensors are mapped from the file, and read when used.

    Raises: CheckpointError for a file that is damaged or holds another kind of record.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        content = json.loads(tensors.pop(_KEY).numpy().tobytes())
        return _decode(kind, content, tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} holds no {kind.__name__}: {error}") from error


def decode(kind: type[T], content: Any) -> T:
    """A dataclass without tensors from the JSON of its fields.

    Raises: TypeError, KeyError, ValueError or AttributeError for content that does not fit.
    """
    return _decode(kind, content, {})


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value.contiguous()
        return name
    if is_dataclass(value):
        return {f.name: _encode(getattr(value, f.name), f"{name}/{f.name}", tensors) for f in fields(value)}
    if isinstance(value, dict):
        return {key: _encode(item, f"{name}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]
    assert value is None or isinstance(value, bool | int | float | str), type(value)
    return value


def _decode(kind: Any, content: Any, tensors: Mapping[str, Tensor]) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if content is None and NoneType in arguments:
            return None
        (kind,) = (argument for argument in arguments if argument is not NoneType)
        return _decode(kind, content, tensors)
    if kind is Tensor:
        return tensors[content]
    if is_dataclass(kind):
        hints = _hints(kind)  # type: ignore[arg-type]
        if unknown := set(content) - set(hints):
            raise TypeError(f"unexpected field {sorted(unknown)[0]!r}")
        return kind(**{key: _decode(hints[key], item, tensors) for key, item in content.items()})  # type: ignore[operator]
    if origin is tuple:
        return tuple(_decode(arguments[0], item, tensors) for item in _listed(content))
    if origin is list:
        return [_decode(arguments[0], item, tensors) for item in _listed(content)]
    if origin is dict:
        return {key: _decode(arguments[1], item, tensors) for key, item in content.items()}
    if kind is float and type(content) is int:
        return float(content)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return kind(content)
    if kind is not Any and not isinstance(content, kind):
        raise TypeError(f"expected {kind.__name__}, got {content!r:.40}")
    return content


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """The types of a dataclass's fields, asked for thousands of times."""
    return get_type_hints(kind)


def _listed(content: Any) -> list[Any]:
    if not isinstance(content, list):
        raise TypeError(f"expected a list, got {content!r:.40}")
    return content
