"""Calibration samples and evaluation items: sources opened, texts cut into blocks of tokens."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lrsd.data.self_text import self_calibration
from lrsd.data.sources import _LONGEST_WORD, Content, read_content
from lrsd.errors import InputError
from lrsd.model.kinds.base import EvaluationItem
from lrsd.model.load import LoadedModel, panics
from lrsd.model.samples import Samples
from lrsd.model.types import Tokenizer
from lrsd.progress import Progress
from lrsd.settings import Calibration

# Characters tokenized at once, where there are line breaks to cut at.
_PIECE = 2**23


def calibration_samples(
    loaded: LoadedModel, identity: str, calibration: Calibration, progress: Progress
) -> Samples:
    """What the model's activations are measured on: sampled from the model itself, or made from a source.

    Args: identity: the model's fingerprint, by which text sampled from it is kept.
    Raises: InputError for a source that the model cannot be calibrated on.
    """
    kind, model = loaded.kind, loaded.model
    count, seqlen, source = calibration.samples, calibration.seqlen, calibration.calib
    if source == "self" and not kind.writes_calibration_text:
        raise InputError(f"{type(model).__name__} cannot write its own calibration text; give --calib FILE")
    require_context(loaded, seqlen)
    if source == "self":
        tokenizer = loaded.require_tokenizer()
        blocks = self_calibration(model, tokenizer, identity, calibration, progress)
        return kind.samples_from_blocks(model, tokenizer, blocks)
    content = read_content(source, kind, split="train", option="--calib")
    if isinstance(content, dict):
        return kind.samples_from_tensors(model, _rows(content, count), seqlen)
    tokenizer = loaded.require_tokenizer()
    if isinstance(content, list):
        return kind.samples_from_pairs(model, tokenizer, content, calibration)
    length = kind.block_length(seqlen)
    blocks = token_blocks(tokenizer, content, samples=count, seqlen=length, seed=calibration.seed)
    return kind.samples_from_blocks(model, tokenizer, blocks)


def evaluation_items(
    loaded: LoadedModel, content: Content, seqlen: int, windows: int | None
) -> list[EvaluationItem]:
    """What a model is evaluated on: the first `windows` non-overlapping windows of a text, pairs, or rows of
    tensors (all of them if None).

    content: opened as its kind reads it, see `read_content`.
    """
    kind, model = loaded.kind, loaded.model
    if isinstance(content, dict):
        return kind.items_from_tensors(model, _rows(content, windows), seqlen)
    tokenizer = loaded.require_tokenizer()
    if isinstance(content, list):
        return kind.items_from_pairs(model, tokenizer, content[:windows], seqlen)
    tokens = tokenize(tokenizer, content)
    blocks = evaluation_windows(tokens, kind.block_length(seqlen), windows)
    return kind.items_from_blocks(model, tokenizer, blocks)


def require_context(loaded: LoadedModel, seqlen: int) -> None:
    """Raises: InputError if the model has too few positions for `seqlen` tokens."""
    limit = loaded.context_length
    if limit is not None and seqlen > limit and loaded.kind.limited_by_context:
        raise InputError(f"the model reads at most {limit} tokens; lower --seqlen from {seqlen}")


def _rows(tensors: dict[str, Tensor], count: int | None) -> dict[str, Tensor]:
    return {name: tensor[:count] for name, tensor in tensors.items()}


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


def evaluation_windows(tokens: Tensor, seqlen: int, windows: int | None) -> Tensor:
    """The first `windows` non-overlapping windows of `seqlen` tokens (all whole ones if None).

    Raises: InputError if the text is shorter than that.
    """
    whole = tokens.numel() // seqlen
    wanted = windows if windows is not None else max(whole, 1)
    if whole < wanted:
        raise InputError(
            f"evaluation text has {tokens.numel()} tokens, {wanted} windows of {seqlen} need "
            f"{wanted * seqlen}; lower --windows or --seqlen"
        )
    return tokens[: wanted * seqlen].view(wanted, seqlen)


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
    """The text in pieces of bounded length, cut after line breaks; a short one as it is."""
    start = 0
    while start < len(text):
        stop = len(text)
        if stop - start > _PIECE:
            stop = text.rfind("\n", start, start + _PIECE) + 1 or start + _PIECE
        yield text[start:stop]
        start = stop
