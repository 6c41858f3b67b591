"""Plain dense weights that any runtime loads."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

from lrsd.checkpoint.manifest import MANIFEST_NAME, RECIPE_NAME, RUN_NAME
from lrsd.checkpoint.reader import _read_packed, _read_tensor
from lrsd.checkpoint.writer import new_directory
from lrsd.errors import CheckpointError
from lrsd.forms.packed import LayerFormat
from lrsd.intake.json import read_json, require_inside
from lrsd.intake.safetensors import INDEX_NAME, take_inventory
from lrsd.model.experts import fused_names, fused_weight
from lrsd.model.slots import dense_linear
from lrsd.model.types import Tokenizer
from lrsd.runtimes.transformers import LrsdConfig
from lrsd.work.files import refusals, write_json, write_tensors


def export_dense(
    directory: Path,
    target: Path,
    tokenizer: Tokenizer | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> int:
    """Write L + S as plain dense weights that any runtime loads, one shard and layer at a time.

    Returns: bytes of tensors written. Raises: CheckpointError if `directory` is not compressed.
    """
    config = read_json(directory / "config.json")
    packing = config.pop("quantization_config", None)
    if not isinstance(packing, dict) or packing.get("quant_method") != "lrsd":
        raise CheckpointError(f"{directory} is not compressed by lrsd; nothing to export")
    packed = LrsdConfig(**packing)
    formats = packed.formats()
    corrected = [name for name, layout in formats.items() if layout.added_bias]
    if corrected:
        raise CheckpointError(
            f"{len(corrected)} layers carry a bias that the dense model has no place for, {corrected[0]} "
            "among them; compress without --mean-correction to export"
        )
    owners = {name: tensor.shard for name, tensor in take_inventory(directory).items()}
    shards = sorted(set(owners.values()))
    files = {
        shard: f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) > 1
        else "model.safetensors"
        for number, shard in enumerate(shards, 1)
    }
    weight_map: dict[str, str] = {}
    total = 0
    with new_directory(target) as aside:
        for shard, name in files.items():
            tensors = _dense_tensors(owners, shard, formats, packed, progress)
            write_tensors(aside / name, tensors, {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
            total += sum(tensor.nbytes for tensor in tensors.values())
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(aside / INDEX_NAME, index)
        write_json(aside / "config.json", config)
        for path in directory.iterdir():
            if (
                path.suffix not in {".safetensors", ".md"}
                and path.name not in _PACKED_ONLY
                and path.is_file()
            ):
                require_inside(directory, path)
                with refusals(aside):
                    shutil.copy2(path, aside / path.name)
    return total


_PACKED_ONLY = {"config.json", MANIFEST_NAME, RUN_NAME, RECIPE_NAME, INDEX_NAME}


def _dense_tensors(
    owners: dict[str, Path],
    shard: Path,
    formats: dict[str, LayerFormat],
    packed: LrsdConfig,
    progress: Callable[[str], None],
) -> dict[str, torch.Tensor]:
    """The tensors of one shard, those of packed layers unpacked beside their `weight`, fused experts beside
    the first of them."""
    dense: dict[str, torch.Tensor] = {}
    parts = {
        f"{experts}.{part}": (f"{experts}.{fused}", fusion["transposed"])
        for experts, fusion in packed.experts.items()
        for fused, part in fused_names(gated=fusion["gated"]).items()
    }
    with safe_open(shard, framework="pt") as file:
        for key in sorted(file.keys()):
            layer, _, part = key.rpartition(".")
            experts, _, number = layer.rpartition(".")
            if experts in parts:
                if number == "0" and part in ("weight", "bias"):
                    name, transposed = parts[experts]
                    values = _experts_values(owners, experts, part, formats)
                    dense[name if part == "weight" else f"{name}_bias"] = (
                        fused_weight(values, transposed=transposed)
                        if part == "weight"
                        else torch.stack(values)
                    )
                    progress(experts)
            elif layer in packed.embeddings:
                if part == "weight":
                    scales, codes = _read_tensor(owners, f"{layer}.scales"), file.get_tensor(key)
                    if scales.shape != codes.shape[:1]:
                        raise CheckpointError(
                            f"{layer} has {len(codes)} rows and {tuple(scales.shape)} scales"
                        )
                    dense[key] = codes.to(scales.dtype) * scales[:, None]
            elif layer not in formats:
                dense[key] = file.get_tensor(key)
            elif part == "weight":
                module = dense_linear(_read_packed(layer, formats[layer], owners), file.get_tensor(key).dtype)
                dense |= {
                    f"{layer}.{name}": value.contiguous() for name, value in module.state_dict().items()
                }
                progress(layer)
    return dense


def _experts_values(
    owners: dict[str, Path], experts: str, part: str, formats: dict[str, LayerFormat]
) -> list[torch.Tensor]:
    """Weight or bias of every expert of one list, in order, dense."""
    values = []
    for number in range(
        len({k.split(".")[experts.count(".") + 1] for k in owners if k.startswith(f"{experts}.")})
    ):
        layer = f"{experts}.{number}"
        value = _read_tensor(owners, f"{layer}.{part}")
        if layer in formats and part == "weight":
            value = _read_packed(layer, formats[layer], owners).dense_weight(value.dtype)
        values.append(value)
    return values
