"""Where a linear weight lives in a model, and which way round it is stored there."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lrsd.forms.packed import LowRankSparseLinear


def dense_linear(packed: LowRankSparseLinear, dtype: torch.dtype) -> nn.Module:
    """The nn.Linear that a packed layer is equivalent to, or the Conv1D where the model has those."""
    dense: nn.Module = (
        Conv1D(packed.out_features, packed.in_features) if packed.layout.transposed
        else nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None)
    )  # fmt: skip
    weight = packed.dense_weight(dtype)
    dense.weight = nn.Parameter(
        weight.T.contiguous() if packed.layout.transposed else weight, requires_grad=False
    )
    if packed.bias is not None:
        dense.bias = nn.Parameter(packed.bias.to(dtype), requires_grad=False)
    return dense
