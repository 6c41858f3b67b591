"""Plain dense weights that any runtime loads."""

import shutil
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from lrsd.checkpoint.manifest import MANIFEST_NAME, RECIPE_NAME, RUN_NAME
from lrsd.checkpoint.reader import StoredLayer, StoredModel
from lrsd.checkpoint.writer import new_directory
from lrsd.errors import CheckpointError
from lrsd.intake.json import require_inside
from lrsd.intake.safetensors import INDEX_NAME
from lrsd.model.experts import fused_names, fused_weight
from lrsd.work.files import refusals, write_json, write_tensors

_PACKED_ONLY = {"config.json", MANIFEST_NAME, RUN_NAME, RECIPE_NAME, INDEX_NAME}


def export_dense(directory: Path, target: Path, progress: Callable[[str], None] = lambda name: None) -> int:
    """Write L + S as plain dense weights, one shard and layer at a time.

    Returns: bytes of tensors written. Raises: CheckpointError if `directory` is not compressed.
    """
    stored = StoredModel(directory)
    corrected = [name for name, layer in stored.packing.layers.items() if layer.added_bias]
    if corrected:
        raise CheckpointError(
            f"{len(corrected)} layers carry a bias that the dense model has no place for, {corrected[0]} "
            "among them; compress without --mean-correction to export"
        )
    shards = sorted({stored.shard(name) for name in stored.names})
    weight_map: dict[str, str] = {}
    total = 0
    with new_directory(target) as temporary:
        for number, (_, layers) in enumerate(groupby(stored.layers(), lambda layer: layer.shard), 1):
            tensors: dict[str, Tensor] = {}
            for layer in layers:
                tensors |= dict(_dense_tensors(stored, layer))
                progress(layer.name)
            name = (
                f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                if len(shards) > 1
                else "model.safetensors"
            )
            write_tensors(temporary / name, tensors, {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
            total += sum(tensor.nbytes for tensor in tensors.values())
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(temporary / INDEX_NAME, index)
        write_json(
            temporary / "config.json", {k: v for k, v in stored.config.items() if k != "quantization_config"}
        )
        for path in directory.iterdir():
            if (
                path.suffix not in {".safetensors", ".md"}
                and path.name not in _PACKED_ONLY
                and path.is_file()
            ):
                require_inside(directory, path)
                with refusals(temporary):
                    shutil.copy2(path, temporary / path.name)
    return total


def _dense_tensors(stored: StoredModel, layer: StoredLayer) -> Iterator[tuple[str, Tensor]]:
    """A module's tensors under the names of the dense model; fused experts in the place of the first of
    them."""
    parent, _, number = layer.name.rpartition(".")
    experts, _, part = parent.rpartition(".")
    if (fusion := stored.packing.experts.get(experts)) is not None:
        fused = {parts: name for name, parts in fused_names(gated=fusion["gated"]).items()}
        if part in fused:
            if number == "0":
                yield from _fused(stored, parent, f"{experts}.{fused[part]}", transposed=fusion["transposed"])
            return
    turned = layer.packed is not None and layer.packed.layer.transposed
    for name, tensor in layer.dense().items():
        key = f"{layer.name}.{name}" if layer.name else name
        yield key, (tensor.T if turned and name == "weight" else tensor).contiguous()


def _fused(stored: StoredModel, experts: str, name: str, *, transposed: bool) -> Iterator[tuple[str, Tensor]]:
    """Weight and bias of all experts of one list, in order, as the model has them."""
    numbers = [n[len(experts) + 1 :] for n in stored.names if n.startswith(f"{experts}.")]
    members = [stored.layer(f"{experts}.{number}").dense() for number in range(len(numbers))]
    yield name, fused_weight([member["weight"] for member in members], transposed=transposed)
    if "bias" in members[0]:
        yield f"{name}_bias", torch.stack([member["bias"] for member in members])
