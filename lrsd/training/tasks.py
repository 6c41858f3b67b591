"""What a model is trained on: the next token of a text, the labels of texts, or target texts for sources."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from lrsd.data.rows import Row, listed
from lrsd.data.sources import LABEL_COLUMNS, TEXT_COLUMNS, label_number, read_text, rows_of_file
from lrsd.data.tokens import beginning_token, require_context, tokenize
from lrsd.errors import InputError
from lrsd.methods.losparse import Losparse
from lrsd.model.embedding import embedding_rows
from lrsd.model.load import LoadedModel
from lrsd.model.samples import Samples
from lrsd.model.types import Tokenizer

# One training item: token ids under the names of the model's arguments, and its labels.
Item = dict[str, Any]

# Columns of a row, the first ones that the first row has.
_PAIRS = (
    ("source", "target"), ("document", "summary"), ("article", "highlights"), ("text", "summary"),
    ("input", "output"), ("prompt", "completion"),
)  # fmt: skip
# What labels beyond this are: numbers to be told apart by size, or texts.
_MOST_LABELS = 1000
# The token that cross-entropy passes over.
IGNORED = -100
_CLASSIFIERS = {
    name
    for names in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()
    for name in ((names,) if isinstance(names, str) else names)
}


@dataclass(frozen=True)
class Example:
    """A row to be classified: one text or two, and its label."""

    texts: tuple[str, ...]
    label: str
    place: str


def task_of(loaded: LoadedModel, method: Losparse) -> str:
    """The task that was asked for, or the one that the model does.

    Raises: InputError for one that it cannot do.
    """
    seq2seq, causal = loaded.model.config.is_encoder_decoder, loaded.kind.writes_calibration_text
    if loaded.kind.tensors:
        raise InputError(f"a {loaded.kind.name} is not trained; --method losparse reads text")
    task = method.task
    if task == "auto":
        task = "pairs" if seq2seq else "text" if causal else "classify"
    possible = {"pairs": seq2seq, "text": causal, "classify": not seq2seq}
    if not possible[task]:
        name = type(loaded.model).__name__
        fit = ", ".join(name for name, can in possible.items() if can)
        raise InputError(f"--task {task} is not what a {name} does; it can be trained on {fit}")
    return task


def with_head(loaded: LoadedModel, method: Losparse, seed: int) -> tuple[LoadedModel, bool]:
    """The model with a head for its task. One that is to classify and has no such head gets a new one, its
    labels those of the training file; a classifier keeps its own.

    Returns: the model, and whether its head is new. Raises: InputError for labels that no head could have, or
        the model's own does not.
    """
    if task_of(loaded, method) != "classify":
        return loaded, False
    config = loaded.model.config
    if type(loaded.model).__name__ in _CLASSIFIERS:
        if config.problem_type not in (None, "single_label_classification"):
            raise InputError(
                f"the head of {type(loaded.model).__name__} is for {config.problem_type}, expected one label "
                "of several; give a model without a head, or with one of that kind"
            )
        if config.pad_token_id is None:
            config.pad_token_id = padding_token(loaded)
        return loaded, False
    names = label_names(read_examples(method))
    config = deepcopy(config)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    config.problem_type = "single_label_classification"
    if config.pad_token_id is None:
        config.pad_token_id = padding_token(loaded)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            headed = AutoModelForSequenceClassification.from_config(config, dtype=loaded.model.dtype)
        found = headed.base_model.load_state_dict(loaded.model.base_model.state_dict(), strict=False)
    except (ValueError, RuntimeError) as error:
        line = str(error).strip().splitlines()[0]
        raise InputError(
            f"{type(loaded.model).__name__} cannot be made a classifier ({line:.200})"
        ) from error
    if missing := [name for name in found.missing_keys if "pool" not in name]:
        raise InputError(
            f"{type(loaded.model).__name__} cannot be made a classifier: it lacks {missing[0]} of a "
            f"{type(headed).__name__}"
        )
    headed.requires_grad_(False)
    return replace(loaded, model=headed.eval()), True


def read_items(loaded: LoadedModel, method: Losparse, seqlen: int) -> list[Item]:
    """The training items, each of `seqlen` tokens at most.

    Raises: InputError for a file that is missing, empty, or has rows that are no items.
    """
    task = task_of(loaded, method)
    read: Mapping[str, Callable[[LoadedModel, Losparse, int], list[Item]]] = {
        "text": _text_items, "classify": _labelled_items, "pairs": _pair_items
    }  # fmt: skip
    items = read[task](loaded, method, seqlen)
    rows = embedding_rows(loaded.model)
    largest = max(max(item["input_ids"], default=0) for item in items)
    if largest >= rows:
        raise InputError(
            f"the tokenizer makes token {largest}, the model's embedding has {rows} rows; give the model its "
            "own tokenizer, or resize its embedding to the one it has (resize_token_embeddings)"
        )
    return items


def read_examples(method: Losparse) -> list[Example]:
    """Raises: InputError for a file without rows, or a row without text or label."""
    rows = _rows(method, "a text and its label")
    texts = method.columns or _found(rows[0], TEXT_COLUMNS, "a text", "--text-columns")
    labels = [(method.label_column,)] if method.label_column else [(name,) for name in LABEL_COLUMNS]
    (label,) = _found(rows[0], labels, "a label", "--label-column")
    examples = []
    for place, row in rows:
        found, value = tuple(row.get(name) for name in texts), row.get(label)
        if not all(isinstance(text, str) and text.strip() for text in found) or value in (None, ""):
            raise InputError(
                f"--train: {place}: expected texts in {', '.join(texts)} and a label in {label}, one is "
                "missing; fill it in, or leave the row out"
            )
        examples.append(Example(found, str(int(value) if isinstance(value, bool) else value), place))  # type: ignore[arg-type]
    return examples


def label_names(examples: Sequence[Example]) -> list[str]:
    """The classes by number: 0 to the largest where labels are numbers, as `lrsd eval` reads them, else the
    names in order. Raises: InputError for fewer than two, or more than a classifier has."""
    names = sorted({example.label for example in examples})
    if len(names) < 2:
        raise InputError(
            f"--train: every row has the label {names[0]!r:.60}; a classifier needs two labels or more"
        )
    if all(name.isdecimal() for name in names):
        largest = max(map(int, names))
        names = [str(number) for number in range(min(largest, _MOST_LABELS) + 1)]
    if len(names) > _MOST_LABELS:
        raise InputError(
            f"--train: expected labels of at most {_MOST_LABELS} classes, got more; choose another "
            "--label-column"
        )
    return names


def collate(items: Sequence[Item], padding: int) -> dict[str, Tensor]:
    """A batch: sequences padded at the end to the longest, labels with what the loss passes over."""
    fill = {"input_ids": padding, "labels": IGNORED}
    batch = {}
    for name in items[0]:
        values = [torch.as_tensor(item[name]) for item in items]
        batch[name] = (
            torch.stack(values)
            if values[0].dim() == 0
            else pad_sequence(values, batch_first=True, padding_value=fill.get(name, 0))
        )
    return batch


def padding_token(loaded: LoadedModel) -> int:
    """The model's own, by which decoders that classify find the last token; or the tokenizer's, or one that
    padding does no harm with, being masked."""
    tokenizer = loaded.require_tokenizer()
    own = (loaded.model.config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(token) for token in own if token is not None)


def sample_of(loaded: LoadedModel, item: Item) -> Samples:
    """An item as inputs of the model alone, to compare two models on."""
    inputs = {"input_ids": torch.tensor([item["input_ids"]])}
    if loaded.model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([item["labels"]])
    return Samples(inputs)


def _text_items(loaded: LoadedModel, method: Losparse, seqlen: int) -> list[Item]:
    """A text in blocks of `seqlen` tokens that do not overlap, each beginning as the tokenizer's texts do."""
    require_context(loaded, seqlen)
    tokenizer = loaded.require_tokenizer()
    if method.text_columns is not None:
        rows = _rows(method, "a text")
        (column,) = _found(rows[0], [method.columns[:1]], "a text", "--text-columns")
        text = "\n\n".join(str(row[column]) for _, row in rows if row.get(column))
    else:
        text = read_text(_file(method), split="train", option="--train", tokenizer=tokenizer)
    bos = beginning_token(tokenizer)
    first = [] if bos is None else [bos]
    tokens, length = tokenize(tokenizer, text), seqlen - len(first)
    count = len(tokens) // length
    if count == 0:
        raise InputError(
            f"--train: {method.train} has {len(tokens)} tokens, one item needs {length}; give a longer text "
            "or a smaller --seqlen"
        )
    blocks = tokens[: count * length].view(count, length).tolist()
    return [{"input_ids": first + block, "labels": first + block} for block in blocks]


