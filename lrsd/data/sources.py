"""Texts, pairs, labels and features from local files and hub data sets."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lrsd.data.rows import LARGEST_TEXT, Row, holds_rows, listed, names_a_file, read_prose, read_rows
from lrsd.errors import InputError
from lrsd.intake.safetensors import read_header
from lrsd.model.kinds.base import Kind
from lrsd.model.types import Tokenizer

# What a source holds, opened: a text, pairs of a source and a target text, or tensors by name.
Content = str | list[tuple[str, str]] | dict[str, Tensor]


# Fields that together are a row's text, the first ones that a row has and that are not empty.
_FIELDS = (
    ("text",), ("content",), ("messages",), ("conversations",),
    ("prompt", "completion"), ("prompt", "response"), ("prompt", "chosen"),
    ("instruction", "input", "output"), ("instruction", "output"), ("question", "answer"),
)  # fmt: skip
_KNOWN_FIELDS = ", ".join("+".join(fields) for fields in _FIELDS)
# Fields of a chat's message that hold who speaks and what; the second are ShareGPT's, whose names of those
# who speak are not those of chat templates.
_MESSAGE_FIELDS = (("role", "content"), ("from", "value"))
_ROLES = {"human": "user", "gpt": "assistant"}


# Documents streamed from a hub data set at most: enough for millions of tokens of any of them.
_MAX_DOCUMENTS = 20_000


# Characters of a stretch of a text without a space or line break, on which tokenizers take quadratic time
# and memory.
_LONGEST_WORD = 2**20


@dataclass(frozen=True)
class Chat:
    """Messages, each with "role" and "content" as chat templates read them. place: where it is from."""

    messages: tuple[dict[str, str], ...]
    place: str


Document = str | Chat


# Columns of a text, or of two that are judged together, and of its label; the first ones that a row has.
TEXT_COLUMNS = (
    ("text",), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "sentence"), ("question", "passage"), ("sentence",), ("content",),
)  # fmt: skip
LABEL_COLUMNS = ("label", "labels", "class", "category")


@dataclass(frozen=True, kw_only=True)
class HubText:
    """A data set of texts on the hub. column: that of the text; None: one that a row of a file may have.

    test: what it calls the split to evaluate on, of which the first `tested` documents are read. space:
    whether its documents are sentences, joined by spaces as published perplexities do.
    """

    path: str
    configuration: str | None = None
    column: str | None = None
    revision: str | None = None
    test: str = "test"
    tested: int = _MAX_DOCUMENTS
    space: bool = False


# By short name. The test set of C4 is what GPTQ and those after it read. PTB's own files are a program, which
# datasets no longer runs; the hub keeps its rows as Parquet.
_KNOWN = {
    "wikitext": HubText(path="Salesforce/wikitext", configuration="wikitext-2-raw-v1", column="text"),
    "c4": HubText(
        path="allenai/c4", configuration="en", column="text", test="validation", tested=1100, space=True
    ),
    "ptb": HubText(
        path="ptb-text-only/ptb_text_only", column="sentence", revision="refs/convert/parquet", space=True
    ),
}


class Labelled(NamedTuple):
    """A text, or two, and its label. place: its file and row."""

    texts: tuple[str, ...]
    label: str
    place: str


def read_content(
    source: str, kind: Kind, *, split: str, option: str, tokenizer: Tokenizer | None = None
) -> Content:
    """A source opened as that kind of model reads it; see `read_tensors`, `read_pairs` and `read_text`."""
    if kind.tensors:
        return read_tensors(source, kind, option)
    if kind.reads_pairs and (pairs := read_pairs(source, option)):
        return pairs
    return read_text(source, split=split, option=option, tokenizer=tokenizer)


def read_text(source: str, *, split: str, option: str, tokenizer: Tokenizer | None = None) -> str:
    """The text of a source, its documents joined by blank lines; see `read_documents` and `join_documents`.

    Raises: InputError.
    """
    return join_documents(read_documents(source, split=split, option=option), tokenizer)


def read_documents(source: str, *, split: str, option: str) -> list[Document]:
    """The texts and chats of a local file, of which prose is one text, or of a hub data set's rows.

    Rows without any are left out, but not those of "wikitext", "c4" and "ptb", which are read as published.

    Args: source: path of a text, JSON, CSV, TSV or Parquet file, which may be compressed, "wikitext", "c4",
        "ptb", or a hub data set id; option: the command-line option to name in errors.
    Raises: InputError if there is no such file or data set, it cannot be read, or holds no text.
    """
    require_text(source, option)
    path = Path(source)
    if path.is_file():
        documents = list(_file_documents(path))
    elif source not in _KNOWN and ("/" not in source or names_a_file(path)):
        raise InputError(
            f"{option}: no file {source!r} and no data set of that name; "
            f"give a text or JSONL file, {', '.join(_KNOWN)}, or a hub id like owner/name"
        )
    else:
        documents = list(_hub_documents(source, split, option))
    if not any(isinstance(document, Chat) or document.strip() for document in documents):
        raise InputError(
            f"{option}: {source} holds no text; expected prose, or rows with a text in {_KNOWN_FIELDS}"
        )
    return documents


def join_documents(documents: Sequence[Document], tokenizer: Tokenizer | None) -> str:
    """Texts and chats joined by blank lines; chats as the tokenizer's template writes them, and where it has
    none, or there is no tokenizer, their messages joined by blank lines.

    Raises: InputError for a chat that the template refuses.
    """
    return _join(_written(document, tokenizer) for document in documents)


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
    if path.is_file() and not features and path.stat().st_size > LARGEST_TEXT:
        raise InputError(
            f"{option}: {source} has {path.stat().st_size:,} bytes, at most {LARGEST_TEXT:,} are read; "
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


def read_pairs(source: str, option: str = "--calib") -> list[tuple[str, str]]:
    """The pairs of a file whose rows have "source" and "target"; none if the first has no "source", or it is
    no file of rows.

    Raises: InputError for a file that cannot be read, or a further row without them.
    """
    path = Path(source)
    if not holds_rows(path) or not path.is_file():
        return []
    require_text(source, option)
    pairs: list[tuple[str, str]] = []
    for number, row in read_rows(path):
        fields = row if isinstance(row, dict) else {}
        if not pairs and "source" not in fields:
            return []
        if not isinstance(fields.get("source"), str) or not isinstance(fields.get("target"), str):
            raise InputError(f'{path}:{number}: expected an object with texts as "source" and "target"')
        pairs.append((fields["source"], fields["target"]))
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


def read_labelled(source: str) -> list[Labelled]:
    """Texts and labels of a file whose rows have "text" and "label", or other columns of TEXT_COLUMNS and
    LABEL_COLUMNS; CSV or JSONL for one.

    Raises: InputError if there is no such file, it cannot be read, or has a row without them.
    """
    rows = rows_of_file(source, "--accuracy", '"text" and "label"')
    return [_labelled(row, place) for place, row in rows]


def rows_of_file(source: str, option: str, what: str) -> list[tuple[str, Row]]:
    """Every row of a file and its place. what: is expected in each, for errors.

    Raises: InputError if there is no such file, it cannot be read, is prose, or holds no row.
    """
    require_text(source, option)
    path = Path(source)
    if not path.is_file() or not holds_rows(path):
        state = "it is prose, by its name" if path.is_file() else "there is no such file"
        raise InputError(
            f"{option}: expected a CSV or JSONL file with {what} in each row, got {source!r}; {state}"
        )
    rows = [(f"{path}:{number}", row) for number, row in read_rows(path)]
    if not rows:
        raise InputError(f"{option}: {source} holds no rows; expected {what} in each")
    return rows


def label_number(label: str, names: Mapping[str, int]) -> int | None:
    """The class that a label means: by its name, else by its number; None if it is neither."""
    number = names.get(label)
    return int(label) if number is None and label.isdecimal() else number


def _labelled(row: Row, place: str) -> Labelled:
    fields = row if isinstance(row, dict) else {}
    columns = next((names for names in TEXT_COLUMNS if all(name in fields for name in names)), ())
    texts = tuple(text for text in map(fields.get, columns) if isinstance(text, str) and text)
    label = next((fields[name] for name in LABEL_COLUMNS if name in fields), None)
    if not texts or len(texts) < len(columns) or label is None:
        raise InputError(
            f'--accuracy: {place}: expected fields "text" and "label" with a text and its label, or two '
            f'texts such as "premise" and "hypothesis", got {listed(fields)}'
        )
    return Labelled(texts, str(int(label) if isinstance(label, bool) else label), place)


def _file_documents(path: Path) -> Iterator[Document]:
    if not holds_rows(path):
        yield read_prose(path)
        return
    for number, row in read_rows(path):
        document = _document(row, f"{path}:{number}")
        if document is not None:
            yield document


def _hub_documents(source: str, split: str, option: str) -> Iterator[Document]:
    import datasets

    known = _KNOWN.get(source, HubText(path=source))
    tests = split == "test"
    try:
        rows = datasets.load_dataset(
            known.path, known.configuration, split=known.test if tests else split, revision=known.revision,
            streaming=True,
        )  # fmt: skip
        some = islice(rows, known.tested if tests else _MAX_DOCUMENTS)
        if known.space and tests:
            yield " ".join(row[known.column] for row in some)
            return
        for number, row in enumerate(some, 1):
            # Published perplexities count the empty rows of WikiText, too.
            document = row[known.column] if known.column else _document(row, f"{option}: {source}:{number}")
            if document is not None:
                yield document
    except InputError:
        raise
    except Exception as error:  # datasets raises errors of many libraries for one cause: out of reach
        raise InputError(
            f"{option}: data set {source!r} cannot be reached ({type(error).__name__}); "
            f"give a local text file instead: {option} FILE"
        ) from error


def _document(row: Row, place: str) -> Document | None:
    """A row's text or chat; None if it is null or empty."""
    if isinstance(row, str):
        return row or None
    present = [fields for fields in _FIELDS if all(field in row for field in fields)]
    if not present:
        raise InputError(
            f"{place}: expected a text in one of {_KNOWN_FIELDS}; got the fields {listed(row)}; rename one"
        )
    for fields in present:
        parts = [part for field in fields if (part := _part(row[field], f"{place}: {field!r}")) is not None]
        if parts:
            return _together(parts, place)
    return None


