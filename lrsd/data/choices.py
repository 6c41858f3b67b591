"""Multiple-choice items of a local file, for lm-evaluation-harness."""

from typing import TYPE_CHECKING, NamedTuple

from lrsd.data.rows import Row, listed
from lrsd.data.sources import rows_of_file
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
    rows = rows_of_file(source, option, '"context", "choices" and "answer"')
    return [_item(row, f"{option}: {place}") for place, row in rows]


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
