"""Model inputs to calibrate and evaluate on, from text, pairs of texts, or features of sound."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lrsd.data.self_text import self_calibration
from lrsd.data.sources import _LONGEST_WORD, read_features, read_pairs, read_text
from lrsd.errors import InputError
from lrsd.model.load import LoadedModel, panics
from lrsd.model.samples import Samples
from lrsd.model.types import Model, Tokenizer
from lrsd.progress import Progress
from lrsd.settings import Calibration

# Characters tokenized at once, where there are line breaks to cut at.
_PIECE = 2**23
_EXAMPLE_TOKENS = 8


def calibration_samples(
    loaded: LoadedModel, identity: str, calibration: Calibration, progress: Progress
) -> Samples:
    """What the model's activations are measured on: sampled from the model itself, or cut from a text.

    A model of two stacks reads a block of the text and writes what follows it, or reads pairs, see
    `read_pairs`; one that hears reads the `input_features` of a safetensors file, and answers by itself.
    """
    if calibration.calib == "self" and loaded.kind != "causal":
        raise InputError(
            f"{type(loaded.model).__name__} cannot write its own calibration text; give --calib FILE"
        )
    limit = loaded.context_length
    if limit is not None and calibration.seqlen > limit and loaded.kind != "speech":
        raise InputError(f"the model reads at most {limit} tokens; lower --seqlen from {calibration.seqlen}")
    if calibration.calib == "self":
        tokens = self_calibration(loaded.model, loaded.require_tokenizer(), identity, calibration, progress)
        return Samples({"input_ids": tokens})
    if loaded.kind == "speech":
        return speech_samples(loaded.model, calibration)
    tokenizer = loaded.require_tokenizer()
    count, seqlen, seed = calibration.samples, calibration.seqlen, calibration.seed
    if loaded.kind == "seq2seq" and (pairs := read_pairs(calibration.calib)):
        return packed_pairs(loaded, pairs, calibration)
    text = read_text(calibration.calib, split="train", option="--calib")
    if loaded.kind == "seq2seq":
        blocks = token_blocks(tokenizer, text, samples=count, seqlen=2 * seqlen, seed=seed)
        return paired(loaded.model, blocks)
    blocks = token_blocks(tokenizer, text, samples=count, seqlen=seqlen, seed=seed)
    return Samples({"input_ids": blocks if loaded.kind == "causal" else enclosed(tokenizer, blocks)})


def example(loaded: LoadedModel) -> Samples:
    """A smallest input, to trace the model with."""
    model = loaded.model
    tokens = torch.zeros(2, _EXAMPLE_TOKENS, dtype=torch.int64)  # two, since some heads take one at a time
    if loaded.kind == "speech":
        config = model.config
        frames = 2 * config.max_source_positions  # the front end halves them
        features = torch.zeros(2, config.num_mel_bins, frames)
        return Samples({"input_features": features, "decoder_input_ids": tokens})
    if loaded.kind == "seq2seq":
        return Samples({"input_ids": tokens, "decoder_input_ids": tokens})
    return Samples({"input_ids": tokens})


def paired(model: Model, blocks: Tensor) -> Samples:
    """Blocks of tokens (N, 2 T) as sources (N, T) and the targets that follow them, behind a start token."""
    half = blocks.shape[1] // 2
    targets = behind_start(model, blocks[:, half:])
    return Samples({"input_ids": blocks[:, :half], "decoder_input_ids": targets})


def behind_start(model: Model, targets: Tensor) -> Tensor:
    """What a decoder reads to write `targets` (N, T): a start token and all but the last of them."""
    first = getattr(model.config, "decoder_start_token_id", None)
    first = model.config.bos_token_id if first is None else first
    return torch.cat([torch.full((len(targets), 1), 0 if first is None else first), targets[:, :-1]], 1)


def packed_pairs(loaded: LoadedModel, pairs: list[tuple[str, str]], calibration: Calibration) -> Samples:
    """Pairs one after the other, in samples of `seqlen` source tokens and as many target tokens as go with
    them on average: samples are unpadded, so that a sample's ends need not meet.

    Raises: InputError if there are fewer tokens than two samples have.
    """
    tokenizer, model = loaded.require_tokenizer(), loaded.model
    sources, targets = (
        torch.cat([torch.tensor(tokenizer(pair[side]).input_ids) for pair in pairs]) for side in (0, 1)
    )
    seqlen = calibration.seqlen
    written = max(2, seqlen * len(targets) // len(sources))
    count = min(calibration.samples, len(sources) // seqlen, len(targets) // written)
    if count < 2:
        raise InputError(
            f"--calib: {calibration.calib} has {len(sources)} source and {len(targets)} target tokens; two "
            f"samples need {2 * seqlen} and {2 * written}; give more pairs or a smaller --seqlen"
        )
    return Samples({
        "input_ids": sources[: count * seqlen].view(count, seqlen),
        "decoder_input_ids": behind_start(model, targets[: count * written].view(count, written)),
    })  # fmt: skip


def enclosed(tokenizer: Tokenizer, blocks: Tensor) -> Tensor:
    """Blocks whose first and last token are those an encoder expects there, where its tokenizer has such."""
    enclosed = blocks.clone()
    for place, token in ((0, tokenizer.cls_token_id), (-1, tokenizer.sep_token_id)):
        if token is not None:
            enclosed[:, place] = token
    return enclosed


def speech_samples(model: Model, calibration: Calibration) -> Samples:
    """Features of sound from a safetensors file, and what the model itself hears in them.

    Raises: InputError if the file holds no `input_features` (N, channels, frames).
    """
    features = read_features(calibration.calib, "--calib")[: calibration.samples]
    length = min(calibration.seqlen, model.config.max_target_positions - 1)
    targets = model.generate(  # type: ignore[operator]
        features.to(model.device, model.dtype), max_new_tokens=length, min_new_tokens=length, do_sample=False
    )
    read = behind_start(model, targets[:, :length].cpu())
    return Samples({"input_features": features, "decoder_input_ids": read})


def token_blocks(tokenizer: Tokenizer, text: str, *, samples: int, seqlen: int, seed: int) -> Tensor:
    """`samples` blocks of `seqlen` tokens at random offsets of the text; (samples, seqlen) int64.

    Raises: InputError if the text has fewer than `seqlen` tokens.
    """
    tokens = tokenize(tokenizer, text)
    if tokens.numel() < seqlen:
        raise InputError(
            f"calibration text has {tokens.numel()} tokens, one sample needs {seqlen}; "
            "give a longer text or a smaller --seqlen"
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(tokens.numel() - seqlen + 1, (samples,), generator=generator)
    return torch.stack([tokens[start : start + seqlen] for start in starts.tolist()])


def tokenize(tokenizer: Tokenizer, text: str) -> Tensor:
    """The whole text as one row of token ids, without special tokens; int64.

    Raises: InputError for a text that the tokenizer cannot read, or ids that it should not give.
    """
    tokens = []
    for piece in _pieces(text):
        longest = max(map(len, piece.split()), default=0)
        if longest > _LONGEST_WORD:
            raise InputError(f"a text with {longest:,} characters without a space or line break is no text")
        try:
            with panics():
                ids = tokenizer(
                    piece, add_special_tokens=False, return_attention_mask=False, verbose=False
                ).input_ids
            tokens.append(torch.tensor(ids, dtype=torch.int64))
        except Exception as error:  # tokenizer back ends raise errors of every kind
            raise InputError(f"the tokenizer cannot read the text: {error}") from error
    return torch.cat([*tokens, torch.zeros(0, dtype=torch.int64)])


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of bounded length, cut behind line breaks; a short one as it is."""
    start = 0
    while start < len(text):
        stop = len(text)
        if stop - start > _PIECE:
            stop = text.rfind("\n", start, start + _PIECE) + 1 or start + _PIECE
        yield text[start:stop]
        start = stop
