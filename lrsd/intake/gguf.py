"""What a GGUF file says that it holds, checked against the file's size before any reader believes it.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path

from lrsd.errors import InputError
from lrsd.intake.lfs import refuse_pointer
from lrsd.intake.safetensors import StoredTensor

_VERSIONS = (2, 3)
# struct's letter for every type of a single value; then the types of strings and of arrays.
_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Far above real files: 262,144 tokens with scores, types and merges make 1.3 million entries.
_MOST_ENTRIES, _MOST_TENSORS, _MOST_DIMENSIONS = 2**21, 2**17, 4
# A reader takes the entries of lists apart one by one, in some 10 us and 700 bytes, and a token in the square
# of its length. Real files have more than 150 bytes for each entry, and no token of 300.
_BYTES_PER_ENTRY, _FREE_ENTRIES, _LONGEST_ENTRY = 64, 2**12, 2**10
# Settings that transformers makes as many modules of, without asking whether there is a weight for each;
# experts share theirs.
_COUNTS, _FREE_COUNT = ("block_count", "expert_count"), 256
_ALIGNMENT = 32
# What a GGUF file is, by its "general.type", that is no model, and what to do with it.
_NO_MODELS = {
    "adapter": "a LoRA adapter; merge it into its base model first (llama.cpp's llama-export-lora does)",
    "imatrix": "an importance matrix for llama.cpp's quantizer; give the model that it was measured on",
    "mmproj": "a model's projector of images or sound; give the language model's file, which lies beside it",
}
# How llama.cpp names the parts of a file that was split.
_PART = re.compile(r"-(\d{5})-of-\d{5}\.gguf$")
Fields = dict[str, int | float | str | None]


@dataclass(frozen=True)
class GgufFile:
    """fields: of the header, those that are one number or text, None standing for the others; tensors: their
    types are GGUF's ("Q4_1"); starts: where in the file each tensor's bytes begin."""

    path: Path
    fields: Fields
    tensors: dict[str, StoredTensor]
    starts: dict[str, int]

    def vector(self, name: str) -> list[float] | None:
        """The values of a tensor of one dimension, None if there is none of that name. Raises: InputError."""
        if (tensor := self.tensors.get(name)) is None:
            return None
        if tensor.dtype != "F32" or len(tensor.shape) != 1:
            raise InputError(
                f"{self.path}: {name} is stored as {tensor.dtype} of {len(tensor.shape)} dimensions, "
                "expected a list of F32; convert the model to GGUF again"
            )
        with self.path.open("rb") as file:
            file.seek(self.starts[name])
            return list(struct.unpack(f"<{tensor.numel}f", file.read(4 * tensor.numel)))


def read_gguf(path: Path) -> GgufFile:
    """What a GGUF file says that it holds, and holds by its size.

    Raises: InputError for a file that is cut off, of another kind or byte order, or whose header is
    inconsistent; for a part of a model, and for what is no language model.
    """
    with _mapped(path) as content:
        header = _Header(content)
        num_tensors, fields = _fields(header)
        _check_whole_model(path, fields)
        return _tensors(path, header, num_tensors, fields)


def read_gguf_text(path: Path, key: str) -> str | None:
    """A field of the header that is a text; None if it has none of that name. Raises: InputError."""
    with _mapped(path) as content:
        found = _fields(_Header(content))[1].get(key)
    return found if isinstance(found, str) else None


@contextmanager
def _mapped(path: Path) -> Iterator[mmap]:
    """The file's content; whatever is wrong with it is one line."""
    refuse_pointer(path)
    try:
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            yield content
    except (ValueError, struct.error) as error:
        raise InputError(f"{path} is not a readable GGUF file: {error}") from error


def _check_whole_model(path: Path, fields: Fields) -> None:
    """Raises: InputError for a part of a split file, and for what is no language model."""
    count, number = fields.get("split.count"), fields.get("split.no")
    if isinstance(count, int) and count > 1:
        part = number + 1 if isinstance(number, int) else "?"
        first = _PART.sub(rf"-00001-of-{count:05}.gguf", path.name)
        raise InputError(
            f"{path} is part {part} of {count} of a model; merge them first, with llama.cpp's "
            f"llama-gguf-split --merge {first} WHOLE.gguf"
        )
    kind = "mmproj" if fields.get("general.architecture") == "clip" else fields.get("general.type", "model")
    if kind != "model":
        what = _NO_MODELS.get(str(kind), f"of the type {kind!r:.40}; give a model")
        raise InputError(f"{path} is no language model but {what}")


