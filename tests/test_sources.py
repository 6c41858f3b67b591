"""Calibration data as people have it: what is read of which file, and what is refused with which way on."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import shutil
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
import torch
from pyarrow import parquet
from transformers import PreTrainedTokenizerFast

from lrsd.data.rows import LARGEST_TEXT
from lrsd.data.sources import read_content, read_labelled, read_pairs, read_text, text_identity
from lrsd.data.tokens import calibration_samples
from lrsd.errors import InputError
from lrsd.evaluate import evaluate
from lrsd.model.kinds.causal import Causal
from lrsd.model.load import load_model
from lrsd.progress import Progress
from lrsd.settings import Calibration

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
MESSAGES = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}]
ROWS = [{"text": "One, two."}, {"text": "Drei ä\nvier."}]
TEXT = "One, two.\n\nDrei ä\nvier."


def text_of(path: Path, tokenizer: Any = None) -> str:
    return read_text(str(path), split="train", option="--calib", tokenizer=tokenizer)


def written(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, [*rows[0]], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def parquet_file(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def array_file(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows, indent=1).encode()


FILES: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "rows.jsonl": lambda rows: lines(*rows).encode(),
    "rows.ndjson": lambda rows: lines(*rows).encode(),
    "lines.json": lambda rows: lines(*rows).encode(),
    "array.json": array_file,
    "rows.csv": lambda rows: table(rows, ","),
    "rows.tsv": lambda rows: table(rows, "\t"),
    "rows.parquet": parquet_file,
    "UPPER.JSONL": lambda rows: lines(*rows).encode(),
}
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
}  # fmt: skip


@contextmanager
def at_most(memory: int) -> Iterator[None]:
    """Fails where Python takes more bytes than that, and be it for a moment."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < memory
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def chatting(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    changed = deepcopy(tokenizer)
    changed.chat_template = TEMPLATE
    return changed


# --- files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", *COMPRESSORS])
@pytest.mark.parametrize("name", FILES)
def test_the_same_rows_are_the_same_text_in_every_kind_of_file(
    name: str, suffix: str, tmp_path: Path
) -> None:
    content = COMPRESSORS.get(suffix, bytes)(FILES[name](ROWS))
    assert text_of(written(tmp_path / (name + suffix), content)) == TEXT


@pytest.mark.parametrize("name", FILES)
def test_pairs_and_labels_are_read_of_every_kind_of_file(name: str, tmp_path: Path) -> None:
    pairs = [{"source": "a\nb", "target": "c"}, {"source": "d", "target": "e"}]
    path = written(tmp_path / f"{name}.gz", gzip.compress(FILES[name](pairs)))
    assert read_pairs(str(path)) == [("a\nb", "c"), ("d", "e")]
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    path = written(tmp_path / f"{name}.xz", lzma.compress(FILES[name](rows)))
    assert [row[:2] for row in read_labelled(str(path))] == [(("a",), "1"), (("b",), "0")]
    rows = [{"premise": "a", "hypothesis": "b", "label": True}] * 2
    path = written(tmp_path / f"pairs-{name}.xz", lzma.compress(FILES[name](rows)))
    assert read_labelled(str(path))[0].texts == ("a", "b")


def test_an_array_may_hold_texts(tmp_path: Path) -> None:
    assert text_of(written(tmp_path / "rows.json", ' [ "a" , "b" ] \n')) == "a\n\nb"


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
    ],
)  # fmt: skip
def test_byte_order_marks_are_no_text(mark: bytes, encoding: str, tmp_path: Path) -> None:
    def marked(name: str, text: str) -> Path:
        return written(tmp_path / name, mark + text.encode(encoding))

    assert text_of(marked("prose.txt", "Drei ä")) == "Drei ä"
    assert text_of(marked("rows.jsonl", lines(*ROWS))) == TEXT
    assert text_of(marked("rows.json", json.dumps(ROWS))) == TEXT
    assert text_of(marked("rows.csv", "text\nDrei ä\n")) == "Drei ä"
    assert read_pairs(str(marked("pairs.jsonl", lines({"source": "a", "target": "b"})))) == [("a", "b")]
    assert read_labelled(str(marked("rows.csv", "text,label\na,1\n")))[0][:2] == (("a",), "1")


