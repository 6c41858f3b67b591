"""Causal language models, which predict the next token. Of those that read images or sound besides text, the
text decoder is compressed with text, and the rest is kept as it is."""

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from lrsd.model.kinds.base import EvaluationItem, Kind, class_names
from lrsd.model.samples import Samples
from lrsd.model.types import Model, Tokenizer

_CLASSES = (
    class_names(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    | class_names(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    | class_names(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
)


class Causal(Kind):
    name = "causal language model"
    perplexity_protocol = (
        "token perplexity, non-overlapping windows, all tokens but the first of a window scored"
    )
    writes_calibration_text = True
    timed_by_token = True
    answers_tasks = True
    begins_with_bos = True

    def recognizes(self, model: Model) -> bool:
        return not model.config.is_encoder_decoder and type(model).__name__ in _CLASSES

    def samples_from_blocks(self, model: Model, tokenizer: Tokenizer, blocks_NT: Tensor) -> Samples:
        return Samples({"input_ids": blocks_NT})

    def items_from_blocks(
        self, model: Model, tokenizer: Tokenizer, blocks_NT: Tensor
    ) -> list[EvaluationItem]:
        rows = torch.arange(blocks_NT.shape[1] - 1)
        return [EvaluationItem(Samples({"input_ids": block[None]}), rows, block[1:]) for block in blocks_NT]
