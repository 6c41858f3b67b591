"""Interface of a kind of model: how it is recognized, and what it is calibrated and evaluated on."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from lrsd.model.samples import Samples
from lrsd.model.types import Model, Tokenizer
from lrsd.settings import Calibration

# Tokens of the input that a model is traced with.
_EXAMPLE_TOKENS = 8


@dataclass(frozen=True)
class EvaluationItem:
    """One sample, and the rows of its logits that have a right token; none where no tokens are predicted.

    rows, labels: (scored tokens,) int64.
    """

    samples: Samples
    rows: Tensor
    labels: Tensor


class Kind(ABC):
    """One kind of model. A new one is a file beside this one, and a line of `KINDS`.

    It reads text, which comes as blocks of tokens; or, of `tensors`, safetensors files only. The methods of
    formats that it does not read are never called.

    name: as error messages say it. tensors: names and axes of what it reads from a safetensors file, the
    first axis being that of the samples. reads_pairs: whether a JSONL file of pairs of texts is read as
    such. perplexity_protocol: how perplexity is taken; None if it predicts no tokens.
    writes_calibration_text: whether text to calibrate on can be sampled from it. timed_by_token: whether its
    speed is that of reading a prompt and of generating token by token. answers_tasks: whether lm-eval's tasks
    can be put to it. limited_by_context: whether seqlen
    must not exceed its positions. begins_with_bos: whether its calibration samples begin with BOS where its
    tokenizer begins texts so.
    """

    name: str
    tensors: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    reads_pairs: bool = False
    perplexity_protocol: str | None = None
    writes_calibration_text: bool = False
    timed_by_token: bool = False
    answers_tasks: bool = False
    limited_by_context: bool = True
    begins_with_bos: bool = False

    @abstractmethod
    def recognizes(self, model: Model) -> bool:
        """Whether a model that no kind before it in `KINDS` recognizes is of this kind."""

    @property
    def reads(self) -> str:
        """What to evaluate it on, in words."""
        return f"a safetensors file of {' and '.join(self.tensors)}" if self.tensors else "text"

    def needs_tokenizer(self, model: Model) -> bool:
        """Whether it cannot be loaded without one: what reads features of sound may come without."""
        return model.main_input_name != "input_features"

    def is_classifier(self, model: Model) -> bool:
        """Whether it assigns one of its configuration's labels to a text."""
        return False

    def example(self, model: Model) -> Samples:
        """A smallest input, to trace the model with."""
        return Samples({"input_ids": example_tokens()})

    def block_length(self, seqlen: int) -> int:
        """Tokens of the blocks that samples of `seqlen` tokens are made from."""
        return seqlen

    def samples_from_blocks(self, model: Model, tokenizer: Tokenizer, blocks_NT: Tensor) -> Samples:
        """Calibration samples, one per block of `block_length` tokens of a text."""
        raise NotImplementedError(f"a {self.name} reads no text")

    def items_from_blocks(
        self, model: Model, tokenizer: Tokenizer, blocks_NT: Tensor
    ) -> list[EvaluationItem]:
        """Evaluation items, one per block of `block_length` tokens of a text."""
        return unlabelled(self.samples_from_blocks(model, tokenizer, blocks_NT))

    def samples_from_pairs(
        self,
        model: Model,
        tokenizer: Tokenizer,
        pairs: list[tuple[str, str]],
        calibration: Calibration,
    ) -> Samples:
        """At most `calibration.samples` calibration samples from pairs of source and target text.

        Raises: InputError if there are too few pairs.
        """
        raise NotImplementedError(f"a {self.name} reads no pairs")

    def items_from_pairs(
        self, model: Model, tokenizer: Tokenizer, pairs: list[tuple[str, str]], seqlen: int
    ) -> list[EvaluationItem]:
        """Evaluation items, one per pair of source and target text, both cut to `seqlen` tokens."""
        raise NotImplementedError(f"a {self.name} reads no pairs")

    def samples_from_tensors(self, model: Model, tensors: Mapping[str, Tensor], seqlen: int) -> Samples:
        """Calibration samples, one per row of the tensors, with `seqlen` tokens where it reads tokens too."""
        raise NotImplementedError(f"a {self.name} reads no safetensors file")

    def items_from_tensors(
        self, model: Model, tensors: Mapping[str, Tensor], seqlen: int
    ) -> list[EvaluationItem]:
        """Evaluation items, one per row of the tensors."""
        return unlabelled(self.samples_from_tensors(model, tensors, seqlen))


def example_tokens() -> Tensor:
    """Token ids (2, T): two samples, since some heads take one at a time."""
    return torch.zeros(2, _EXAMPLE_TOKENS, dtype=torch.int64)


def unlabelled(samples: Samples) -> list[EvaluationItem]:
    """Items without right tokens, to compare two models on."""
    none = torch.zeros(0, dtype=torch.int64)
    return [EvaluationItem(sample, none, none) for sample in samples.split(1)]


def with_special_tokens(tokenizer: Tokenizer, blocks_NT: Tensor) -> Tensor:
    """Blocks whose first and last token are those an encoder expects there, where its tokenizer has such."""
    blocks_NT = blocks_NT.clone()
    for place, token in ((0, tokenizer.cls_token_id), (-1, tokenizer.sep_token_id)):
        if token is not None:
            blocks_NT[:, place] = token
    return blocks_NT


def shifted_right(model: Model, targets_NT: Tensor) -> Tensor:
    """What a decoder reads to predict `targets_NT`: a start token and all but the last of them."""
    first = getattr(model.config, "decoder_start_token_id", None)
    first = model.config.bos_token_id if first is None else first
    start = torch.full((len(targets_NT), 1), 0 if first is None else first)
    return torch.cat([start, targets_NT[:, :-1]], 1)


def class_names(mapping: Mapping[str, str | tuple[str, ...]]) -> set[str]:
    """The class names of one of transformers' mappings from model types."""
    return {name for names in mapping.values() for name in ([names] if isinstance(names, str) else names)}
