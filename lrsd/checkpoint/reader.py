"""Stored layers read back from the shards, checked against config.json."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lrsd.errors import CheckpointError
from lrsd.forms.packed import LayerFormat, LowRankSparseLinear
from lrsd.intake.safetensors import shard_paths
from lrsd.numerics.allocate import Shape


def stored_bytes(directory: Path, layers: dict[str, Any] | None = None) -> int:
    """Bytes of the tensors in the shards: all of them, or those of the named layers only."""
    total = 0
    for shard in shard_paths(directory):
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                if layers is None or key.rpartition(".")[0] in layers:
                    total += file.get_tensor(key).nbytes
    return total


def _read_tensor(owners: dict[str, Path], key: str) -> torch.Tensor:
    if key not in owners:
        raise CheckpointError(f"the checkpoint lacks {key}; it is incomplete: copy or compress it again")
    with safe_open(owners[key], framework="pt") as file:
        return file.get_tensor(key)


def _read_packed(layer: str, layout: LayerFormat, owners: dict[str, Path]) -> LowRankSparseLinear:
    """One packed layer from the shards, wherever its tensors are."""
    tensors = {}
    for key, shard in owners.items():
        if key.rpartition(".")[0] == layer:
            with safe_open(shard, framework="pt") as file:
                tensors[key.rpartition(".")[2]] = file.get_tensor(key)
    missing = {"weight", "coefficients"} - set(tensors)
    if missing:
        raise CheckpointError(f"layer {layer} lacks its {' and '.join(sorted(missing))}")
    try:
        rank, free_columns = tensors["weight"].shape
        out_features = tensors["coefficients"].shape[0] + layout.rows + (rank if layout.pivoted else 0)
        in_features = free_columns + (0 if layout.entries is not None else layout.columns)
        with torch.device("meta"):
            packed = LowRankSparseLinear(Shape(out_features, in_features), layout, tensors["weight"].dtype)
        for name, expected in packed.state_dict().items():
            found = tensors[name]
            fits = (
                found.is_floating_point() if expected.is_floating_point() else found.dtype == expected.dtype
            )
            if found.shape != expected.shape or not fits:
                raise ValueError(f"{name} is {found.dtype} {tuple(found.shape)}, not {tuple(expected.shape)}")
        packed.load_state_dict(tensors, assign=True)
        packed.check(layer)
    except (KeyError, RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"layer {layer} does not match its entry in config.json: {error}") from error
    return packed
