"""Model inputs to calibrate and evaluate on, from text, pairs of texts, or features of sound."""

import csv
import hashlib
import os
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrsd.config import CalibrationSettings
from lrsd.errors import InputError, StorageError
from lrsd.model.cache import cached_pass
from lrsd.model.load import LoadedModel, panics
from lrsd.model.samples import Samples
from lrsd.progress import Progress
from lrsd.storage.files import refusals, write_tensors
from lrsd.storage.inventory import parse_json, read_header

# Hub data sets by short name: path, configuration, and the column that holds the text.
_KNOWN = {
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", "text"),
    "c4": ("allenai/c4", "en", "text"),
}
# Documents streamed from a hub data set at most: enough for millions of tokens of any of them.
_MAX_DOCUMENTS = 20_000
# Bytes of a local text, thousands of times what a calibration reads; and of a stretch of it without a space
# or line break, on which tokenizers take quadratic time and memory.
_LARGEST_TEXT, _LONGEST_WORD = 2**26, 2**20
# Characters tokenized at once, where there are line breaks to cut at.
_PIECE = 2**23
# Samples generated side by side, and greedy tokens at the start of each.
_SAMPLE_BATCH = 32
_GREEDY_TOKENS = 4
_EXAMPLE_TOKENS = 8


def read_text(source: str, *, split: str, option: str) -> str:
    """The text of a local file, or of a hub data set, its rows joined by blank lines as published.

    Args: source: path of a .txt/.raw/.jsonl file, "wikitext", "c4", or a hub data set id;
        option: the command-line option to name in errors.
    Raises: InputError if there is no such file or the data set cannot be reached.
    """
    require_text(source, option)
    path = Path(source)
    if path.is_file():
        return _read_file(path)
    if source not in _KNOWN and ("/" not in source or path.suffix in {".txt", ".jsonl", ".raw"}):
        raise InputError(
            f"{option}: no file {source!r} and no data set of that name; "
            f"give a text or JSONL file, {', '.join(_KNOWN)}, or a hub id like owner/name"
        )
    return _join(_stream_rows(source, split, option))


def require_text(source: str, option: str, *, features: bool = False) -> None:
    """Refuse a local text before anything expensive. features: it holds those of sound, which are large.

    Raises: InputError for what is no regular file, or larger than any text is worth.
    """
    path = Path(source)
    if source == "self" or (source in _KNOWN and not path.is_file()):
        return
    if path.is_dir():
        raise InputError(f"{option}: expected a text or JSONL file, {source} is a directory")
    if path.exists() and not path.is_file():
        raise InputError(f"{option}: {source} is no regular file")
    if path.is_file() and not features and path.stat().st_size > _LARGEST_TEXT:
        raise InputError(
            f"{option}: {source} has {path.stat().st_size:,} bytes, at most {_LARGEST_TEXT:,} are read; "
            "give an excerpt"
        )


def text_identity(source: str) -> str:
    """What tells one calibration text from another: the digest of a local file; else its name.

    Raises: InputError for a file that would be refused anyway.
    """
    path = Path(source)
    if not path.is_file():
        return source
    if path.suffix == ".safetensors":
        list(read_header(path))
    else:
        require_text(source, "--calib")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def calibration_samples(
    loaded: LoadedModel, identity: str, calibration: CalibrationSettings, progress: Progress
) -> Samples:
    """What the model's activations are measured on: sampled from the model itself, or cut from a text.

    A model of two stacks reads a block of the text and writes what follows it, or reads pairs, see
    `read_pairs`; one that hears reads the `input_features` of a safetensors file, and answers by itself.
    """
    if calibration.source == "self" and loaded.kind != "causal":
        raise InputError(
            f"{type(loaded.model).__name__} cannot write its own calibration text; give --calib FILE"
        )
    limit = loaded.context_length
    if limit is not None and calibration.seqlen > limit and loaded.kind != "speech":
        raise InputError(f"the model reads at most {limit} tokens; lower --seqlen from {calibration.seqlen}")
    if calibration.source == "self":
        tokens = self_calibration(loaded.model, loaded.require_tokenizer(), identity, calibration, progress)
        return Samples({"input_ids": tokens})
    if loaded.kind == "speech":
        return speech_samples(loaded.model, calibration)
    tokenizer = loaded.require_tokenizer()
    count, seqlen, seed = calibration.samples, calibration.seqlen, calibration.seed
    if loaded.kind == "seq2seq" and (pairs := read_pairs(calibration.source)):
        return packed_pairs(loaded, pairs, calibration)
    text = read_text(calibration.source, split="train", option="--calib")
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


def paired(model: PreTrainedModel, blocks: Tensor) -> Samples:
    """Blocks of tokens (N, 2 T) as sources (N, T) and the targets that follow them, behind a start token."""
    half = blocks.shape[1] // 2
    targets = behind_start(model, blocks[:, half:])
    return Samples({"input_ids": blocks[:, :half], "decoder_input_ids": targets})


def behind_start(model: PreTrainedModel, targets: Tensor) -> Tensor:
    """What a decoder reads to write `targets` (N, T): a start token and all but the last of them."""
    first = getattr(model.config, "decoder_start_token_id", None)
    first = model.config.bos_token_id if first is None else first
    return torch.cat([torch.full((len(targets), 1), 0 if first is None else first), targets[:, :-1]], 1)


def read_pairs(source: str) -> list[tuple[str, str]]:
    """The pairs of a JSONL file of objects with "source" and "target"; none if it is another kind of file.

    Raises: InputError for a row without them.
    """
    path = Path(source)
    if path.suffix != ".jsonl" or not path.is_file():
        return []
    require_text(source, "--calib")
    pairs = []
    for number, row in enumerate(_json_rows(path), 1):
        if number == 1 and "source" not in row:
            return []
        if not isinstance(row.get("source"), str) or not isinstance(row.get("target"), str):
            raise InputError(f'{path}:{number}: expected an object with texts as "source" and "target"')
        pairs.append((row["source"], row["target"]))
    return pairs


