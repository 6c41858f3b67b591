"""Encoders that predict no tokens: classifiers, bare encoders, anything else over token ids."""

from torch import Tensor

from lrsd.model.kinds.base import Kind, with_special_tokens
from lrsd.model.samples import Samples, has_logits
from lrsd.model.types import Model, Tokenizer


class Encoder(Kind):
    name = "encoder"

    def recognizes(self, model: Model) -> bool:
        return True

    def is_classifier(self, model: Model) -> bool:
        return has_logits(model)

    def samples_from_blocks(self, model: Model, tokenizer: Tokenizer, blocks_NT: Tensor) -> Samples:
        return Samples({"input_ids": with_special_tokens(tokenizer, blocks_NT)})
