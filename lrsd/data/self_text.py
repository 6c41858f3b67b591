"""Calibration text sampled from the model itself."""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lrsd.errors import StorageError
from lrsd.model.cache import cached_pass
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
    path = _cache_directory() / f"self-{fingerprint}-{seed}-{size}.safetensors"
    if (kept := _kept_tokens(path, (samples, seqlen), len(tokenizer))) is not None:
        progress.note(f"calibration text from {path}")
        return kept
    generator = torch.Generator().manual_seed(seed)
    progress.stage("sample calibration text", samples)
    special = set(tokenizer.all_special_ids)
    usable = torch.tensor([token for token in range(len(tokenizer)) if token not in special])
    first = usable[torch.randint(usable.numel(), (samples, 1), generator=generator)]
    if bos is not None:
        first = torch.cat([torch.full_like(first, bos), first], 1)
    parts = []
    for start in first.split(_SAMPLE_BATCH):
        parts.append(_sample(model, start, seqlen, sorted(special), generator))
        for _ in start:
            progress.step("")
    tokens = torch.cat(parts)
    try:
        with refusals(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, {"tokens": tokens})
    except StorageError as error:
        progress.note(f"the calibration text is not kept for other runs: {error}")
    return tokens


def _kept_tokens(path: Path, size: tuple[int, int], vocabulary: int) -> Tensor | None:
    """Text that an earlier run sampled; None if there is none, or it is damaged."""
    try:
        tokens = load_file(path)["tokens"]
    except (OSError, SafetensorError, KeyError):
        return None
    sound = tokens.dtype == torch.int64 and tokens.shape == size
    return tokens if sound and int(tokens.min()) >= 0 and int(tokens.max()) < vocabulary else None


def _sample(
    model: Model, start: Tensor, length: int, banned: list[int], generator: torch.Generator
) -> Tensor:
    """Continue each row of `start` (batch, tokens) to `length` tokens, never with a special token."""
    tokens = [start]
    cache = None
    for position in range(length - start.shape[1]):
        logits, cache = cached_pass(model, tokens[-1], cache)
        logits = logits[:, -1].float().cpu()
        logits[:, banned] = -torch.inf
        if position < _GREEDY_TOKENS:
            chosen = logits.argmax(-1, keepdim=True)
        else:
            chosen = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        tokens.append(chosen)
    return torch.cat(tokens, 1)


def _cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lrsd"
