"""Calibration text sampled from the model itself."""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lrsd.errors import StorageError
from lrsd.model.cache import cached_pass
from lrsd.model.embedding import embedding_rows
from lrsd.model.types import Model, Tokenizer
from lrsd.progress import Progress
from lrsd.work.files import refusals, write_tensors

# Samples generated side by side, and greedy tokens at the start of each.
_SAMPLE_BATCH = 32


_GREEDY_TOKENS = 4


def self_calibration(
    model: Model,
    tokenizer: Tokenizer,
    fingerprint: str,
    bos: int | None,
    progress: Progress,
    *,
    samples: int,
    seqlen: int,
    seed: int,
) -> Tensor:
    """Text sampled from the model itself, (samples, seqlen) int64; needs no data.

    Each sample starts from its own random token, after `bos` where there is one, goes on greedily for a few
    tokens to find a subject, then is drawn from the model's distribution at temperature 1. Kept in the user's
    cache directory by model fingerprint, seed and size. Source: LLM-QAT (ACL Findings 2024), section 2.1.
    """
    size = f"{samples}x{seqlen}" + ("" if bos is None else f"-bos{bos}")
    name, cache = f"self-{fingerprint}-{seed}-{size}.safetensors", _cache_directory()
    path = None if cache is None else cache / name
    rows = embedding_rows(model)
    usable = _ordinary_tokens(tokenizer, rows)
    if path is not None and (kept := _kept_tokens(path, (samples, seqlen), usable, bos)) is not None:
        progress.note(f"calibration text from {path}")
        return kept
    generator = torch.Generator().manual_seed(seed)
    progress.stage("sample calibration text", samples)
    first = usable[torch.randint(usable.numel(), (samples, 1), generator=generator)]
    if bos is not None:
        first = torch.cat([torch.full_like(first, bos), first], 1)
    parts = []
    for start in first.split(_SAMPLE_BATCH):
        parts.append(_sample(model, start, seqlen, usable, generator))
        for _ in start:
            progress.step("")
    tokens = torch.cat(parts)
    try:
        if path is None:
            raise StorageError("there is no home directory; XDG_CACHE_HOME names another place")
        with refusals(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, {"tokens": tokens})
    except StorageError as error:
        progress.note(f"the calibration text is not kept for other runs: {error}")
    return tokens


def _ordinary_tokens(tokenizer: Tokenizer, rows: int) -> Tensor:
    """Ids of the tokenizer's tokens, but special ones, that the embedding has a row for. Embeddings are often
    padded to more rows than there are tokens, and ids need not follow one another."""
    ids = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
    return torch.tensor(sorted(token for token in ids if token < rows))


def _kept_tokens(path: Path, size: tuple[int, int], usable: Tensor, bos: int | None) -> Tensor | None:
    """Text that an earlier run sampled; None if there is none, or it is damaged."""
    try:
        tokens = load_file(path)["tokens"]
    except (OSError, SafetensorError, KeyError):
        return None
    known = usable if bos is None else torch.cat([usable, torch.tensor([bos])])
    sound = tokens.dtype == torch.int64 and tokens.shape == size and bool(torch.isin(tokens, known).all())
    return tokens if sound else None


def _sample(model: Model, start: Tensor, length: int, usable: Tensor, generator: torch.Generator) -> Tensor:
    """Continue each row of `start` (batch, tokens) to `length` tokens, all of them usable ones."""
    tokens = [start]
    cache = None
    for position in range(length - start.shape[1]):
        logits, cache = cached_pass(model, tokens[-1], cache)
        logits = logits[:, -1].float().cpu()
        banned = torch.ones(logits.shape[1], dtype=torch.bool).index_fill_(0, usable, False)
        logits[:, banned] = -torch.inf
        if position < _GREEDY_TOKENS:
            chosen = logits.argmax(-1, keepdim=True)
        else:
            chosen = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        tokens.append(chosen)
    return torch.cat(tokens, 1)


def _cache_directory() -> Path | None:
    """The user's; None of one without a home, as in containers."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lrsd"
    except RuntimeError:
        return None
