"""Causal language models, which predict the next token."""

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lrsd.model.kinds.base import EvaluationItem, Kind, class_names
from lrsd.model.samples import Samples
from lrsd.model.types import Model, Tokenizer


class Causal(Kind):
    name = "causal language model"
    perplexity_protocol = (
        "token perplexity, non-overlapping windows, all tokens but the first of a window scored"
    )
    writes_calibration_text = True
    timed_by_token = True
    begins_with_bos = True

    def recognizes(self, model: Model) -> bool:
        known = class_names(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        return not model.config.is_encoder_decoder and type(model).__name__ in known

    def samples_from_blocks(self, model: Model, tokenizer: Tokenizer, blocks_NT: Tensor) -> Samples:
        return Samples({"input_ids": blocks_NT})

    def items_from_blocks(
        self, model: Model, tokenizer: Tokenizer, blocks_NT: Tensor
    ) -> list[EvaluationItem]:
        rows = torch.arange(blocks_NT.shape[1] - 1)
        return [EvaluationItem(Samples({"input_ids": block[None]}), rows, block[1:]) for block in blocks_NT]
