"""Which embedding and head of a model can be stored in 8 bit, and exchanging them for such."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrsd.forms.int8 import Int8Embedding, Int8Head


def embedding_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the token embedding and the head, where they are a plain nn.Embedding and nn.Linear without
    bias; others (scaled embeddings, heads with a bias) stay at 16 bit, and so does an embedding that anything
    else shares with them (T5's stacks)."""
    names = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = []
    sharers = {owner for pair in model.all_tied_weights_keys.items() for owner in pair}
    plain_head = type(head) is nn.Linear and head.bias is None
    allowed = {
        f"{names[module]}.weight" for module in (embedding, head if plain_head else None) if module in names
    }
    if not sharers <= allowed:
        return ()
    if type(embedding) is nn.Embedding:
        found.append(names[embedding])
    if plain_head and (found or not is_tied(model)):
        found.append(names[head])
    return tuple(found)


def embedding_rows(model: PreTrainedModel) -> int:
    """Of the token embedding: the ids that the model reads are below that."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the head uses the token embedding's own weight."""
    head = model.get_output_embeddings()
    if isinstance(head, Int8Head):
        return head.tied
    names = [name for name, module in model.named_modules() if module is head]
    return any(key == f"{name}.weight" for name in names for key in model.all_tied_weights_keys)


def packed_bytes(model: PreTrainedModel, names: Iterable[str]) -> tuple[int, int]:
    """Bytes of these embeddings at 16 bit and at 8 with their scales, a tied head counted once."""
    weights = {model.get_submodule(name).weight for name in names}
    matrices = [weight for weight in weights if isinstance(weight, Tensor)]
    dense = sum(2 * weight.numel() for weight in matrices)
    rows = sum(weight.shape[0] for weight in matrices)
    return dense, dense // 2 + 2 * rows


def pack_embeddings(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Exchange the named embedding and head for 8-bit ones, values included."""
    _exchange(model, names, Int8Embedding.pack)


def insert_embeddings(model: PreTrainedModel, names: Iterable[str]) -> None:
    """The same, empty: before a checkpoint is read into the model."""
    _exchange(model, names, lambda weight: Int8Embedding(weight.shape[0], weight.shape[1], weight.dtype))


def restore_embeddings(model: PreTrainedModel, names: Iterable[str], dtype: torch.dtype | None) -> None:
    """Plain nn.Embedding and nn.Linear again, tied as before."""
    shared: nn.Parameter | None = None
    for name in names:
        packed = model.get_submodule(name)
        assert isinstance(packed, Int8Embedding | Int8Head)
        if isinstance(packed, Int8Head) and packed.tied and shared is not None:
            weight = shared
        else:
            values_VD = packed.dense_weight()
            weight = nn.Parameter(values_VD.to(dtype or values_VD.dtype), requires_grad=False)
        shared = weight
        rows, columns = weight.shape
        dense: Any = (
            nn.Linear(columns, rows, bias=False, device="meta")
            if isinstance(packed, Int8Head)
            else nn.Embedding(rows, columns, device="meta")
        )
        dense.weight = weight
        model.set_submodule(name, dense)


def _exchange(model: PreTrainedModel, names: Iterable[str], pack: Any) -> None:
    tied, first = is_tied(model), None
    for name in names:
        old = model.get_submodule(name)
        if isinstance(old, nn.Linear):
            rows = first if tied and first is not None else pack(old.weight)
            model.set_submodule(name, Int8Head(rows, tied=tied))
            # The tie is in the module now; transformers would look for a weight of the head's own.
            for key in [k for k in model.all_tied_weights_keys if k.startswith(f"{name}.")]:
                model.all_tied_weights_keys.pop(key)
        else:
            first = pack(old.weight)
            model.set_submodule(name, first)
