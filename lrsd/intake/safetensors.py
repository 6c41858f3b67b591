"""Inventory of an untrusted model directory, from names and headers alone."""

import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lrsd.errors import CheckpointError, InputError
from lrsd.intake.companions import WEIGHTS
from lrsd.intake.json import (
    _LARGEST_HEADER,
    _LARGEST_JSON,
    CONFIG_NAME,
    parse_json,
    read_json,
    require_inside,
)
from lrsd.intake.lfs import refuse_pointer
from lrsd.intake.tokenizer import _check_tokenizer

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# Types a dense weight may be stored in. Others are codes of some quantization, or no weights at all.
_FLOATS = {"F64", "F32", "F16", "BF16"}
# Settings that transformers makes as many modules or entries of, without asking whether there is a weight.
_COUNTS = re.compile(
    r"(num_.*layers|n_layers?|(en|de)coder_layers|n(um)?_.*experts|num_labels|block_sizes|attention_types)"
)
# Modules that a configuration may ask for beyond one per tensor: some have no weights.
_FREE_COUNT = 1000


@dataclass(frozen=True)
class StoredTensor:
    """Shape, safetensors' name of the type ("BF16"), shard and size in bytes of one tensor."""

    shape: tuple[int, ...]
    dtype: str
    shard: Path
    nbytes: int = 0

    @property
    def numel(self) -> int:
        return prod(self.shape)


# Quantization methods whose checkpoints are loaded, to be evaluated.
_READABLE = ("lrsd", "compressed-tensors")


def take_inventory(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a directory by its name, its files checked as far as their headers tell.

    Raises: InputError for what is no regular file of this directory, a pickle, a damaged or absurd header, a
        tensor that two shards hold; for a configuration that asks for more than could be there.
    """
    _check_kind(directory)
    _check_tokenizer(directory)
    found: dict[str, StoredTensor] = {}
    for shard in shard_paths(directory):
        for name, tensor in read_header(shard):
            if name in found:
                raise InputError(
                    f"{name} is in {found[name].shard.name} and in {shard.name}; it must be in one"
                )
            found[name] = tensor
    config = read_json(directory / CONFIG_NAME)
    _check_counts(config, max(len(found), _FREE_COUNT))
    packing = config.get("quantization_config")
    if packing is None:
        for name, tensor in found.items():
            if tensor.dtype not in _FLOATS and name.rpartition(".")[2] in ("weight", "bias"):
                raise InputError(
                    f"{name} is stored as {tensor.dtype}; a weight must be of a floating-point type"
                )
    elif not isinstance(packing, dict) or packing.get("quant_method") not in _READABLE:
        method = packing.get("quant_method") if isinstance(packing, dict) else packing
        raise InputError(f"{directory} is quantized by {method!r:.40}; give the model that it was made from")
    return found


def shard_paths(directory: Path) -> list[Path]:
    """The checkpoint's safetensors files: model.safetensors, else those of its index.

    Raises: CheckpointError for a shard that is missing, no regular file, or outside the directory.
    """
    index = directory / INDEX_NAME
    names: set[Any] = {SINGLE_NAME}
    if not (directory / SINGLE_NAME).exists() and index.exists():
        content = read_json(index).get("weight_map")
        if not isinstance(content, dict) or not content:
            raise CheckpointError(f"{index} holds no weight map")
        names = {name if isinstance(name, str) else repr(name) for name in content.values()}
    return [_shard(directory, name) for name in sorted(names)]


def _shard(directory: Path, name: str) -> Path:
    if os.path.basename(name) != name or not name.endswith(".safetensors") or len(name) > 255:  # noqa: PTH119
        raise CheckpointError(
            f"{directory / INDEX_NAME} names {name!r:.80}, which is no .safetensors file of this directory"
        )
    if not (directory / name).is_file():
        raise CheckpointError(f"{directory} lacks {name}, or it is no regular file")
    return require_inside(directory, directory / name)


def _check_kind(directory: Path) -> None:
    if not (directory / CONFIG_NAME).is_file():
        _check_no_gguf(directory)
        raise InputError(f"{directory} holds no {CONFIG_NAME}; expected a transformers model directory")
    for path in (*directory.iterdir(), *directory.glob("*/*.jinja")):
        if not path.is_dir() and path.suffix not in WEIGHTS:
            require_inside(directory, path)
        if path.suffix == ".json" and path.is_file() and path.stat().st_size > _LARGEST_JSON:
            raise InputError(f"{path} has {path.stat().st_size:,} bytes, at most {_LARGEST_JSON:,} are read")
    if (directory / "adapter_config.json").exists():
        raise InputError(f"{directory} holds an adapter; merge it into its base model first")
    if any(directory.glob("*.safetensors")) or (directory / INDEX_NAME).exists():
        return
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern))
    if pickles:
        raise InputError(
            f"{directory} holds its weights as pickle ({pickles[0]}), which can run code when read; "
            "convert it to safetensors first (save_pretrained does)"
        )
    _check_no_gguf(directory)
    raise InputError(f"{directory} holds no .safetensors file")


def _check_no_gguf(directory: Path) -> None:
    """Raises: InputError if a directory without safetensors holds GGUF files."""
    files = sorted(directory.glob("*.gguf"))
    if files:
        others = f", or another of its {len(files)} GGUF files" if len(files) > 1 else ""
        raise InputError(f"{directory} holds its weights as GGUF; name the file: {files[0]}{others}")


def read_header(shard: Path) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors that a safetensors file says it holds, and holds by its size. Raises: InputError."""
    refuse_pointer(shard)
    size = shard.stat().st_size
    with shard.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
        if length > min(size - 8, _LARGEST_HEADER):
            raise InputError(f"cannot load {shard}: its header should have {length:,} of its {size:,} bytes")
        content = file.read(length)
    try:
        header = parse_json(content)
        header.pop("__metadata__", None)
        end = 0
        for name, entry in header.items():
            shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
            if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)) or not isinstance(
                entry["dtype"], str
            ):
                raise ValueError(f"{name!r:.80} has an impossible entry")
            end = max(end, stop)
            yield name, StoredTensor(shape, entry["dtype"], shard, stop - start)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"cannot load {shard}: its header is damaged ({error})") from error
    if 8 + length + end != size:
        raise InputError(
            f"cannot load {shard}: it has {size:,} bytes, its header speaks of {8 + length + end:,}; "
            "it is cut off or damaged, copy it again"
        )
    try:
        with safe_open(shard, framework="pt"):  # checks what is left: overlaps, sizes, unknown types
            pass
    except SafetensorError as error:
        raise InputError(f"cannot load {shard}: {error}") from error


def _check_counts(config: dict[str, Any], most: int) -> None:
    for key, value in config.items():
        if isinstance(value, dict):
            _check_counts(value, most)
        if key == "id2label" and isinstance(value, dict) and len(value) > most:
            raise InputError(f"{CONFIG_NAME}: {len(value):,} labels, more than the files have tensors")
        for number in _numbers(value) if _COUNTS.fullmatch(key) else ():
            if not 0 <= number <= most:
                raise InputError(
                    f"{CONFIG_NAME}: {key} is {number:,}, expected 0 to {most:,} for these files"
                )
        if "attn_implementation" in key and "/" in str(value):
            raise InputError(f"{CONFIG_NAME}: {key} {value!r:.80} would fetch code; leave it out")


def _numbers(value: Any) -> Iterator[int | float]:
    """A number, or those of a list of lists."""
    if isinstance(value, list):
        for entry in value:
            yield from _numbers(entry)
    elif isinstance(value, int | float):
        yield value