def packed_pairs(
    loaded: LoadedModel, pairs: list[tuple[str, str]], calibration: CalibrationSettings
) -> Samples:
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
            f"--calib: {calibration.source} has {len(sources)} source and {len(targets)} target tokens; two "
            f"samples need {2 * seqlen} and {2 * written}; give more pairs or a smaller --seqlen"
        )
    return Samples({
        "input_ids": sources[: count * seqlen].view(count, seqlen),
        "decoder_input_ids": behind_start(model, targets[: count * written].view(count, written)),
    })  # fmt: skip


def enclosed(tokenizer: PreTrainedTokenizerBase, blocks: Tensor) -> Tensor:
    """Blocks whose first and last token are those an encoder expects there, where its tokenizer has such."""
    enclosed = blocks.clone()
    for place, token in ((0, tokenizer.cls_token_id), (-1, tokenizer.sep_token_id)):
        if token is not None:
            enclosed[:, place] = token
    return enclosed


def speech_samples(model: PreTrainedModel, calibration: CalibrationSettings) -> Samples:
    """Features of sound from a safetensors file, and what the model itself hears in them.

    Raises: InputError if the file holds no `input_features` (N, channels, frames).
    """
    features = read_features(calibration.source, "--calib")[: calibration.samples]
    length = min(calibration.seqlen, model.config.max_target_positions - 1)
    targets = model.generate(  # type: ignore[operator]
        features.to(model.device, model.dtype), max_new_tokens=length, min_new_tokens=length, do_sample=False
    )
    read = behind_start(model, targets[:, :length].cpu())
    return Samples({"input_features": features, "decoder_input_ids": read})


def read_features(source: str, option: str) -> Tensor:
    """`input_features` (N, channels, frames) of a safetensors file, as a feature extractor makes them."""
    require_text(source, option, features=True)
    try:
        shapes = {name: tensor.shape for name, tensor in read_header(Path(source))}
        if len(shapes["input_features"]) != 3:
            raise InputError(f"{option}: input_features of {source} have shape {shapes['input_features']}")
        return load_file(source)["input_features"].float()
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(
            f"{option}: expected a safetensors file with input_features (samples, channels, frames) for a "
            f"model that hears, got {source!r}"
        ) from error


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
    if (kept := _kept_tokens(path, calibration, len(tokenizer))) is not None:
        progress.note(f"calibration text from {path}")
        return kept
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
    try:
        with refusals(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, {"tokens": tokens})
    except StorageError as error:
        progress.note(f"the calibration text is not kept for other runs: {error}")
    return tokens


def _kept_tokens(path: Path, calibration: CalibrationSettings, vocabulary: int) -> Tensor | None:
    """Text that an earlier run sampled; None if there is none, or it is damaged."""
    try:
        tokens = load_file(path)["tokens"]
    except (OSError, SafetensorError, KeyError):
        return None
    size = (calibration.samples, calibration.seqlen)
    sound = tokens.dtype == torch.int64 and tokens.shape == size
    return tokens if sound and int(tokens.min()) >= 0 and int(tokens.max()) < vocabulary else None


def _sample(
    model: PreTrainedModel, start: Tensor, length: int, banned: list[int], generator: torch.Generator
) -> Tensor:
    """Continue each row of `start` (batch, 1) to `length` tokens, never with a special token."""
    tokens = [start]
    cache = None
    for position in range(1, length):
        logits, cache = cached_pass(model, tokens[-1], cache)
        logits = logits[:, -1].float().cpu()
        logits[:, banned] = -torch.inf
        if position <= _GREEDY_TOKENS:
            chosen = logits.argmax(-1, keepdim=True)
        else:
            chosen = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        tokens.append(chosen)
    return torch.cat(tokens, 1)


def read_labelled(source: str) -> list[tuple[str, str]]:
    """Texts and labels of a CSV or JSONL file with the columns "text" and "label".

    Raises: InputError if there is no such file, or a row without them.
    """
    require_text(source, "--accuracy")
    path = Path(source)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file)) if path.suffix == ".csv" else list(map(parse_json, file))
        found = [(row["text"], str(row["label"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise InputError(
            f'--accuracy: expected a CSV or JSONL file with "text" and "label", got {source!r} ({error})'
        ) from error
    if not found:
        raise InputError(f"--accuracy: {source} holds no rows")
    for number, (text, _) in enumerate(found, 1):
        if not isinstance(text, str) or not text:
            raise InputError(f'--accuracy: row {number} of {source} has no text in "text"')
    return found


def _cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lrsd"


def _read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error


def _read_file(path: Path) -> str:
    text = _read_utf8(path)
    if path.suffix != ".jsonl":
        return text
    rows = []
    for number, row in enumerate(_json_rows(path), 1):
        if "text" not in row:
            raise InputError(f'{path}:{number}: expected a JSON object with a "text" field')
        if not isinstance(row["text"], str):
            raise InputError(
                f'{path}:{number}: expected a string in "text", got {type(row["text"]).__name__}'
            )
        rows.append(row["text"])
    return _join(rows)


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file. Raises: InputError for a line that is none."""
    # Not splitlines(): a text may hold other line breaks than that of JSONL.
    for number, line in enumerate(StringIO(_read_utf8(path), newline="\n"), 1):
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise InputError(f'{path}:{number}: expected a JSON object with a "text" field')
        yield row


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
