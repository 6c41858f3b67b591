"""Calibration samples and evaluation items: sources opened, texts cut into blocks of tokens."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lrsd.data.self_text import self_calibration
from lrsd.data.sources import _LONGEST_WORD, Content, read_content
from lrsd.errors import InputError
from lrsd.model.embedding import embedding_rows
from lrsd.model.kinds.base import EvaluationItem
from lrsd.model.load import LoadedModel, panics
from lrsd.model.samples import Samples
from lrsd.model.types import Tokenizer
from lrsd.progress import Progress
from lrsd.settings import Calibration

# Characters tokenized at once, where there are line breaks to cut at.
_PIECE = 2**23
# What a tokenizer is asked to begin with its BOS, if it does.
_WORD = "x"


def calibration_samples(
    loaded: LoadedModel, identity: str, calibration: Calibration, progress: Progress
) -> Samples:
    """What the model's activations are measured on: sampled from the model itself, or made from a source; or
    a mixture of texts in equal shares, see `interleaved`.

    Args: identity: the model's fingerprint, by which text sampled from it is kept.
    Raises: InputError for a source that the model cannot be calibrated on.
    """
    samples = _samples(loaded, identity, calibration, progress)
    _require_known(loaded, samples)
    return samples


def _samples(loaded: LoadedModel, identity: str, calibration: Calibration, progress: Progress) -> Samples:
    kind, model, shares = loaded.kind, loaded.model, calibration.shares
    if "self" in shares and not kind.writes_calibration_text:
        raise InputError(f"{type(model).__name__} cannot write its own calibration text; give --calib FILE")
    require_context(loaded, calibration.seqlen)
    if len(shares) > 1 and kind.tensors:
        raise InputError(
            f"--calib: a {kind.name} reads one safetensors file, got {len(shares)} sources; give one"
        )
    contents = {
        source: read_content(source, kind, split="train", option="--calib", tokenizer=loaded.tokenizer)
        for source in shares
        if source != "self"
    }
    for source, content in contents.items():
        if isinstance(content, dict):
            return kind.samples_from_tensors(model, _rows(content, calibration.samples), calibration.seqlen)
        if isinstance(content, list):
            if len(shares) > 1:
                raise InputError(
                    f"--calib: {source} holds pairs of texts, of which no mixture is made; give it alone"
                )
            return kind.samples_from_pairs(model, loaded.require_tokenizer(), content, calibration)
    blocks = [
        _blocks(loaded, identity, source, contents.get(source), share, calibration, progress)
        for source, share in shares.items()
    ]
    if len(shares) > 1:
        parts = (f"{len(found)} samples of {name}" for name, found in zip(shares, blocks, strict=True))
        progress.note(f"calibration text: {', '.join(parts)}")
    return kind.samples_from_blocks(model, loaded.require_tokenizer(), interleaved(blocks))


def _require_known(loaded: LoadedModel, samples: Samples) -> None:
    """Raises: InputError for a token that the model's embedding has no row for."""
    rows = embedding_rows(loaded.model)
    largest = max((int(ids.max()) for ids in samples.token_ids), default=0)
    if largest >= rows:
        raise InputError(
            f"the tokenizer makes token {largest}, the model's embedding has {rows} rows; give the model its "
            "own tokenizer, or resize its embedding to the one it has (resize_token_embeddings)"
        )


def interleaved(parts: list[Tensor]) -> Tensor:
    """The rows of all parts, those of each in their order and spread over the whole; the last rows are one of
    each part, and where the parts are equally long every so many rows in a row are."""
    places = [
        ((row + 1) / len(part), number, row) for number, part in enumerate(parts) for row in range(len(part))
    ]
    return torch.stack([parts[number][row] for _, number, row in sorted(places)])