def _fields(header: "_Header") -> tuple[int, Fields]:
    """The number of tensors, and the fields that are one number or text, None standing for the others."""
    if header.magic() != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    if (version := header.number("I")) not in _VERSIONS:
        raise ValueError(f"its version is {version}, little-endian versions 2 and 3 are read")
    num_tensors, num_fields = header.number("Q"), header.number("Q")
    if max(num_tensors, num_fields) > _MOST_TENSORS:
        raise ValueError(f"it should hold {num_tensors:,} tensors and {num_fields:,} fields")
    return num_tensors, {header.text(): header.value() for _ in range(num_fields)}


def _tensors(path: Path, header: "_Header", num_tensors: int, fields: Fields) -> GgufFile:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    for key, value in fields.items():
        counted = key.endswith(_COUNTS) and isinstance(value, int | float)
        if counted and not 0 <= value <= max(num_tensors, _FREE_COUNT):  # type: ignore[operator]
            raise ValueError(f"its {key} is {value:,}, its tensors {num_tensors:,}")
    found: dict[str, StoredTensor] = {}
    spans = []
    for _ in range(num_tensors):
        name, num_dimensions = header.text(), header.number("I")
        if name in found or num_dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"{name!r:.80} is there twice, or of {num_dimensions} dimensions")
        shape = tuple(header.number("Q") for _ in range(num_dimensions))[::-1]
        kind, offset = GGMLQuantizationType(header.number("I")), header.number("Q")
        block, nbytes = GGML_QUANT_SIZES[kind]
        spans.append((offset, offset + prod(shape) * nbytes // block))
        found[name] = StoredTensor(shape, kind.name, path)
    alignment = fields.get("general.alignment")
    alignment = alignment if isinstance(alignment, int) and alignment > 0 else _ALIGNMENT
    data = -(-header.place // alignment) * alignment
    _check_spans(spans, header.size - data)
    starts = {name: data + start for name, (start, _) in zip(found, spans, strict=True)}
    return GgufFile(path, fields, found, starts)


def _check_spans(spans: list[tuple[int, int]], room: int) -> None:
    """Raises: ValueError if tensors reach beyond the file, or share bytes: a small file must stay small."""
    end = 0
    for start, stop in sorted(spans):
        if start < end:
            raise ValueError("two of its tensors overlap")
        end = stop
    if end > room:
        raise ValueError(f"its tensors take {end:,} bytes, {room:,} are there; it is cut off, copy it again")


class _Header:
    """Reads the header from its `place` on. Raises: struct.error at the end of the file, ValueError."""

    def __init__(self, content: mmap) -> None:
        self._content, self.place, self._entries = content, 0, 0
        self.size = len(content)

    def magic(self) -> bytes:
        self._skip(4)
        return self._content[:4]

    def number(self, letter: str) -> int:
        value: int
        (value,) = struct.unpack_from(f"<{letter}", self._content, self.place)
        self._skip(struct.calcsize(letter))
        return value

    def text(self) -> str:
        length = self.number("Q")
        self._skip(length)
        return self._content[self.place - length : self.place].decode()

    def value(self) -> int | str | None:
        """Skip a field's type and value. Returns: the value if it is a single number or text."""
        kind = self.number("I")
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            self._skip_values(self.number("I"), self.number("Q"))
        else:
            raise ValueError(f"it has a field of type {kind}")
        return None

    def _skip_values(self, kind: int, count: int) -> None:
        self._entries += count
        most = min(_FREE_ENTRIES + len(self._content) // _BYTES_PER_ENTRY, _MOST_ENTRIES)
        if self._entries > most:
            raise ValueError(f"its lists should have {self._entries:,} entries, at most {most:,}")
        if kind in _NUMBERS:
            self._skip(count * struct.calcsize(_NUMBERS[kind]))
        elif kind == _STRING:
            for _ in range(count):
                if (length := self.number("Q")) > _LONGEST_ENTRY:
                    raise ValueError(f"one of its tokens should have {length:,} bytes")
                self._skip(length)
        else:
            raise ValueError(f"it has a list of type {kind}")

    def _skip(self, length: int) -> None:
        self.place += length
        if self.place > len(self._content):
            raise ValueError("it ends within its header; it is cut off, copy it again")
