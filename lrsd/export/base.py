"""What the exports to directories share: shards written one at a time, and the files beside the weights."""

import shutil
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor

from lrsd.checkpoint.manifest import MANIFEST_NAME, RECIPE_NAME, RUN_NAME
from lrsd.checkpoint.reader import StoredLayer, StoredModel
from lrsd.checkpoint.writer import new_directory
from lrsd.intake.json import require_inside
from lrsd.intake.safetensors import INDEX_NAME
from lrsd.work.files import refusals, write_json, write_tensors

_PACKED_ONLY = {"config.json", MANIFEST_NAME, RUN_NAME, RECIPE_NAME, INDEX_NAME}

TensorsOf = Callable[[StoredLayer], Iterator[tuple[str, Tensor]]]


def write_export(
    stored: StoredModel,
    target: Path,
    tensors_of: TensorsOf,
    config: dict[str, Any],
    progress: Callable[[str], None],
) -> int:
    """Write the new directory `target`, a shard and a layer at a time.

    tensors_of: what is stored of one module, under its names there. Returns: bytes of tensors written.
    """
    shards = sorted({stored.shard(name) for name in stored.names})
    weight_map: dict[str, str] = {}
    total = 0
    with new_directory(target) as temporary:
        for number, (_, layers) in enumerate(groupby(stored.layers(), lambda layer: layer.shard), 1):
            tensors: dict[str, Tensor] = {}
            for layer in layers:
                tensors |= dict(tensors_of(layer))
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
        write_json(temporary / "config.json", config)
        _copy_others(stored.directory, temporary)
    return total


def plain_config(stored: StoredModel) -> dict[str, Any]:
    """config.json without what makes the checkpoint a packed one."""
    return {name: value for name, value in stored.config.items() if name != "quantization_config"}


def _copy_others(directory: Path, target: Path) -> None:
    """Tokenizer, processor and whatever else there is besides weights, card and the program's own files."""
    for path in directory.iterdir():
        if path.suffix not in {".safetensors", ".md"} and path.name not in _PACKED_ONLY and path.is_file():
            require_inside(directory, path)
            with refusals(target):
                shutil.copy2(path, target / path.name)