def test_blank_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", '\n{"text": "a"}\n \r\n{"text": "b"}\n\n')
    assert text_of(path) == "a\n\nb"
    path = written(tmp_path / "rows.jsonl", '\n{"text": "a"}\n\n{"text": 7}\n')
    with pytest.raises(InputError, match=r"rows.jsonl:4: 'text': expected a text or a chat, got int"):
        text_of(path)
    path = written(tmp_path / "rows.jsonl", '\n{"source": "a", "target": "b"}\n\n{"target": "c"}\n')
    with pytest.raises(InputError, match=r"rows.jsonl:4: expected an object with texts as"):
        read_pairs(str(path))
    path = written(tmp_path / "rows.jsonl", '\n{"text": "a", "label": 1}\n\n{"text": "b"}\n')
    with pytest.raises(InputError, match=r'rows.jsonl:4: expected fields "text" and "label" .* got text$'):
        read_labelled(str(path))


@pytest.mark.parametrize("name", ["array.json", "rows.csv", "rows.tsv", "rows.parquet"])
def test_rows_are_counted_from_one(name: str, tmp_path: Path) -> None:
    rows = [{"text": "a\nb", "label": "1"}, {"text": "c", "label": "2"}, {"text": "", "label": "3"}]
    path = written(tmp_path / name, FILES[name](rows))
    with pytest.raises(InputError, match=rf"{name}:3: expected fields"):
        read_labelled(str(path))
    path = written(tmp_path / name, FILES[name](rows[:2]))
    assert [row.place for row in read_labelled(str(path))] == [f"{path}:1", f"{path}:2"]


def test_prose_is_read_as_it_is(tmp_path: Path) -> None:
    for name in ("prose.txt", "prose.raw", "prose.md", "prose"):
        text = '\n[{"text": "a"}]\n\n{"messages": []}\n'
        assert text_of(written(tmp_path / name, text)) == text
        assert text_of(written(tmp_path / f"{name}.gz", gzip.compress(text.encode()))) == text


def test_fields_of_a_table_may_be_long_and_the_limit_of_others_stays(tmp_path: Path) -> None:
    limit = csv.field_size_limit(1000)
    try:
        assert len(text_of(written(tmp_path / "rows.csv", "text\n" + "a b " * 10**5))) == 4 * 10**5
        assert csv.field_size_limit() == 1000
    finally:
        csv.field_size_limit(limit)


def test_unquoted_texts_in_a_table_are_refused_not_cut(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.csv", "text\nOne\nOne, two.\n")
    with pytest.raises(InputError, match=r"rows.csv:2: expected 1 fields .* got more; put quotes"):
        text_of(path)
    path = written(tmp_path / "rows.tsv", 'text\n"One\ntwo\n')
    with pytest.raises(InputError, match=r"rows.tsv: line 3 is no row of a table \(unexpected end"):
        text_of(path)


def test_the_identity_is_that_of_the_file(tmp_path: Path) -> None:
    one = written(tmp_path / "one.jsonl", lines(*ROWS))
    other = written(tmp_path / "other.jsonl", "\n" + lines(*ROWS))
    assert text_of(one) == text_of(other)
    assert text_identity(str(one)) != text_identity(str(other))


# --- compression ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_damaged_streams_are_refused(suffix: str, tmp_path: Path) -> None:
    whole = COMPRESSORS[suffix](TEXT.encode() * 100)
    for content in (whole[:-9], b"no stream", whole[:20] + b"?" * 20 + whole[40:]):
        with pytest.raises(InputError, match=rf"text.txt{suffix} cannot be read \("):
            text_of(written(tmp_path / f"text.txt{suffix}", content))


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("name", ["text.txt", "rows.jsonl", "rows.parquet"])
def test_a_bomb_does_not_fill_memory(name: str, suffix: str, tmp_path: Path) -> None:
    """4 GiB, in streams one after the other, of which each kind may have many."""
    path = written(tmp_path / (name + suffix), COMPRESSORS[suffix](b" " * 2**24) * 2**8)
    with (
        at_most(4 * LARGEST_TEXT),
        pytest.raises(InputError, match=r"more than 67,108,864 bytes once decompressed.* give an excerpt"),
    ):
        text_of(path)


def test_a_bomb_of_parquet_does_not_fill_memory(tmp_path: Path) -> None:
    """2^15 rows of the same 2^17 characters, which its dictionary holds once."""
    path, word = tmp_path / "rows.parquet", pyarrow.array(["x" * 2**17])
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 2**15, pyarrow.int32()), word)
    parquet.write_table(pyarrow.table({"text": column}), path)
    assert path.stat().st_size < 10**6
    with (
        at_most(4 * LARGEST_TEXT),
        pytest.raises(InputError, match="more than 67,108,864 bytes once decompressed"),
    ):
        text_of(path)


