"""Plain dense weights that any runtime loads."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lrsd.checkpoint.reader import StoredLayer, StoredModel
from lrsd.errors import CheckpointError
from lrsd.export.base import plain_config, write_export
from lrsd.model.experts import fused_names, fused_weight


def export_dense(directory: Path, target: Path, progress: Callable[[str], None] = lambda name: None) -> int:
    """Write L + S as plain dense weights.

    Returns: bytes of tensors written. Raises: CheckpointError if `directory` is not compressed.
    """
    stored = StoredModel(directory)
    corrected = [name for name, layer in stored.packing.layers.items() if layer.added_bias]
    if corrected:
        raise CheckpointError(
            f"{len(corrected)} layers carry a bias that the dense model has no place for, {corrected[0]} "
            "among them; compress without --mean-correction to export"
        )
    return write_export(stored, target, partial(dense_tensors, stored), plain_config(stored), progress)


def dense_tensors(stored: StoredModel, layer: StoredLayer) -> Iterator[tuple[str, Tensor]]:
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