def _part(value: Any, place: str) -> Document | None:
    """A field's text or chat; None if it is null or empty."""
    if value is None or isinstance(value, str):
        return value or None
    if not isinstance(value, list):
        raise InputError(f"{place}: expected a text or a chat, got {type(value).__name__}; write it as text")
    for speaker, words in _MESSAGE_FIELDS:
        if all(isinstance(message, dict) and isinstance(message.get(speaker), str) for message in value):
            return _chat([(message[speaker], message.get(words)) for message in value], place)
    got = type(value[0]).__name__ + (f" with {listed(value[0])}" if isinstance(value[0], dict) else "")
    raise InputError(
        f"{place}: expected a text, or a chat of messages with role+content or from+value, got a list of "
        f"{got}; join its texts into one"
    )


def _chat(messages: list[tuple[str, Any]], place: str) -> Chat | None:
    """None if no message has text; one that has none, such as the call of a tool, is left out."""
    said = [
        {"role": _ROLES.get(speaker, speaker), "content": text}
        for number, (speaker, words) in enumerate(messages, 1)
        if (text := _message_text(words, f"{place}: message {number}"))
    ]
    return Chat(tuple(said), place) if said else None


def _message_text(words: Any, place: str) -> str:
    """A message's text, or that of its parts of this type."""
    if words is None or isinstance(words, str):
        return words or ""
    if not isinstance(words, list) or not all(isinstance(part, dict) for part in words):
        raise InputError(
            f"{place}: expected a text or a list of parts with a type, got {type(words).__name__}; "
            "write it as text"
        )
    texts = [part.get("text") for part in words if part.get("type") == "text"]
    return _join(text for text in texts if isinstance(text, str))


def _together(parts: list[Document], place: str) -> Document:
    """A row's fields as one: texts joined by blank lines, chats one after the other."""
    texts = [part for part in parts if isinstance(part, str)]
    chats = [part for part in parts if isinstance(part, Chat)]
    if texts and chats:
        raise InputError(f"{place}: expected texts or chats, got both; give one of them in each row")
    return _join(texts) if texts else Chat(tuple(m for chat in chats for m in chat.messages), place)


def _written(document: Document, tokenizer: Tokenizer | None) -> str:
    if isinstance(document, str):
        return document
    if tokenizer is None or not tokenizer.chat_template:
        return _join(message["content"] for message in document.messages)
    try:
        return str(tokenizer.apply_chat_template(list(document.messages), tokenize=False))
    except Exception as error:  # templates raise errors of their own, and of every kind
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{document.place}: the tokenizer's chat template refuses this chat ({reason}); leave the row "
            "out, or give it as text"
        ) from error


def _join(texts: Iterable[str]) -> str:
    return "\n\n".join(texts)
