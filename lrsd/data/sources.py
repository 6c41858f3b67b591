"""Texts, pairs, labels and features from local files and hub data sets."""

import csv
import hashlib
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lrsd.errors import InputError
from lrsd.intake.json import parse_json
from lrsd.intake.safetensors import read_header
from lrsd.model.kinds.base import Kind

# Hub data sets by short name: path, configuration, and the column that holds the text.
_KNOWN = {
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", "text"),
    "c4": ("allenai/c4", "en", "text"),
}
# What a source holds, opened: a text, pairs of a source and a target text, or tensors by name.
Content = str | list[tuple[str, str]] | dict[str, Tensor]


# Documents streamed from a hub data set at most: enough for millions of tokens of any of them.
_MAX_DOCUMENTS = 20_000


# Bytes of a local text, thousands of times what a calibration reads; and of a stretch of it without a space
# or line break, on which tokenizers take quadratic time and memory.
_LARGEST_TEXT, _LONGEST_WORD = 2**26, 2**20


def read_content(source: str, kind: Kind, *, split: str, option: str) -> Content:
    """A source opened as that kind of model reads it; see `read_tensors`, `read_pairs` and `read_text`."""
    if kind.tensors:
        return read_tensors(source, kind, option)
    if kind.reads_pairs and (pairs := read_pairs(source)):
        return pairs
    return read_text(source, split=split, option=option)


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


def mixture_identity(sources: list[str]) -> str:
    """What tells a calibration text, or a mixture of several in their order, from another.

    Raises: InputError for a file that would be refused anyway, or one that is given under two names.
    """
    known: dict[str, str] = {}
    for source in sources:
        require_text(source, "--calib", features=source.endswith(".safetensors"))
        identity = text_identity(source)
        if identity in known:
            raise InputError(
                f"--calib: {known[identity]} and {source} hold the same; "
                "give each text once, shares are equal"
            )
        known[identity] = source
    return " + ".join(known)


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


def read_tensors(source: str, kind: Kind, option: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file that a kind of model reads.

    Raises: InputError if there is no such file, or it lacks them, or they have other axes.
    """
    require_text(source, option, features=True)
    try:
        shapes = {name: tensor.shape for name, tensor in read_header(Path(source))}
        for name, axes in kind.tensors.items():
            if len(shapes[name]) != len(axes):
                raise InputError(f"{option}: {name} of {source} have shape {shapes[name]}")
        tensors = load_file(source)
    except (OSError, SafetensorError, KeyError) as error:
        wanted = " and ".join(f"{name} ({', '.join(axes)})" for name, axes in kind.tensors.items())
        raise InputError(
            f"{option}: expected a safetensors file with {wanted} for a {kind.name}, got {source!r}"
        ) from error
    return {name: tensors[name] for name in kind.tensors}


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
