"""Speech models: encoder-decoders from features of sound to text."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from lrsd.model.kinds.base import Kind, example_tokens, shifted_right
from lrsd.model.samples import Samples
from lrsd.model.types import Model
from lrsd.work.onloading import compute_device

# Tokens of a transcript at least: as many as a calibration sample has.
_LEAST_TOKENS = 8


class Speech(Kind):
    """The targets are the model's own transcripts, decoded greedily."""

    name = "speech model"
    tensors = MappingProxyType({"input_features": ("samples", "channels", "frames")})
    limited_by_context = False  # that of the transcripts, which are cut to it

    def recognizes(self, model: Model) -> bool:
        return model.config.is_encoder_decoder and model.main_input_name == "input_features"

    def example(self, model: Model) -> Samples:
        frames = 2 * model.config.max_source_positions  # the front end halves them
        features = torch.zeros(2, model.config.num_mel_bins, frames)
        return Samples({"input_features": features, "decoder_input_ids": example_tokens()})

    def samples_from_tensors(self, model: Model, tensors: Mapping[str, Tensor], seqlen: int) -> Samples:
        features = tensors["input_features"].float()
        length = min(max(_LEAST_TOKENS, seqlen), model.config.max_target_positions - 1)
        targets = model.generate(  # type: ignore[operator]
            features.to(compute_device(model), model.dtype), max_new_tokens=length, min_new_tokens=length,
            do_sample=False,
        )  # fmt: skip
        read = shifted_right(model, targets[:, :length].cpu())
        return Samples({"input_features": features, "decoder_input_ids": read})
