"""What the exports to directories share: shards written one at a time, and the files beside the weights."""

import re
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor

from lrsd.checkpoint.manifest import CARD_NAME, MANIFEST_NAME, RECIPE_NAME, REPORT_NAME, RUN_NAME
from lrsd.checkpoint.reader import StoredLayer, StoredModel
from lrsd.checkpoint.writer import new_directory
from lrsd.intake.companions import copy_companions
from lrsd.intake.safetensors import INDEX_NAME
from lrsd.model.load import empty_model, named_as_stored
from lrsd.model.types import Model
from lrsd.work.files import write_json, write_tensors

# What tells of the compression, and is not copied.
_OWN = (MANIFEST_NAME, RUN_NAME, RECIPE_NAME, CARD_NAME, REPORT_NAME)

# A module of a block: its name up to the block's number.
_BLOCK = re.compile(r".*?\.\d+\.")

# Rotary settings that transformers 4 has beside `rope_scaling`, and what GPT-NeoX calls them.
_FLAT: tuple[str, ...] = ("rope_theta", "partial_rotary_factor")
_NEOX = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}

TensorsOf = Callable[[StoredLayer], Iterator[tuple[str, Tensor]]]


def write_export(
    stored: StoredModel,
    target: Path,
    tensors_of: TensorsOf,
    config: dict[str, Any],
    progress: Callable[[str], None],
) -> int:
    """Write the new directory `target`, a shard and a layer at a time, under the names of checkpoints of such
    models, which are not always those of the model in memory (experts are one by one).

    tensors_of: what is stored of one module, under its names in the dense model in memory. Returns: bytes of
    tensors written.
    """
    shards = _parts(stored)
    named = empty_model(stored.directory, len(stored.names))
    weight_map: dict[str, str] = {}
    total = 0
    with new_directory(target) as temporary:
        for number, parts in enumerate(shards, 1):
            tensors: dict[str, Tensor] = {}
            for part in parts:
                tensors |= _named_as_stored(stored, part, tensors_of, named, progress)
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
        copy_companions(stored.directory, temporary, renamed=dict.fromkeys(_OWN, ""))
    return total


def _parts(stored: StoredModel) -> list[list[list[str]]]:
    """The modules of every block, and those outside of blocks, by the shard that the first one is in."""
    parts: dict[str, list[str]] = {}
    for name in stored.names:
        block = _BLOCK.match(name)
        parts.setdefault(block.group() if block else "", []).append(name)
    return [list(group) for _, group in groupby(parts.values(), lambda names: stored.shard(names[0]))]


def _named_as_stored(
    stored: StoredModel,
    part: list[str],
    tensors_of: TensorsOf,
    named: Model,
    progress: Callable[[str], None],
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in part:
        tensors |= dict(tensors_of(stored.layer(name)))
        progress(name)
    return named_as_stored(named, tensors)


def plain_config(stored: StoredModel) -> dict[str, Any]:
    """config.json without what makes the checkpoint a packed one; with rotary settings under the names of
    transformers 4, too, by which other engines know them."""
    plain = {name: value for name, value in stored.config.items() if name != "quantization_config"}
    parts: list[dict[str, Any]] = [plain, plain.get("text_config") or {}]
    for part in parts:
        part |= _earlier_names(part.get("rope_parameters") or {}, str(part.get("model_type")))
    return plain


def _earlier_names(rope: dict[str, Any], family: str) -> dict[str, Any]:
    """rope: `rope_parameters`, or those of each type of layer, as Gemma 3 and ModernBERT have them; of others
    transformers 4 knows nothing."""
    if "sliding_attention" in rope and "full_attention" in rope:
        found = _earlier_names(rope["full_attention"], family)
        local = rope["sliding_attention"].get("rope_theta")
        if family == "modernbert":
            return {"global_rope_theta": found.get("rope_theta"), "local_rope_theta": local}
        return found | {"rope_local_base_freq": local} if family.startswith("gemma3") else {}
    found = {name: rope[name] for name in _FLAT if name in rope}
    if rope.get("rope_type", "default") != "default":
        found["rope_scaling"] = {name: value for name, value in rope.items() if name not in _FLAT}
    if family == "gpt_neox":
        return {_NEOX.get(name, name): value for name, value in found.items()}
    return found