def test_zst_without_a_library_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("compression", "compression.zstd", "zstandard"):
        monkeypatch.setitem(sys.modules, name, None)
    path = written(tmp_path / "rows.jsonl.zst", b"\x28\xb5\x2f\xfd")
    with pytest.raises(InputError, match=r"rows.jsonl.zst: .zst is read .* pip install zstandard"):
        text_of(path)


def test_zst_is_read_where_there_is_a_library(tmp_path: Path) -> None:
    compress = pytest.importorskip("zstandard").compress
    halves = [compress(lines(row).encode()) for row in ROWS]
    assert text_of(written(tmp_path / "rows.jsonl.zst", b"".join(halves))) == TEXT
    for content in (b"".join(halves)[:-5], halves[0] + b"no frame"):
        with pytest.raises(InputError, match=r"rows.jsonl.zst cannot be read \("):
            text_of(written(tmp_path / "rows.jsonl.zst", content))
    path = written(tmp_path / "rows.jsonl.zst", compress(b" " * 2**24) * 2**8)
    with (
        at_most(4 * LARGEST_TEXT),
        pytest.raises(InputError, match="more than 67,108,864 bytes once decompressed"),
    ):
        text_of(path)


# --- fields ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"id": 3, "text": "a", "content": "b"}, "a"),
        ({"content": "a", "prompt": "b", "response": "c"}, "a"),
        ({"completion": "b", "prompt": "a"}, "a\n\nb"),
        ({"prompt": "a", "response": "b"}, "a\n\nb"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "a\n\nb"),
        ({"instruction": "a", "input": "b", "output": "c"}, "a\n\nb\n\nc"),
        ({"instruction": "a", "input": "", "output": "c"}, "a\n\nc"),
        ({"instruction": "a", "output": "c"}, "a\n\nc"),
        ({"question": "a", "answer": "b"}, "a\n\nb"),
        ({"text": None, "question": "a", "answer": "b"}, "a\n\nb"),
        ({"prompt": "a", "messages": MESSAGES}, "Hi.\n\nHo."),
    ],
)
def test_a_row_is_the_text_of_its_fields(row: dict[str, Any], text: str, tmp_path: Path) -> None:
    assert text_of(written(tmp_path / "rows.jsonl", lines(row))) == text
    assert text_of(written(tmp_path / "rows.parquet", parquet_file([row]))) == text


def test_unknown_columns_are_named_with_those_known(tmp_path: Path) -> None:
    for name, content in (("rows.csv", "id,body\n1,a\n"), ("rows.jsonl", lines({"id": 1, "body": "a"}))):
        with pytest.raises(InputError, match=rf"{name}:1: .* text, content, .*; got the fields id, body; re"):
            text_of(written(tmp_path / name, content))
    many = {f"{n}" * 100: n for n in range(10, 99)}
    with pytest.raises(InputError, match="and 77 more") as error:
        text_of(written(tmp_path / "rows.jsonl", lines(many)))
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("empty", [None, "", []])
def test_rows_without_text_are_skipped_and_refused_if_nothing_is_left(empty: object, tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", lines({"text": empty}, {"text": "a"}, {"messages": empty}))
    assert text_of(path) == "a"
    with pytest.raises(
        InputError, match=r"--calib: .*rows.jsonl holds no text; expected prose, or rows with"
    ):
        text_of(written(tmp_path / "rows.jsonl", lines({"text": empty}, {"messages": empty})))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": ["a", "b"]}, r"1: 'text': .* got a list of str; join its texts into one"),
        ({"text": [1]}, r"1: 'text': .* got a list of int;"),
        ({"messages": [{"who": "a", "said": "b"}]}, r"1: 'messages': .* got a list of dict with who, said;"),
        ({"messages": [{"role": "user", "content": 7}]}, "1: 'messages': message 1: .* got int; write it as"),
        ({"messages": {"role": ["user"], "content": ["a"]}}, "1: 'messages': .* got dict; write it as text"),
        ({"prompt": "a", "chosen": MESSAGES}, "1: expected texts or chats, got both"),
        (7, "1: expected a JSON object or a text, got int"),
        (["a"], "1: expected a JSON object or a text, got list; an array of rows is read from a .json file"),
    ],
)
def test_fields_that_are_no_text_are_refused(row: object, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"rows.jsonl:{says}"):
        text_of(written(tmp_path / "rows.jsonl", lines(row)))


