"""Stored layers read back from the shards, checked against config.json; one at a time, wherever its tensors
are."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from lrsd.checkpoint.packing import Packing, parse_packing
from lrsd.errors import CheckpointError
from lrsd.forms.layer import Layer
from lrsd.forms.packed import PackedLinear
from lrsd.intake.json import read_json
from lrsd.intake.safetensors import read_header, shard_paths, take_inventory


@dataclass(frozen=True)
class StoredLayer:
    """One module's tensors as stored. packed: the linear layer that they make up, where it is a packed one;
    in_8_bit: whether they are codes and scales of an embedding. shard: where its first tensor is."""

    name: str
    tensors: dict[str, Tensor]
    shard: Path
    packed: PackedLinear | None = None
    in_8_bit: bool = False

    def dense(self) -> dict[str, Tensor]:
        """Its tensors in a model that is not compressed, a packed weight as (O, I). Raises:
        CheckpointError."""
        if self.packed is not None:
            weight = self.packed.dense_weight(self.tensors["weight"].dtype)
            bias = self.packed.bias
            return {"weight": weight} | ({"bias": bias.detach()} if bias is not None else {})
        if self.in_8_bit:
            codes, scales = self.tensors.get("weight"), self.tensors.get("scales")
            if codes is None or scales is None or scales.shape != codes.shape[:1]:
                found = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
                raise CheckpointError(f"{self.name} needs a weight and a scale per row of it, got {found}")
            return {"weight": codes.to(scales.dtype) * scales[:, None]}
        return self.tensors


class StoredModel:
    """The tensors of a compressed checkpoint directory by module, checked as far as headers tell."""

    def __init__(self, directory: Path) -> None:
        """Raises: InputError or CheckpointError for a directory that is not in order, or not compressed."""
        if directory.is_file():
            raise CheckpointError(f"{directory} is a file; expected a directory written by lrsd compress")
        self.directory = directory
        self.config: dict[str, Any] = read_json(directory / "config.json")
        entry = self.config.get("quantization_config")
        if not isinstance(entry, dict) or entry.get("quant_method") != "lrsd":
            raise CheckpointError(f"{directory} is not compressed by lrsd; nothing to export")
        self.packing: Packing = parse_packing(entry)
        self._parts: dict[str, dict[str, Path]] = {}
        for key, tensor in take_inventory(directory).items():
            module, _, part = key.rpartition(".")
            self._parts.setdefault(module, {})[part] = tensor.shard

    @property
    def names(self) -> list[str]:
        """Modules in the order of their shards."""
        return sorted(self._parts, key=lambda name: (self.shard(name), name))

    def shard(self, name: str) -> Path:
        parts = self._parts[name]
        return parts.get("weight") or min(parts.values())

    def layers(self) -> Iterator[StoredLayer]:
        """Every module, one at a time. Raises: CheckpointError naming the layer that is not in order."""
        for name in self.names:
            yield self.layer(name)

    def layer(self, name: str) -> StoredLayer:
        """Raises: CheckpointError."""
        if name not in self._parts:
            raise CheckpointError(f"the checkpoint lacks {name}; it is incomplete: copy or compress it again")
        tensors = {}
        for part, shard in sorted(self._parts[name].items()):
            with safe_open(shard, framework="pt") as file:
                tensors[part] = file.get_tensor(f"{name}.{part}" if name else part)
        packed = None
        if (layer := self.packing.layers.get(name)) is not None:
            packed = _packed(name, layer, tensors)
        in_8_bit = name in self.packing.embeddings
        return StoredLayer(name, tensors, self.shard(name), packed, in_8_bit)


def _packed(name: str, layer: Layer, tensors: dict[str, Tensor]) -> PackedLinear:
    """The layer that these tensors make up; its shape follows from theirs. Raises: CheckpointError."""
    if missing := {"weight", "coefficients"} - set(tensors):
        raise CheckpointError(f"layer {name} lacks its {' and '.join(sorted(missing))}")
    try:
        shape = layer.shape(tensors)
        if not layer.fits(shape):
            raise ValueError(f"it does not fit a weight of {shape.out_features} x {shape.in_features}")
        for part, spec in layer.tensors(shape).items():
            if part not in tensors:
                raise ValueError(f"it lacks {part}")
            found = tensors[part]
            fits = found.is_floating_point() if spec.dtype is None else found.dtype == spec.dtype
            if tuple(found.shape) != spec.size or not fits:
                raise ValueError(f"{part} is {found.dtype} {tuple(found.shape)}, not {spec.size}")
        packed = PackedLinear.holding(shape, layer, {part: tensors[part] for part in layer.tensors(shape)})
    except (KeyError, RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"layer {name} does not match its entry in config.json: {error}") from error
    packed.check(name)
    return packed


def resident_bits(directory: Path) -> float:
    """Bits per weight that the packed layers hold in memory once loaded here, one at a time.

    Raises: CheckpointError for damaged layers, or a directory that is not compressed.
    """
    held = weights = 0
    for layer in StoredModel(directory).layers():
        if (packed := layer.packed) is not None:
            packed.release_encoded()
            held += packed.resident_bytes()
            weights += packed.in_features * packed.out_features
    return 8 * held / max(weights, 1)


def written_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a directory of safetensors by its name, one at a time; none of a file."""
    for shard in shard_paths(path) if path.is_dir() else ():
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                yield name, file.get_tensor(name)


def stored_bytes(directory: Path, layers: dict[str, Any] | None = None) -> int:
    """Bytes of the tensors in the shards, as their headers say: all of them, or those of the named layers
    only."""
    return sum(
        tensor.nbytes
        for shard in shard_paths(directory)
        for key, tensor in read_header(shard)
        if layers is None or key.rpartition(".")[0] in layers
    )
