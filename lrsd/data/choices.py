"""Multiple-choice items of a local file, for lm-evaluation-harness."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lrsd.data.rows import Row, holds_rows, listed, read_rows
from lrsd.data.sources import require_text
from lrsd.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

_EXPECTED = 'an object with a text as "context", two or more texts as "choices", and the right one\'s number '
_EXPECTED += 'from 0 as "answer"'


class Item(NamedTuple):
    """A text, what may follow it, and the number of what does."""

    context: str
    choices: list[str]
    answer: int


def read_items(source: str, option: str = "--tasks") -> list[Item]:
    """The items of a file whose rows have "context", "choices" and "answer": a JSON array, JSON lines, or
    Parquet.

    Raises: InputError if there is no such file, it cannot be read, or has a row without them.
    """
    require_text(source, option)
    path = Path(source)
    if not path.is_file() or not holds_rows(path):
        raise InputError(f"{option}: no file {source!r} of items; give a JSON or JSONL file")
    items = [_item(row, f"{option}: {path}:{number}") for number, row in read_rows(path)]
    if not items:
        raise InputError(f"{option}: {source} holds no items")
    return items


def items_dataset(items: list[Item]) -> "Dataset":
    """The items as the table that lm-eval reads."""
    import datasets

    return datasets.Dataset.from_list([item._asdict() for item in items])


def _item(row: Row, place: str) -> Item:
    fields = row if isinstance(row, dict) else {}
    context, choices, answer = (fields.get(name) for name in Item._fields)
    if not isinstance(context, str) or not isinstance(choices, list) or type(answer) is not int:
        raise InputError(f"{place}: expected {_EXPECTED}, got {listed(fields)}")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise InputError(f"{place}: expected choices that are texts, got an empty one or another type")
    if len(set(choices)) < max(2, len(choices)):
        raise InputError(f"{place}: expected two or more different choices, got {len(choices)}")
    if not 0 <= answer < len(choices):
        raise InputError(f"{place}: expected an answer from 0 to {len(choices) - 1}, got {answer}")
    return Item(context, choices, answer)
