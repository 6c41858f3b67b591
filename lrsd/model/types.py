"""transformers' types under names that other rooms use, which import nothing of transformers themselves."""

from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = ["Model", "Tokenizer"]
