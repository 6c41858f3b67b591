"""Inputs and outputs of a model, of whatever kind it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lrsd.errors import InputError
from lrsd.model.arithmetic import fast_products
from lrsd.numerics.divergence import mean_divergence
from lrsd.work.onloading import compute_device

_TOKEN_INPUTS = ("input_ids", "decoder_input_ids")
# An id that no token has.
_NO_TOKEN = -1


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
    def token_ids(self) -> list[Tensor]:
        """Those of its inputs that are tokens."""
        return [value for name, value in self.inputs.items() if name in _TOKEN_INPUTS and value.numel()]

    @property
    def positions(self) -> int:
        """Tokens of the longest input, or frames of features, over all samples."""
        return max(v.numel() if n in _TOKEN_INPUTS else v[:, 0].numel() for n, v in self.inputs.items())

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(value.shape) for value in self.inputs.values())


def run_model(model: PreTrainedModel, samples: Samples, **more: Any) -> Any:
    """The model's output; without a cache, which would remember what an earlier pass put into it."""
    takes, device = signature(model.forward).parameters, compute_device(model)
    inputs = {name: value.to(device) for name, value in samples.inputs.items()}
    for name, value in inputs.items():
        if value.is_floating_point():
            inputs[name] = value.to(model.dtype)
    if "use_cache" in takes:
        more["use_cache"] = False
    with fast_products(model.dtype, device), _without_padding(model):
        return model(**inputs, **more)


@contextmanager
def _without_padding(model: PreTrainedModel) -> Iterator[None]:
    """Classifiers on decoders that know no padding token refuse more than one sample, as they could not tell
    where each ends. Samples are unpadded: no token is padding, then."""
    config = model.config.get_text_config()
    absent = getattr(config, "pad_token_id", None) is None
    if absent:
        config.pad_token_id = _NO_TOKEN
    try:
        yield
    finally:
        if absent:
            config.pad_token_id = None


def try_running(model: PreTrainedModel, example: Samples) -> None:
    """One pass. Raises: InputError if the model cannot be run at all, its configuration being impossible."""
    try:
        with torch.inference_mode():
            run_model(model, example)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # models raise errors of every kind
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = ", a model of several media (images, sound)," * reads_several_media(model.config)
        raise InputError(
            f"{type(model).__name__}{what} cannot be run on {' and '.join(example.inputs)} alone: {line}"
        ) from error


def reads_several_media(config: PretrainedConfig) -> bool:
    """Whether a model has a text decoder beside parts that read images or sound."""
    return config.get_text_config() is not config


def logits_of(output: Any) -> Tensor:
    """A model's logits, (rows, classes) in float32; of a bare encoder its last hidden states."""
    return outputs_of(output).float()


def outputs_of(output: Any) -> Tensor:
    """The same in the model's own type. Raises: InputError if there are none."""
    named = [getattr(output, name, None) for name in ("logits", "last_hidden_state")]
    found = next((value for value in named if isinstance(value, Tensor)), None)
    if found is None:
        raise InputError(f"{type(output).__name__} holds neither logits nor hidden states to compare")
    return found.reshape(-1, found.shape[-1])


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
