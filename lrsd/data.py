"""Token blocks to calibrate and evaluate on."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrsd.config import CalibrationSettings
from lrsd.errors import InputError
from lrsd.progress import Progress

# Hub data sets by short name: path, configuration, and the column that holds the text.
_KNOWN = {
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", "text"),
    "c4": ("allenai/c4", "en", "text"),
}
# Documents streamed from a hub data set at most: enough for millions of tokens of any of them.
_MAX_DOCUMENTS = 20_000
# Samples generated side by side, and greedy tokens at the start of each.
_SAMPLE_BATCH = 32
_GREEDY_TOKENS = 4


def read_text(source: str, *, split: str, option: str) -> str:
    """The text of a local file, or of a hub data set, its rows joined by blank lines as published.

    Args: source: path of a .txt/.raw/.jsonl file, "wikitext", "c4", or a hub data set id;
        option: the command-line option to name in errors.
    Raises: InputError if there is no such file or the data set cannot be reached.
    """
    path = Path(source)
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        raise InputError(f"{option}: expected a text or JSONL file, {source} is a directory")
    if source not in _KNOWN and ("/" not in source or path.suffix in {".txt", ".jsonl", ".raw"}):
        raise InputError(
            f"{option}: no file {source!r} and no data set of that name; "
            f"give a text or JSONL file, {', '.join(_KNOWN)}, or a hub id like owner/name"
        )
    return _join(_stream_rows(source, split, option))


def token_blocks(
    tokenizer: PreTrainedTokenizerBase, text: str, *, samples: int, seqlen: int, seed: int
) -> Tensor:
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


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """The whole text as one row of token ids, without special tokens; int64."""
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
    return torch.tensor(ids, dtype=torch.int64)


def self_calibration(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    fingerprint: str,
    calibration: CalibrationSettings,
    progress: Progress,
) -> Tensor:
    """Text sampled from the model itself, (samples, seqlen) int64; needs no data.

    Each sample starts from its own random token, goes on greedily for a few tokens to find a
    subject, then is drawn from the model's distribution at temperature 1. Kept in the user's cache
    directory by model fingerprint, seed and size. Source: LLM-QAT (ACL Findings 2024), section 2.1.
    """
    name = f"self-{fingerprint}-{calibration.seed}-{calibration.samples}x{calibration.seqlen}.safetensors"
    path = _cache_directory() / name
    if path.is_file():
        progress.note(f"calibration text from {path}")
        return load_file(path)["tokens"]
    generator = torch.Generator().manual_seed(calibration.seed)
    progress.stage("sample calibration text", calibration.samples)
    special = set(tokenizer.all_special_ids)
    usable = torch.tensor([token for token in range(len(tokenizer)) if token not in special])
    first = usable[torch.randint(usable.numel(), (calibration.samples, 1), generator=generator)]
    parts = []
    for start in first.split(_SAMPLE_BATCH):
        parts.append(_sample(model, start, calibration.seqlen, sorted(special), generator))
        for _ in start:
            progress.step("")
    tokens = torch.cat(parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}.partial")
    save_file({"tokens": tokens}, aside)
    aside.replace(path)
    return tokens


def _sample(
    model: PreTrainedModel, start: Tensor, length: int, banned: list[int], generator: torch.Generator
) -> Tensor:
    """Continue each row of `start` (batch, 1) to `length` tokens, never with a special token."""
    tokens = [start]
    cache = None
    for position in range(1, length):
        output = model(tokens[-1].to(model.device), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[:, -1].float().cpu()
        logits[:, banned] = -torch.inf
        if position <= _GREEDY_TOKENS:
            chosen = logits.argmax(-1, keepdim=True)
        else:
            chosen = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        tokens.append(chosen)
    return torch.cat(tokens, 1)


def _cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lrsd"


def _read_file(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error
    if path.suffix != ".jsonl":
        return text
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f'{path}:{number}: expected a JSON object with a "text" field') from error
        if not isinstance(row, str):
            raise InputError(f'{path}:{number}: expected a string in "text", got {type(row).__name__}')
        rows.append(row)
    return _join(rows)


def _stream_rows(source: str, split: str, option: str) -> Iterator[str]:
    import datasets

    path, configuration, column = _KNOWN.get(source, (source, None, "text"))
    try:
        rows = datasets.load_dataset(path, configuration, split=split, streaming=True)
        for index, row in enumerate(rows):
            if index >= _MAX_DOCUMENTS:
                return
            if column not in row:
                raise InputError(
                    f"{option}: data set {source} has no column {column!r}, only {', '.join(row)}"
                )
            yield row[column]
    except InputError:
        raise
    except Exception as error:  # datasets raises errors of many libraries for one cause: out of reach
        raise InputError(
            f"{option}: data set {source!r} cannot be reached ({type(error).__name__}); "
            f"give a local text file instead: {option} FILE"
        ) from error


def _join(rows: Iterator[str] | list[str]) -> str:
    return "\n\n".join(rows)
