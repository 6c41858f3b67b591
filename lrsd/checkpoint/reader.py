"""Stored layers read back from the shards, checked against config.json; one at a time, wherever its tensors
are."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lrsd.checkpoint.manifest import LayerRecord
from lrsd.checkpoint.packing import Packing, parse_packing
from lrsd.errors import CheckpointError
from lrsd.forms.base import Shape, Spec, Specs
from lrsd.forms.layer import Layer, parse_layer
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


def stored_weights(directory: Path, records: Mapping[str, LayerRecord]) -> Iterator[tuple[str, Tensor]]:
    """The matrices (O, I) in float32 that some of a manifest's layers are stored as, one at a time, in lrsd's
    own format or in compressed-tensors; not those that are not there under their names.

    Raises: CheckpointError for a layer that is not what its record says.
    """
    inventory = take_inventory(directory)
    for name, record in records.items():
        layer = None if record.layer is None else parse_layer(name, record.layer)
        specs = _specs(name, layer, Shape(record.out_features, record.in_features))
        wanted = {part: inventory.get(f"{name}.{part}") for part, spec in specs.items() if spec.nbytes}
        # What other formats leave out is empty: the factors of no rank.
        tensors = {
            p: torch.zeros(spec.size, dtype=spec.dtype) for p, spec in specs.items() if not spec.nbytes
        }
        for part, found in wanted.items():
            if found is not None:
                with safe_open(found.shard, framework="pt") as file:
                    tensors[part] = file.get_tensor(f"{name}.{part}")
        if specs.keys() <= tensors.keys():
            packed = None if layer is None else _packed(name, layer, tensors)
            yield name, tensors["weight"].float() if packed is None else packed.dense_weight()


def _specs(name: str, layer: Layer | None, shape: Shape) -> Specs:
    """What is stored of a layer of that shape, or of one that stayed dense. Raises: CheckpointError."""
    if layer is None:
        return {"weight": Spec((shape.out_features, shape.in_features))}
    try:
        if not layer.fits(shape):
            raise ValueError(f"it does not fit a weight of {shape.out_features} x {shape.in_features}")
        return layer.tensors(shape)
    except ValueError as error:
        raise CheckpointError(f"layer {name} is not what the manifest says: {error}") from error


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
