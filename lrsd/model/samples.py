"""Inputs and outputs of a model, of whatever kind it is."""

from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrsd.errors import InputError
from lrsd.model.arithmetic import fast_products
from lrsd.numerics.divergence import mean_divergence

_TOKEN_INPUTS = ("input_ids", "decoder_input_ids")


@dataclass(frozen=True)
class Samples:
    """Model inputs by name, one unpadded sample per row: input_ids (N, T), and for a model of two stacks
    decoder_input_ids (N, T'), for a speech model input_features (N, channels, frames) instead of input_ids.
    """

    inputs: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def __getitem__(self, rows: slice) -> "Samples":
        return Samples({name: value[rows] for name, value in self.inputs.items()})

    def split(self, count: int) -> Iterator["Samples"]:
        for start in range(0, len(self), count):
            yield self[start : start + count]

    def cut(self, length: int) -> "Samples":
        """The first `length` tokens of every sample; features stay whole."""
        return Samples({n: v[:, :length] if n in _TOKEN_INPUTS else v for n, v in self.inputs.items()})

    @property
    def positions(self) -> int:
        """Tokens of the longest input, or frames of features, over all samples."""
        return max(v.numel() if n in _TOKEN_INPUTS else v[:, 0].numel() for n, v in self.inputs.items())

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(value.shape) for value in self.inputs.values())


def run_model(model: PreTrainedModel, samples: Samples, **more: Any) -> Any:
    """The model's output; without a cache, which would remember what an earlier pass put into it."""
    takes = signature(model.forward).parameters
    inputs = {name: value.to(model.device) for name, value in samples.inputs.items()}
    for name, value in inputs.items():
        if value.is_floating_point():
            inputs[name] = value.to(model.dtype)
    if "use_cache" in takes:
        more["use_cache"] = False
    with fast_products(model.dtype, model.device):
        return model(**inputs, **more)


def try_running(model: PreTrainedModel, example: Samples) -> None:
    """One pass. Raises: InputError if the model cannot be run at all, its configuration being impossible."""
    try:
        with torch.inference_mode():
            run_model(model, example)
    except Exception as error:  # models raise errors of every kind
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{type(model).__name__} cannot be run on {' and '.join(example.inputs)} alone: {line}"
        ) from error


def logits_of(output: Any) -> Tensor:
    """A model's logits, (rows, classes) in float32; of a bare encoder its last hidden states."""
    named = [getattr(output, name, None) for name in ("logits", "last_hidden_state")]
    found = next((value for value in named if isinstance(value, Tensor)), None)
    if found is None:
        raise InputError(f"{type(output).__name__} holds neither logits nor hidden states to compare")
    return found.float().reshape(-1, found.shape[-1])


def distance(model: PreTrainedModel, reference: Tensor, found: Tensor) -> float:
    """Mean over rows of KL(reference || found) in nats; of half the relative squared error where the rows
    are no logits of several classes, see `mean_divergence`."""
    return mean_divergence(reference, found, categorical=is_categorical(model, reference))


def is_categorical(model: PreTrainedModel, logits: Tensor) -> bool:
    """Whether rows of a model's `logits_of` are logits of several classes."""
    return has_logits(model) and logits.shape[-1] > 1


def has_logits(model: PreTrainedModel) -> bool:
    """Whether the model has a head: a bare one is its own base model."""
    return model.base_model is not model
