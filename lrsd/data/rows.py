"""What a local file of text holds, whichever kind it is: decompressed, decoded, and parsed into rows."""

import bz2
import codecs
import csv
import gzip
import json
import lzma
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

from lrsd.errors import InputError
from lrsd.intake.json import parse_json

# A row is its fields by name, or a text alone.
Row = dict[str, Any] | str

# Bytes of a local text once decompressed, thousands of times what a calibration reads.
LARGEST_TEXT = 2**26

# Kinds of files by the end of their names; a file of any other kind is prose, read as it is.
_JSON, _JSON_LINES, _PARQUET = ".json", (".jsonl", ".ndjson"), ".parquet"
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_ARROW = (".arrow", ".feather")
_ROWS = (_JSON, *_JSON_LINES, *_DELIMITERS, _PARQUET)
# Marks that a file may begin with, of which its encoding is known.
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
# Rows of Parquet decoded at once: its dictionaries make copies of a large text cost nothing in the file.
_BATCH = 16
# Bytes given to zstandard at once, which tells the end of a frame but bounds nothing: each 4 may give 2^17.
_ZST_PIECE = 2**10
_SPACE = re.compile(r"[ \t\r\n]*")


def holds_rows(path: Path) -> bool:
    """Whether a file's name says that it holds rows, and not prose."""
    return _kind(path) in _ROWS


def names_a_file(path: Path) -> bool:
    """Whether a name ends as those of files of text do, and not as that of a hub data set."""
    return _kind(path) in {*_ROWS, *_ARROW, ".txt", ".raw"} or path.suffix.lower() in _READERS


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """The rows of a file of JSON lines, a JSON array, CSV, TSV or Parquet, compressed or not.

    Returns: each row with its number: its line in JSON lines, else its place among the rows, from 1.
    Raises: InputError for a file that is not of the kind its name says, or holds more than LARGEST_TEXT.
    """
    kind = _kind(path)
    if kind == _PARQUET:
        return _parquet_rows(path, _content(path))
    text = read_prose(path)
    if kind in _DELIMITERS:
        return _table_rows(path, text, _DELIMITERS[kind])
    return _json_rows(path, text) if kind == _JSON else _line_rows(path, text)


def read_prose(path: Path) -> str:
    """The text of a file as it is, without a byte order mark, its line breaks those of Unix.

    Raises: InputError for a file that is no text, in another encoding than UTF-8 and marked UTF-16, damaged,
        or larger than LARGEST_TEXT.
    """
    if _kind(path) in _ARROW:
        raise InputError(
            f"{path}: Arrow files are not read; write it as Parquet first, with "
            "datasets.Dataset.from_file(FILE).to_parquet(NEW)"
        )
    content = _content(path)
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = TextIOWrapper(BytesIO(content), encoding=encoding).read()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not {encoding.removesuffix('-sig').upper()} text (byte {error.start}); convert it "
            f"first, or if it is compressed let its name end in {', '.join(_READERS)}"
        ) from error
    if "\0" in text:
        raise InputError(
            f"{path} is no text, it holds NUL characters (the first is number {text.index(chr(0)) + 1}); "
            "UTF-16 is read where it begins with a byte order mark"
        )
    return text


def _kind(path: Path) -> str:
    """The end of a file's name, inside that of its compression."""
    inner = path.with_suffix("") if path.suffix.lower() in _READERS else path
    return inner.suffix.lower()


def _content(path: Path) -> bytes:
    reader = _READERS.get(path.suffix.lower(), _read_plain)
    try:
        content = reader(path, LARGEST_TEXT + 1)
    except InputError:
        raise
    except Exception as error:  # every library has errors of its own for what is damaged
        raise InputError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    if len(content) > LARGEST_TEXT:
        raise _too_large(path)
    return content


def _too_large(path: Path) -> InputError:
    return InputError(
        f"{path} holds more than {LARGEST_TEXT:,} bytes once decompressed, the most that is read; "
        "give an excerpt"
    )


def _read_plain(path: Path, most: int) -> bytes:
    with path.open("rb") as file:
        return file.read(most)


def _read_gz(path: Path, most: int) -> bytes:
    with gzip.open(path) as file:
        return file.read(most)


def _read_bz2(path: Path, most: int) -> bytes:
    with bz2.open(path) as file:
        return file.read(most)


def _read_xz(path: Path, most: int) -> bytes:
    with lzma.open(path) as file:
        return file.read(most)


def _read_zst(path: Path, most: int) -> bytes:
    try:
        library = import_module("compression.zstd")  # from Python 3.14
    except ImportError:
        return _read_zst_by_package(path, most)
    with library.open(path) as file:
        return file.read(most)