def _labelled_items(loaded: LoadedModel, method: Losparse, seqlen: int) -> list[Item]:
    examples, tokenizer, config = read_examples(method), loaded.require_tokenizer(), loaded.model.config
    label_names(examples)
    names: dict[str, Any] = dict(config.label2id or {})
    classes, items = int(config.num_labels or 0), list[Item]()
    for example in examples:
        label = label_number(example.label, names)
        if label is None or label >= classes:
            raise InputError(
                f"--train: {example.place}: label {example.label!r:.60} is none of {listed(names)} or of 0 "
                f"to {classes - 1}, the labels of the model's head"
            )
        encoded = _encoded(tokenizer, example.texts, _length(loaded, seqlen))
        items.append({**encoded, "labels": label})
    return items


def _pair_items(loaded: LoadedModel, method: Losparse, seqlen: int) -> list[Item]:
    rows, tokenizer = _rows(method, "a source and a target text"), loaded.require_tokenizer()
    known = [p for p in _PAIRS if method.target_column in (None, p[1])]
    if method.text_columns is not None:
        known = [(method.columns[0], method.target_column or target) for target in ("target", "summary")]
    elif method.target_column is not None:
        known = [(source, method.target_column) for source in ("source", "text", "document", "article")]
    columns = _found(rows[0], known, "a source and a target text", "--text-columns and --target-column")
    items, length = [], _length(loaded, seqlen)
    for place, row in rows:
        source, target = (row.get(name) for name in columns)
        if not (isinstance(source, str) and isinstance(target, str) and source.strip() and target.strip()):
            raise InputError(
                f"--train: {place}: expected texts in {' and '.join(columns)}, one is missing; fill it in, "
                "or leave the row out"
            )
        labels = tokenizer(text_target=target, truncation=True, max_length=length).input_ids
        items.append({**_encoded(tokenizer, (source,), length), "labels": labels})
    return items