def _blocks(
    loaded: LoadedModel,
    identity: str,
    source: str,
    content: Content | None,
    share: int,
    calibration: Calibration,
    progress: Progress,
) -> Tensor:
    """A source's share of the samples, or as many as there are; (samples, tokens) int64.

    content: its text; None for what the model writes itself.
    """
    kind, tokenizer = loaded.kind, loaded.require_tokenizer()
    bos = beginning_token(tokenizer) if kind.begins_with_bos else None
    if content is None:
        return self_calibration(
            loaded.model, tokenizer, identity, bos, progress,
            samples=share, seqlen=calibration.seqlen, seed=calibration.seed,
        )  # fmt: skip
    assert isinstance(content, str)
    length = kind.block_length(calibration.seqlen) - (bos is not None)
    blocks = token_blocks(tokenizer, content, samples=share, seqlen=length, seed=calibration.seed)
    if len(blocks) == 1 and len(calibration.shares) == 1:
        raise InputError(
            f"calibration text {source} has tokens for one sample of {length}; a second one is needed to "
            "be held out of the fit: give a longer text or a smaller --seqlen"
        )
    if len(blocks) < share:
        progress.note(
            f"calibration text {source} has {len(blocks)} samples of {length} tokens that do not overlap, "
            f"{share} were asked for; a longer text or a smaller --seqlen gives more"
        )
    return blocks if bos is None else torch.cat([torch.full((len(blocks), 1), bos), blocks], 1)


def evaluation_items(
    loaded: LoadedModel, content: Content, seqlen: int, windows: int | None
) -> list[EvaluationItem]:
    """What a model is evaluated on: the first `windows` non-overlapping windows of a text, pairs, or rows of
    tensors (all of them if None).

    content: opened as its kind reads it, see `read_content`.
    Raises: InputError for a text that is too short, or has tokens that the model does not know.
    """
    items = _items(loaded, content, seqlen, windows)
    for item in items:
        _require_known(loaded, item.samples)
    return items


def _items(loaded: LoadedModel, content: Content, seqlen: int, windows: int | None) -> list[EvaluationItem]:
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
    """Blocks of `seqlen` tokens of the text in random order, no two of which share a token: `samples` of
    them, or all that there are if these are fewer; (blocks, seqlen) int64.

    Raises: InputError if the text has fewer than `seqlen` tokens.
    """
    tokens = tokenize(tokenizer, text)
    whole = tokens.numel() // seqlen
    if whole == 0:
        raise InputError(
            f"calibration text has {tokens.numel()} tokens, one sample needs {seqlen}; "
            "give a longer text or a smaller --seqlen"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(whole, generator=generator)[:samples]
    return tokens[: whole * seqlen].view(whole, seqlen)[chosen]


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
            raise InputError(
                f"expected words, the text has {longest:,} characters without a space or line break, at most "
                f"{_LONGEST_WORD:,} are read; leave out encoded data, and break long lines"
            )
        tokens.append(_token_ids(tokenizer, piece, special=False))
    return torch.cat([*tokens, torch.zeros(0, dtype=torch.int64)])


def beginning_token(tokenizer: Tokenizer) -> int | None:
    """The token (BOS) that a tokenizer by itself begins every text with, as Llama's and Gemma's do; None if
    it begins with the text's first word, as SmolLM2's, GPT-2's and Qwen's do, whether it has a BOS or not.

    Raises: InputError.
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        return None
    ids = _token_ids(tokenizer, _WORD, special=True)
    return bos if ids[:1].tolist() == [bos] else None


def _token_ids(tokenizer: Tokenizer, text: str, *, special: bool) -> Tensor:
    try:
        with panics():
            ids = tokenizer(
                text, add_special_tokens=special, return_attention_mask=False, verbose=False
            ).input_ids
        return torch.tensor(ids, dtype=torch.int64)
    except Exception as error:  # tokenizer back ends raise errors of every kind
        raise InputError(f"the tokenizer cannot read the text: {error}") from error


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of bounded length, cut after line breaks; a short one as it is."""
    start = 0
    while start < len(text):
        stop = len(text)
        if stop - start > _PIECE:
            stop = text.rfind("\n", start, start + _PIECE) + 1 or start + _PIECE
        yield text[start:stop]
        start = stop