def _read_zst_by_package(path: Path, most: int) -> bytes:
    """Not by its stream_reader, which takes a file that is cut off for a whole one."""
    try:
        library = import_module("zstandard")
    except ImportError as error:
        raise InputError(
            f"{path}: .zst is read from Python 3.14, or with a package: pip install zstandard"
        ) from error
    frame, content = None, bytearray()
    with path.open("rb") as file:
        while len(content) < most and (piece := file.read(_ZST_PIECE)):
            while piece:
                frame = frame or library.ZstdDecompressor().decompressobj()
                content += frame.decompress(piece)
                piece, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None and len(content) < most:
        raise EOFError("the file ends within a frame")
    return bytes(content)


_READERS: dict[str, Callable[[Path, int], bytes]] = {
    ".gz": _read_gz, ".bz2": _read_bz2, ".xz": _read_xz, ".zst": _read_zst,
}  # fmt: skip


def _line_rows(path: Path, text: str) -> Iterator[tuple[int, Row]]:
    # Not splitlines(): a text may hold other line breaks than that of JSON lines.
    for number, line in enumerate(StringIO(text, newline="\n"), 1):
        if line.strip():
            try:
                row = parse_json(line)
            except ValueError as error:
                raise InputError(f"{path}:{number}: expected a line of JSON ({error})") from error
            yield number, _row(row, f"{path}:{number}")


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, Row]]:
    """Those of an array, or of lines under the name of one."""
    start = _after_space(text, 0)
    if text.startswith("[", start):
        return _array_rows(path, text, start + 1)
    first, _, rest = text[start:].partition("\n")
    if rest.strip() and _is_json(first):
        return _line_rows(path, text)
    try:
        found = parse_json(text)
    except ValueError as error:
        raise InputError(f"{path}: expected a JSON array, or a line of JSON per row ({error})") from error
    raise InputError(
        f"{path}: expected a JSON array, or a line of JSON per row, got one {type(found).__name__}"
        + (f" with the fields {listed(found)}" if isinstance(found, dict) else "")
        + "; put the array of rows alone into a file, or name a single row .jsonl"
    )


def _array_rows(path: Path, text: str, place: int) -> Iterator[tuple[int, Row]]:
    """One by one: an array of 64 MB takes gigabytes once parsed. place: after its opening bracket."""
    decoder, number = json.JSONDecoder(), 0
    place = _after_space(text, place)
    while not text.startswith("]", place):
        number += 1
        try:
            row, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: expected an element of a JSON array ({error})") from error
        yield number, _row(row, f"{path}:{number}")
        place = _after_space(text, place)
        if text.startswith(",", place):
            place = _after_space(text, place + 1)
        elif not text.startswith("]", place):
            raise InputError(f"{path}:{number}: expected a comma or the end of the JSON array after it")
    if _after_space(text, place + 1) < len(text):
        raise InputError(f"{path}: expected one JSON array, more follows its end; give one, or JSON lines")


def _table_rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, Row]]:
    # The module's own limit, 131,072 characters, is less than a book; it has none per reader.
    limit = csv.field_size_limit(LARGEST_TEXT)
    try:
        table = csv.DictReader(StringIO(text, newline=""), delimiter=delimiter, strict=True)
        for number, row in enumerate(table, 1):
            if None in row:
                raise InputError(
                    f"{path}:{number}: expected {len(row) - 1} fields as in the header, got more; "
                    f"put quotes around texts that hold {delimiter!r}"
                )
            yield number, row
    except csv.Error as error:
        raise InputError(f"{path}: line {table.reader.line_num} is no row of a table ({error})") from error
    finally:
        csv.field_size_limit(limit)


def _parquet_rows(path: Path, content: bytes) -> Iterator[tuple[int, Row]]:
    parquet = import_module("pyarrow.parquet")
    number = size = 0
    try:
        file = parquet.ParquetFile(BytesIO(content))
        groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
        if sum(group.total_byte_size for group in groups) > LARGEST_TEXT:
            raise _too_large(path)
        for batch in file.iter_batches(_BATCH):
            for row in batch.to_pylist():
                number, size = number + 1, size + _length(row)
                if size > LARGEST_TEXT:
                    raise _too_large(path)
                yield number, row
    except InputError:
        raise
    except Exception as error:  # pyarrow's own, and Python's for values that it has no type for
        raise InputError(f"{path} is not readable Parquet ({type(error).__name__}: {error})") from error


def _length(value: Any) -> int:
    """Of all text in a row once it is written out, which Parquet and Arrow hold once where it repeats."""
    if isinstance(value, dict | list):
        return sum(map(_length, value.values() if isinstance(value, dict) else value))
    return len(value) if isinstance(value, str | bytes) else 1


def _row(found: Any, place: str) -> Row:
    if not isinstance(found, dict | str):
        raise InputError(
            f"{place}: expected a JSON object or a text, got {type(found).__name__}; an array of rows is "
            "read from a .json file"
        )
    return found


def _is_json(text: str) -> bool:
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def _after_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    assert found, "it matches nothing, too"
    return found.end()


def listed(names: Any, most: int = 12) -> str:
    """Names for an error, which may be those of anything: the first ones, the longest shortened."""
    shown = [str(name)[:40] for name in names]
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return (", ".join(shown[:most]) or "none") + more