def _encoded(tokenizer: Tokenizer, texts: tuple[str, ...], length: int) -> Item:
    names = {"input_ids", "attention_mask", "token_type_ids"}
    found = tokenizer(*texts, truncation=True, max_length=length)
    return {name: value for name, value in found.items() if name in names}


def _length(loaded: LoadedModel, seqlen: int) -> int:
    return min(seqlen, loaded.context_length or seqlen)


def _file(method: Losparse) -> str:
    assert method.train is not None, "refused before the model was loaded"
    return method.train


def _rows(method: Losparse, what: str) -> list[tuple[str, dict[str, Any]]]:
    """Every row with its place. Raises: InputError."""
    rows = rows_of_file(_file(method), "--train", what)
    return [(place, _fields(row, place, what)) for place, row in rows]


def _fields(row: Row, place: str, what: str) -> dict[str, Any]:
    if isinstance(row, str):
        raise InputError(f"--train: {place}: expected columns with {what}, got a text alone")
    return row


def _found(
    first: tuple[str, dict[str, Any]], known: Sequence[tuple[str, ...]], what: str, option: str
) -> tuple[str, ...]:
    """The first columns among those known that the first row has. Raises: InputError if it has none."""
    place, row = first
    found = next((names for names in known if all(name in row for name in names)), None)
    if found is None:
        names = ", ".join("+".join(names) for names in known)
        raise InputError(
            f"--train: {place}: expected {what} in {names or 'columns'}, got the columns {listed(row)}; name "
            f"them with {option}"
        )
    return found
