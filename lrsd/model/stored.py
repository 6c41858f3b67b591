"""The types that tensors of a checkpoint are stored in, against those that a model computes in; and tensors
that a model leaves out."""

import re
from collections import Counter
from collections.abc import Mapping

import torch
from transformers import PretrainedConfig, PreTrainedModel

from lrsd.intake.safetensors import StoredTensor

# Safetensors' names of the types that models compute in.
STORED_AS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
# The types that hold every value of a stored one.
_HOLDS = {
    "BF16": {torch.bfloat16, torch.float32, torch.float64},
    "F16": {torch.float16, torch.float32, torch.float64},
    "F32": {torch.float32, torch.float64},
    "F64": {torch.float64},
}


def native_dtype(config: PretrainedConfig, inventory: Mapping[str, StoredTensor]) -> str:
    """The type that most weights are stored in; where that is integers or blocks of them, what the
    configuration says."""
    sizes = Counter[str]()
    for tensor in inventory.values():
        sizes[tensor.dtype] += tensor.numel
    names = {stored: str(dtype).removeprefix("torch.") for dtype, stored in STORED_AS.items()}
    most = max(sizes, key=sizes.__getitem__, default="")
    if most in names and not getattr(config, "quantization_config", None):
        return names[most]
    return str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")


def left_out(model: PreTrainedModel, inventory: Mapping[str, StoredTensor]) -> set[str]:
    """Matrices that transformers passes over without a word: heads that predict several tokens at once."""
    known = model.state_dict().keys()
    return {
        name
        for name, tensor in inventory.items()
        if name.endswith(".weight") and len(tensor.shape) > 1 and name not in known
        if passed_over(model, name)
    }


def passed_over(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers says nothing of a stored tensor that the model has no place for: tables that are
    computed today, too."""
    patterns = (*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$")
    return any(re.search(pattern, name) for pattern in patterns)


def rounded_tensors(
    model: PreTrainedModel, inventory: Mapping[str, StoredTensor], computed: torch.dtype
) -> tuple[str, ...]:
    """Tensors whose values the type that they are loaded in cannot hold; the model may keep some in another
    type than the rest."""
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    return tuple(
        name
        for name, tensor in sorted(inventory.items())
        if types.get(name, computed) not in _HOLDS.get(tensor.dtype, set(types.values()))
    )
