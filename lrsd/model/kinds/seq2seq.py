"""Encoder-decoders over text, which predict a target from a source."""

import torch
from torch import Tensor

from lrsd.errors import InputError
from lrsd.model.kinds.base import EvaluationItem, Kind, example_tokens, shifted_right
from lrsd.model.samples import Samples
from lrsd.model.types import Model, Tokenizer
from lrsd.settings import Calibration


class Seq2Seq(Kind):
    """Of a text the source is a block of `seqlen` tokens, and the target the block that follows it."""

    name = "sequence-to-sequence model"
    reads_pairs = True
    answers_tasks = True
    perplexity_protocol = (
        "token perplexity of targets given their sources, or of what follows a window given that"
    )

    def recognizes(self, model: Model) -> bool:
        return model.config.is_encoder_decoder and model.main_input_name != "input_features"

    def example(self, model: Model) -> Samples:
        return Samples({"input_ids": example_tokens(), "decoder_input_ids": example_tokens()})

    def block_length(self, seqlen: int) -> int:
        return 2 * seqlen

    def samples_from_blocks(self, model: Model, tokenizer: Tokenizer, blocks_NT: Tensor) -> Samples:
        sources, targets = _halves(blocks_NT)
        return Samples({"input_ids": sources, "decoder_input_ids": shifted_right(model, targets)})

    def items_from_blocks(
        self, model: Model, tokenizer: Tokenizer, blocks_NT: Tensor
    ) -> list[EvaluationItem]:
        samples = self.samples_from_blocks(model, tokenizer, blocks_NT).split(1)
        _, targets = _halves(blocks_NT)
        rows = torch.arange(targets.shape[1])
        return [EvaluationItem(s, rows, target) for s, target in zip(samples, targets, strict=True)]

    def samples_from_pairs(
        self,
        model: Model,
        tokenizer: Tokenizer,
        pairs: list[tuple[str, str]],
        calibration: Calibration,
    ) -> Samples:
        """Pairs one after the other, in samples of `seqlen` source tokens and as many target tokens as go
        with them on average: samples are unpadded, so that a sample's ends need not meet.

        Raises: InputError if there are fewer tokens than two samples have.
        """
        sources, targets = (
            torch.cat([torch.tensor(tokenizer(pair[side]).input_ids) for pair in pairs]) for side in (0, 1)
        )
        seqlen = calibration.seqlen
        written = max(2, seqlen * len(targets) // len(sources))
        count = min(calibration.samples, len(sources) // seqlen, len(targets) // written)
        if count < 2:
            raise InputError(
                f"--calib: {calibration.calib} has {len(sources)} source and {len(targets)} target tokens; "
                f"two samples need {2 * seqlen} and {2 * written}; give more pairs or a smaller --seqlen"
            )
        return Samples({
            "input_ids": sources[: count * seqlen].view(count, seqlen),
            "decoder_input_ids": shifted_right(model, targets[: count * written].view(count, written)),
        })  # fmt: skip

    def items_from_pairs(
        self, model: Model, tokenizer: Tokenizer, pairs: list[tuple[str, str]], seqlen: int
    ) -> list[EvaluationItem]:
        items = []
        for pair in pairs:
            source, target = (torch.tensor([tokenizer(text).input_ids[:seqlen]]) for text in pair)
            inputs = {"input_ids": source, "decoder_input_ids": shifted_right(model, target)}
            items.append(EvaluationItem(Samples(inputs), torch.arange(target.shape[1]), target[0]))
        return items


def _halves(blocks_NT: Tensor) -> tuple[Tensor, Tensor]:
    half = blocks_NT.shape[1] // 2
    return blocks_NT[:, :half], blocks_NT[:, half:]