# --- chats ----------------------------------------------------------------------------------------------


PARTS = [{"type": "text", "text": "H"}, {"type": "image", "text": "no"}, {"type": "text", "text": "i."}]
CHATS = {
    "messages": {"messages": MESSAGES},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Ho."}]},
    "call": {"messages": [MESSAGES[0], {"role": "assistant", "content": None}, {"role": "x"}, MESSAGES[1]]},
    "preference": {"prompt": MESSAGES[:1], "chosen": MESSAGES[1:], "rejected": MESSAGES[:1]},
    "text": {"text": MESSAGES},
}


@pytest.mark.parametrize("name", ["rows.jsonl", "array.json", "rows.parquet"])
@pytest.mark.parametrize("chat", CHATS)
def test_chats_are_written_by_the_template(
    chat: str,
    name: str,
    chatting: PreTrainedTokenizerFast,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    path = written(tmp_path / name, FILES[name]([CHATS[chat], CHATS[chat]]))
    once = "<user>Hi.</s><assistant>Ho.</s>"
    assert text_of(path, chatting) == f"{once}\n\n{once}"
    assert text_of(path, tokenizer) == "Hi.\n\nHo.\n\nHi.\n\nHo."


def test_of_parts_those_of_text_are_read(chatting: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", lines({"messages": [{"role": "user", "content": PARTS}]}))
    assert text_of(path, chatting) == "<user>H\n\ni.</s>"


def test_what_a_template_refuses_is_told_with_its_row(
    chatting: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    strict = deepcopy(chatting)
    strict.chat_template = "{{ raise_exception('Roles\nmust alternate') }}"
    path = written(tmp_path / "rows.jsonl", lines({"text": "a"}, CHATS["messages"]))
    with pytest.raises(InputError, match=r"rows.jsonl:2: .*\(Roles must alternate\); leave the row out"):
        text_of(path, strict)


def test_models_are_calibrated_and_evaluated_on_chats_as_their_template_has_them(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """As on a text of what the template writes."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    chats = written(tmp_path / "rows.jsonl", lines(*[CHATS["messages"]] * 30))
    prose = written(tmp_path / "prose.txt", "\n\n".join(["<user>Hi.</s><assistant>Ho.</s>"] * 30))
    loaded = load_model(str(model))
    of_chats, of_prose = (
        calibration_samples(loaded, "", Calibration(calib=str(path), samples=4, seqlen=16), Progress())
        for path in (chats, prose)
    )
    assert torch.equal(of_chats.inputs["input_ids"], of_prose.inputs["input_ids"])
    found, expected = evaluate(str(model), (str(chats), str(prose)), seqlen=16).perplexity
    assert replace(found, text="") == replace(expected, text="")


# --- files that hold no text ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "one.json",
            '{"data": [],\n "version": 1}',
            "got one dict with the fields data, version; put the ar",
        ),
        ("one.json", '{"text": "a"}\n', "one.json: expected a JSON array.* got one dict"),
        ("one.json", "7", "one.json: expected a JSON array.* got one int"),
        ("bad.json", '{"text": "a"', r"bad.json: expected a JSON array, or a line of JSON per row \("),
        ("bad.json", '[{"text": "a"}, {"text"]', r"bad.json:2: expected an element of a JSON array \("),
        ("bad.json", '["a" "b"]', "bad.json:1: expected a comma or the end"),
        ("bad.json", '["a"', "bad.json:1: expected a comma or the end"),
        ("bad.json", '["a"]\n["b"]', "bad.json: expected one JSON array, more follows its end"),
        ("deep.json", "[" * 10**5, "deep.json:1: expected an element"),
        ("rows.arrow", b"ARROW1", r"rows.arrow: Arrow files are not read; .*to_parquet"),
        ("rows.parquet", b"PAR1", r"rows.parquet is not readable Parquet \("),
        ("prose.txt", b"a\0b", r"prose.txt is no text, it holds NUL characters \(the first is number 2\)"),
        ("prose.txt", "ab".encode("utf-16-le"), "UTF-16 is read where it begins with a byte order mark"),
        ("prose.txt", codecs.BOM_UTF16_LE + b"a", "prose.txt is not UTF-16 text"),
        (
            "prose.txt",
            gzip.compress(b"a", mtime=0),
            r"prose.txt is not UTF-8 text .* its name end in .gz, .bz2, .xz",
        ),
        ("prose.txt", " \n\n", "prose.txt holds no text; expected prose"),
        ("rows.jsonl", "\n", "rows.jsonl holds no text"),
        ("rows.json", "[]", "rows.json holds no text"),
        ("rows.csv", "text\n", "rows.csv holds no text"),
        ("rows.csv", "", "rows.csv holds no text"),
        ("rows.parquet", parquet_file([{"text": None}]), "rows.parquet holds no text"),
    ],
)
def test_files_that_hold_no_text_are_refused(name: str, content: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says) as error:
        text_of(written(tmp_path / name, content))
    assert "\n" not in str(error.value)


def test_files_that_are_missing_are_not_taken_for_data_sets() -> None:
    for name in ("data/rows.parquet", "data/rows.jsonl.gz", "data/rows.json", "data/prose.txt"):
        with pytest.raises(InputError, match=f"--calib: no file '{name}'"):
            text_of(Path(name))


# --- hub data sets --------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The rows of whatever data set is asked for."""
    rows: list[dict[str, Any]] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: rows)
    return rows


def test_rows_of_a_data_set_are_read_as_those_of_a_file(
    hub: list[dict[str, Any]], chatting: PreTrainedTokenizerFast
) -> None:
    hub += [{"text": None}, {"question": "a", "answer": "b"}, CHATS["messages"]]
    content = read_content("owner/name", Causal(), split="train", option="--calib", tokenizer=chatting)
    assert content == "a\n\nb\n\n<user>Hi.</s><assistant>Ho.</s>"
    hub += [{"body": "a"}]
    with pytest.raises(InputError, match=r"--calib: owner/name:4: expected a text in .* the fields body"):
        text_of(Path("owner/name"))
    hub[:] = [{"text": None}]
    with pytest.raises(InputError, match="--calib: owner/name holds no text"):
        text_of(Path("owner/name"))


def test_published_texts_keep_their_empty_rows(hub: list[dict[str, Any]]) -> None:
    hub += [{"text": ""}, {"text": " = Title = \n"}, {"text": ""}, {"text": "Body"}]
    assert text_of(Path("wikitext")) == "\n\n = Title = \n\n\n\n\nBody"


@pytest.mark.parametrize(
    ("name", "split", "asked", "read"),
    [
        ("c4", "test", ("allenai/c4", "en", "validation"), " ".join(str(n) for n in range(1100))),
        ("c4", "train", ("allenai/c4", "en", "train"), "\n\n".join(str(n) for n in range(1200))),
        ("ptb", "test", ("ptb-text-only/ptb_text_only", None, "test"), " ".join(str(n) for n in range(1200))),
        ("wikitext", "test", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"), None),
    ],
)
def test_known_texts_are_read_as_published(
    monkeypatch: pytest.MonkeyPatch, name: str, split: str, asked: tuple[str, ...], read: str | None
) -> None:
    """Of the split that there is: C4 has no "test"."""
    found = []

    def load(path: str, configuration: str | None, *, split: str, **options: Any) -> list[dict[str, str]]:
        found.append((path, configuration, split))
        return [{"text": str(n), "sentence": str(n)} for n in range(1200)]

    monkeypatch.setattr(datasets, "load_dataset", load)
    text = read_text(name, split=split, option="--ppl")
    assert found == [asked]
    assert read is None or text == read
