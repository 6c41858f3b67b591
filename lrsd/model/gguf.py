"""A model's GGUF file, and where the weights of the model loaded from it stand there."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from lrsd.errors import InputError
from lrsd.intake.gguf import read_gguf
from lrsd.intake.safetensors import StoredTensor
from lrsd.model.slots import weight_slot
from lrsd.model.types import Model


@dataclass(frozen=True)
class FileTensor:
    """A weight in the file. kind, nbytes: ggml's number of its type, and what it takes there; order_O: the
    rows of the model's weight as the file has them, which rearranges heads for some families; None: in the
    same order."""

    name: str
    kind: int
    nbytes: int
    order_O: Tensor | None = None

    def as_in_file(self, rows: Tensor) -> Tensor:
        """Rows in the model's order in the file's."""
        return rows if self.order_O is None else rows[self.order_O]


@dataclass(frozen=True)
class GgufSource:
    """The file as the package gguf reads it, the tensors of some modules by the modules' names, and the bytes
    of all the rest."""

    reader: Any
    tensors: dict[str, FileTensor]
    rest: int


def take_gguf_inventory(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of the file by its name, under GGUF's names of the types ("Q4_1").

    Raises: InputError for a file that is not in order, or of an architecture that transformers does not load.
    """

    def plain(name: str) -> str:
        """transformers' "qwen2_moe" is GGUF's "qwen2moe", its "gpt_oss" is "gpt-oss"."""
        return name.replace("_", "").replace("-", "").removesuffix("encoder")

    file = read_gguf(path)
    architecture = file.fields.get("general.architecture")
    if plain(str(architecture)) not in map(plain, GGUF_SUPPORTED_ARCHITECTURES):
        raise InputError(
            f"{path} has the architecture {architecture!r:.40}, which transformers does not load from GGUF; "
            "give the model's safetensors, from which the file was converted"
        )
    return file.tensors


def match_gguf(path: Path, model: Model, modules: Iterable[str]) -> GgufSource:
    """Find the weights of these modules in the file, by llama.cpp's names for them, and compare their values:
    a matrix is the same up to the order of its rows.

    Raises: InputError naming a module whose weight the file has not, or another one.
    """
    from gguf import MODEL_ARCH_NAMES, GGUFReader, dequantize, get_tensor_name_map

    reader = GGUFReader(path)
    field = reader.get_field("general.architecture")
    named = field.contents() if field else None
    architecture = next((arch for arch, name in MODEL_ARCH_NAMES.items() if name == named), None)
    if architecture is None:
        raise InputError(f"{path} is of the architecture {named!r:.40}, which the package gguf does not know")
    count = int(model.config.get_text_config().num_hidden_layers)
    names, stored = get_tensor_name_map(architecture, count), {t.name: t for t in reader.tensors}
    found = {}
    for module in modules:
        tensor = stored.get(f"{names.get_name(module)}.weight")
        if tensor is None:
            raise InputError(f"{path} has no tensor that is known to be the weight of {module}")
        owner = model.get_submodule(module)
        W_OI = owner.weight if isinstance(owner, nn.Embedding) else weight_slot(model, module).read()
        W_OI = W_OI.detach().cpu().to(model.dtype)
        decoded = dequantize(tensor.data, tensor.tensor_type)  # of F32 the mapped file itself, read-only
        values = torch.from_numpy(np.require(decoded, requirements="W")).to(model.dtype)
        order_O = row_order(values, W_OI) if values.shape == W_OI.shape else None
        if order_O is None:
            raise InputError(f"{path}: {tensor.name} does not hold the rows of {module}")
        same = torch.equal(order_O, torch.arange(len(order_O)))
        found[module] = FileTensor(
            tensor.name, int(tensor.tensor_type), tensor.n_bytes, None if same else order_O
        )
    return GgufSource(reader, found, path.stat().st_size - sum(t.nbytes for t in found.values()))


def row_order(found: Tensor, known: Tensor) -> Tensor | None:
    """(O,) int64, with found = known[order]; None if the two do not have the same rows."""
    if torch.equal(found, known):
        return torch.arange(len(known))
    places: dict[bytes, list[int]] = {}
    for number, row in enumerate(_bytes(known)):
        places.setdefault(row, []).append(number)
    order = []
    for row in reversed(_bytes(found)):  # equal rows in the order that they have
        if not places.get(row):
            return None
        order.append(places[row].pop())
    return torch.tensor(order[::-1])


def _bytes(values: Tensor) -> list[bytes]:
    rows = (values + 0.0).contiguous().view(torch.uint8)  # one zero, not two
    return [row.tobytes() for row in rows.numpy()]
