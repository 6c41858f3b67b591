"""Singular values of stored weights: those of the block that lost most."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrsd.checkpoint.reader import stored_weights
from lrsd.report.facts import Facts, LayerFacts

# Layers of the block: of experts the one of each kind that lost most.
_MOST_LAYERS = 8
# Shorter side of a weight; the eigenvalues of a wider one take longer than a page is worth.
_WIDEST = 8192
# Of a weight at once, in float64.
_COLUMNS = 4096


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a stored weight, falling. rank: of its L, if it has one."""

    label: str
    block: int
    values: np.ndarray[Any, Any]
    rank: int = 0


def spectra_of(facts: Facts, result: Path) -> list[Spectrum]:
    """Of a directory or a GGUF file; of no layer that is not stored under its name."""
    losses: dict[int, float] = {}
    for layer in facts.layers:
        if layer.block is not None:
            losses[layer.block] = losses.get(layer.block, 0.0) + layer.loss
    if not losses:
        return []
    block = max(losses, key=lambda number: losses[number])
    chosen: dict[str, LayerFacts] = {}
    for layer in facts.worst:
        narrow = min(layer.record.out_features, layer.record.in_features) <= _WIDEST
        if layer.block == block and narrow:
            chosen.setdefault(layer.kind, layer)
    ordered = [chosen[kind] for kind in facts.kinds if kind in chosen][:_MOST_LAYERS]
    if result.is_file():
        return _of_gguf(result, block)
    layers = {layer.name: layer for layer in ordered}
    weights = stored_weights(result, {name: layer.record for name, layer in layers.items()})
    return [
        Spectrum(layers[name].kind, block, singular_values(W_OI), layers[name].rank) for name, W_OI in weights
    ]


def _of_gguf(path: Path, block: int) -> list[Spectrum]:
    """Under llama.cpp's names, which count blocks as the model does."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    found = []
    for tensor in GGUFReader(path).tensors:
        name = tensor.name.removeprefix(f"blk.{block}.").removesuffix(".weight")
        if (
            tensor.name == f"blk.{block}.{name}.weight"
            and len(tensor.shape) == 2
            and min(tensor.shape) <= _WIDEST
        ):
            values = dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
            found.append(Spectrum(name, block, singular_values(torch.from_numpy(values))))
    return found[:_MOST_LAYERS]


def singular_values(W_OI: Tensor) -> np.ndarray[Any, Any]:
    """Falling, none for a weight that is not finite; from the Gram matrix of the shorter side in float64, so
    those below 1e-8 of the largest are not told apart."""
    W = W_OI if W_OI.shape[0] <= W_OI.shape[1] else W_OI.T
    if not W.isfinite().all():
        return np.zeros(0)
    gram = torch.zeros(len(W), len(W), dtype=torch.float64)
    for columns in W.split(_COLUMNS, dim=1):
        gram += columns.double() @ columns.double().T
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0).numpy()
