"""Masked language models, which predict the tokens that a mask hides."""

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from lrsd.errors import InputError
from lrsd.model.kinds.base import EvaluationItem, Kind, class_names, with_special_tokens
from lrsd.model.samples import Samples
from lrsd.model.types import Model, Tokenizer

# Share of a window's tokens that are masked, and tokens of a window at least.
_MASKED, _LEAST_TOKENS = 0.15, 8


class Masked(Kind):
    name = "masked language model"
    perplexity_protocol = (
        "masked-token perplexity, non-overlapping windows, 15 % of the tokens masked at once"
    )

    def recognizes(self, model: Model) -> bool:
        known = class_names(MODEL_FOR_MASKED_LM_MAPPING_NAMES)  # BART's encoder-decoders among them
        return not model.config.is_encoder_decoder and type(model).__name__ in known

    def samples_from_blocks(self, model: Model, tokenizer: Tokenizer, blocks_NT: Tensor) -> Samples:
        return Samples({"input_ids": with_special_tokens(tokenizer, blocks_NT)})

    def items_from_blocks(
        self, model: Model, tokenizer: Tokenizer, blocks_NT: Tensor
    ) -> list[EvaluationItem]:
        blocks = with_special_tokens(tokenizer, blocks_NT)
        return [self._masked(tokenizer, block, index) for index, block in enumerate(blocks)]

    def _masked(self, tokenizer: Tokenizer, block: Tensor, seed: int) -> EvaluationItem:
        """A window with 15 % of its tokens masked, the same ones in every evaluation."""
        if tokenizer.mask_token_id is None:
            raise InputError(f"the tokenizer has no mask token; a {self.name} needs one")
        if len(block) < _LEAST_TOKENS:
            raise InputError(f"a {self.name} needs windows of {_LEAST_TOKENS} tokens; raise --seqlen")
        order = torch.randperm(len(block) - 2, generator=torch.Generator().manual_seed(seed))
        rows = (1 + order[: max(1, int(_MASKED * len(block)))]).sort().values
        hidden = block.clone()
        hidden[rows] = tokenizer.mask_token_id
        return EvaluationItem(Samples({"input_ids": hidden[None]}), rows, block[rows])
