"""The law: whatever is wrong with the input, it ends in one clear line on stderr, exit code 1 or 2,
and nothing written. Most cases run in this process, through the same `main` as the command.
"""

import json
import logging
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from gguf_files import write_header
from lrsd_cli.main import main
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, PretrainedConfig

# What a log line of the progress looks like: "observe: 2/2 model.layers.1 (0 s)".
_PROGRESS = re.compile(
    r"[\w ./-]+: (\d+ steps|\d+/\d+ .*\(\d+ s\))|needs about .* min|[-\dT:+]+ .*: lrsd .* threads: lrsd .*"
)
# Small enough that a run which should have failed earlier costs little.
_SMALL = ("--samples", 8, "--seqlen", 32)


class Place(NamedTuple):
    """Where a case builds its input: an empty directory, a good model, a good text, a good checkpoint."""

    directory: Path
    model: Path
    text: Path
    compressed: Path

    def copy(self, source: Path) -> Path:
        return Path(shutil.copytree(source, self.directory / "copy"))


class Outcome(NamedTuple):
    code: int
    stdout: str
    stderr: str


Arguments = tuple[object, ...]
Case = Callable[[Place], Arguments]


@pytest.fixture(scope="module")
def compressed(tiny_model_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("compressed") / "checkpoint"
    arguments = compress(tiny_model_dir, text_file, "-o", output)
    with pytest.MonkeyPatch.context() as patch:
        assert _exit_code(patch, arguments) == 0
    return output


@pytest.fixture
def place(tmp_path: Path, tiny_model_dir: Path, text_file: Path, compressed: Path) -> Place:
    (tmp_path / "input").mkdir()
    (tmp_path / "output").mkdir()
    return Place(tmp_path / "input", tiny_model_dir, text_file, compressed)


def compress(model: object, text: object, *options: object) -> Arguments:
    return ("compress", model, "--ratio", "1.25x", "--calib", text, *_SMALL, *options)


def evaluate(model: object, text: object, *options: object) -> Arguments:
    return ("eval", model, "--ppl", text, "--seqlen", 32, "--windows", 2, *options)


# --- models ---------------------------------------------------------------------------------------


def missing_directory(place: Place) -> Arguments:
    return compress(place.directory / "nowhere", place.text)


def missing_relative_directory(place: Place) -> Arguments:
    return compress("./nowhere/model", place.text)


def missing_gguf(place: Place) -> Arguments:
    return compress(place.directory / "nowhere.gguf", place.text)


def missing_model_to_evaluate(place: Place) -> Arguments:
    return evaluate(place.directory / "nowhere", place.text)


def missing_dense_model(place: Place) -> Arguments:
    return evaluate(place.model, place.text, "--kl", place.directory / "nowhere")


def a_file_as_model(place: Place) -> Arguments:
    return compress(place.text, place.text)


def empty_directory_as_model(place: Place) -> Arguments:
    return compress(place.directory, place.text)


def garbage_gguf(place: Place) -> Arguments:
    path = place.directory / "garbage.gguf"
    path.write_bytes(b"this is not a model" * 100)
    return compress(path, place.text)


def empty_gguf(place: Place) -> Arguments:
    path = place.directory / "empty.gguf"
    path.touch()
    return compress(path, place.text)


def truncated_gguf(place: Place) -> Arguments:
    return compress(_gguf(place.directory, "llama", keep=0.6), place.text)


def gguf_of_unknown_architecture(place: Place) -> Arguments:
    return compress(_gguf(place.directory, "nonesuch", keep=1.0), place.text)


def a_part_of_a_gguf(place: Place) -> Arguments:
    fields = {"split.no": 1, "split.count": 3}
    path = write_header(place.directory / "m-00002-of-00003.gguf", "llama", fields)
    return compress(path, place.text)


def gguf_of(architecture: str, kind: str) -> Case:
    def case(place: Place) -> Arguments:
        path = write_header(place.directory / "model.gguf", architecture, {"general.type": kind})
        return compress(path, place.text)

    return case


def a_directory_of_gguf_files(place: Place) -> Arguments:
    _gguf(place.directory, "llama", keep=1.0)
    return compress(place.directory, place.text)


def gguf_files_beside_a_config(place: Place) -> Arguments:
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(_gguf(place.directory, "llama", keep=1.0), place.directory / name)
    shutil.copy(place.model / "config.json", place.directory)
    return compress(place.directory, place.text)


def pointer(name: str) -> Case:
    """A clone without git-lfs."""

    def case(place: Place) -> Arguments:
        model = place.copy(place.model)
        (model / name).write_text(
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n"
        )
        return compress(model / name if name.endswith(".gguf") else model, place.text)

    return case


def _gguf(directory: Path, architecture: str, keep: float) -> Path:
    from gguf import GGUFWriter

    path = directory / "model.gguf"
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", torch.zeros(64, 64).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.truncate(path, int(keep * path.stat().st_size))
    return path


def missing_tokenizer(place: Place) -> Arguments:
    model = place.copy(place.model)
    for path in model.glob("tokenizer*"):
        path.unlink()
    return compress(model, place.text)


def damaged_tokenizer(place: Place) -> Arguments:
    model = place.copy(place.model)
    (model / "tokenizer.json").write_text('{"version": "1.0"')
    return compress(model, place.text)


def missing_weights(place: Place) -> Arguments:
    model = place.copy(place.model)
    (model / "model.safetensors").unlink()
    return compress(model, place.text)


def truncated_weights(place: Place) -> Arguments:
    model = place.copy(place.model)
    os.truncate(model / "model.safetensors", (model / "model.safetensors").stat().st_size // 2)
    return compress(model, place.text)


def truncated_header(place: Place) -> Arguments:
    model = place.copy(place.model)
    os.truncate(model / "model.safetensors", 100)
    return compress(model, place.text)


def weights_of_another_shape(place: Place) -> Arguments:
    return compress(_edit_json(place.copy(place.model), "config.json", hidden_size=128), place.text)


def missing_tensor(place: Place) -> Arguments:
    model = place.copy(place.model)
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return compress(model, place.text)


def nan_in_a_weight(place: Place) -> Arguments:
    return compress(_poison(place, "model.layers.1.mlp.up_proj.weight", torch.nan), place.text)


def infinity_in_a_weight(place: Place) -> Arguments:
    return compress(_poison(place, "model.layers.0.self_attn.q_proj.weight", torch.inf), place.text)


def nan_in_the_embedding(place: Place) -> Arguments:
    return compress(_poison(place, "model.embed_tokens.weight", torch.nan), place.text)


def nan_in_an_evaluated_weight(place: Place) -> Arguments:
    return evaluate(_poison(place, "model.layers.1.mlp.up_proj.weight", torch.nan), place.text)


def _poison(place: Place, name: str, value: float) -> Path:
    model = place.copy(place.model)
    tensors = load_file(model / "model.safetensors")
    tensors[name][3, 5] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


def config_is_not_json(place: Place) -> Arguments:
    model = place.copy(place.model)
    (model / "config.json").write_text("{")
    return compress(model, place.text)


def config_of_unknown_architecture(place: Place) -> Arguments:
    return compress(_edit_json(place.copy(place.model), "config.json", model_type="nonesuch"), place.text)


def config_without_a_kind(place: Place) -> Arguments:
    model = place.copy(place.model)
    (model / "config.json").write_text("{}")
    return compress(model, place.text)


def config_with_a_wrong_type(place: Place) -> Arguments:
    return compress(_edit_json(place.copy(place.model), "config.json", hidden_size="many"), place.text)


def config_of_an_encoder(place: Place) -> Arguments:
    return compress(_edit_json(place.copy(place.model), "config.json", model_type="t5"), place.text)


def already_compressed(place: Place) -> Arguments:
    return compress(place.compressed, place.text)


# --- texts ----------------------------------------------------------------------------------------


def missing_text(place: Place) -> Arguments:
    return compress(place.model, place.directory / "nowhere.txt")


def missing_evaluation_text(place: Place) -> Arguments:
    return evaluate(place.model, "nowhere.txt")


def a_directory_as_text(place: Place) -> Arguments:
    return compress(place.model, place.directory)


def short_text(place: Place) -> Arguments:
    return compress(place.model, _write(place, "short.txt", b"Too short."))


def empty_text(place: Place) -> Arguments:
    return compress(place.model, _write(place, "empty.txt", b""))


def empty_evaluation_text(place: Place) -> Arguments:
    return evaluate(place.model, _write(place, "empty.txt", b""))


def text_in_another_encoding(place: Place) -> Arguments:
    return compress(place.model, _write(place, "latin1.txt", "café".encode("latin-1") * 1000))


def json_lines_without_text(place: Place) -> Arguments:
    return compress(place.model, _write(place, "rows.jsonl", b'{"text": "good"}\n{"body": "bad"}\n'))


def json_lines_with_a_number(place: Place) -> Arguments:
    return compress(place.model, _write(place, "rows.jsonl", b'{"text": 7}\n'))


def broken_json_lines(place: Place) -> Arguments:
    return compress(place.model, _write(place, "rows.jsonl", b'{"text": "good"}\n{"text": \n'))


def fewer_windows_than_asked_for(place: Place) -> Arguments:
    return evaluate(place.model, place.text, "--windows", 100_000)


def windows_longer_than_the_model_reads(place: Place) -> Arguments:
    return evaluate(place.model, place.text, "--seqlen", 1000)


def samples_longer_than_the_model_reads(place: Place) -> Arguments:
    return compress(place.model, place.text, "--seqlen", 1000)


# --- settings -------------------------------------------------------------------------------------


def ratio(value: str) -> Case:
    return lambda place: compress(place.model, place.text, "--ratio", value)


def option(*words: object) -> Case:
    return lambda place: compress(place.model, place.text, *words)


def recipe(name: str, content: bytes) -> Case:
    return lambda place: compress(place.model, place.text, "--recipe", _write(place, name, content))


def a_text_under_two_names(place: Place) -> Arguments:
    return compress(place.model, place.text, "--calib", _write(place, "copy.txt", place.text.read_bytes()))


def no_output(place: Place) -> Arguments:
    return ("compress", place.model, "--ratio", "1.25x")


def unknown_command(place: Place) -> Arguments:
    return ("squeeze", place.model)


# --- compressed checkpoints -----------------------------------------------------------------------


def truncated_checkpoint(place: Place) -> Arguments:
    checkpoint = place.copy(place.compressed)
    os.truncate(checkpoint / "model.safetensors", (checkpoint / "model.safetensors").stat().st_size // 2)
    return evaluate(checkpoint, place.text)


def checkpoint_lacks_a_packed_tensor(place: Place) -> Arguments:
    return evaluate(_without_packed_tensor(place), place.text)


def exported_checkpoint_lacks_a_packed_tensor(place: Place) -> Arguments:
    return ("export", _without_packed_tensor(place), "--dense", place.directory.parent / "output" / "dense")


def _without_packed_tensor(place: Place) -> Path:
    checkpoint = place.copy(place.compressed)
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith(".coefficients"))]
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    return checkpoint


def checkpoint_lacks_its_shard(place: Place) -> Arguments:
    checkpoint = place.copy(place.compressed)
    (checkpoint / "model.safetensors").unlink()
    return ("export", checkpoint, "--dense", place.directory.parent / "output" / "dense")


def truncated_checkpoint_to_export(place: Place) -> Arguments:
    return (
        "export", truncated_checkpoint(place)[1], "--dense", place.directory.parent / "output" / "dense"
    )  # fmt: skip


def checkpoint_of_a_later_version(place: Place) -> Arguments:
    return ("inspect", _edit_json(place.copy(place.compressed), "lrsd.json", version=99))


def checkpoint_packed_by_a_later_version(place: Place) -> Arguments:
    packing = {"quant_method": "lrsd", "format_version": 99, "layers": {}}
    checkpoint = _edit_json(place.copy(place.compressed), "config.json", quantization_config=packing)
    return evaluate(checkpoint, place.text)


def checkpoint_with_a_damaged_manifest(place: Place) -> Arguments:
    checkpoint = place.copy(place.compressed)
    os.truncate(checkpoint / "lrsd.json", 200)
    return ("inspect", checkpoint)


def checkpoint_with_an_incomplete_manifest(place: Place) -> Arguments:
    return ("inspect", _edit_json(place.copy(place.compressed), "lrsd.json", layers={"x": {"rank": 1}}))


def checkpoint_packs_a_layer_that_is_none(place: Place) -> Arguments:
    packing = {"quant_method": "lrsd", "format_version": 1, "layers": {"model.nonesuch": {"rank": 1}}}
    checkpoint = _edit_json(place.copy(place.compressed), "config.json", quantization_config=packing)
    return evaluate(checkpoint, place.text)


def inspect_a_plain_model(place: Place) -> Arguments:
    return ("inspect", place.model)


def inspect_nothing(place: Place) -> Arguments:
    return ("inspect", place.directory / "nowhere")


def export_a_plain_model(place: Place) -> Arguments:
    return ("export", place.model, "--dense", place.directory.parent / "output" / "dense")


def export_nothing(place: Place) -> Arguments:
    return (
        "export", place.directory / "nowhere", "--dense", place.directory.parent / "output" / "dense"
    )  # fmt: skip


def plot_into_a_missing_directory(place: Place) -> Arguments:
    return ("inspect", place.compressed, "--plot", place.directory / "nowhere" / "layers.png")


def _edit_json(directory: Path, name: str, **changes: object) -> Path:
    content = json.loads((directory / name).read_text())
    (directory / name).write_text(json.dumps(content | changes))
    return directory


def _write(place: Place, name: str, content: bytes) -> Path:
    path = place.directory / name
    path.write_bytes(content)
    return path


# What the line must say, so that it helps; the exit code, 1 unless the command itself was wrong.
CASES: list[tuple[str, Case, str, int]] = [
    (case.__name__.replace("_", " "), case, says, 1)
    for case, says in [
        (missing_directory, "no such model directory"),
        (missing_relative_directory, "no such model directory"),
        (missing_gguf, "no such file"),
        (missing_model_to_evaluate, "no such model directory"),
        (missing_dense_model, "no such model directory"),
        (a_file_as_model, "expected a model directory"),
        (empty_directory_as_model, "config.json"),
        (garbage_gguf, "not a readable GGUF file"),
        (empty_gguf, "not a readable GGUF file"),
        (truncated_gguf, "not a readable GGUF file"),
        (gguf_of_unknown_architecture, "'nonesuch', which transformers does not load from GGUF; give"),
        (a_part_of_a_gguf, "is part 2 of 3 of a model; merge them first, with llama.cpp's llama-gguf-split "
         "--merge m-00001-of-00003.gguf WHOLE.gguf"),
        (a_directory_of_gguf_files, "holds its weights as GGUF; name the file: "),
        (gguf_files_beside_a_config, "/a.gguf, or another of its 3 GGUF files"),
        (missing_tokenizer, "tokenizer.json"),
        (damaged_tokenizer, "tokenizer.json"),
        (missing_weights, "no .safetensors file"),
        (truncated_weights, "cannot load"),
        (truncated_header, "cannot load"),
        (weights_of_another_shape, "config.json asks for"),
        (missing_tensor, "model.layers.0.mlp.up_proj.weight"),
        (nan_in_a_weight, "model.layers.1.mlp.up_proj.weight holds 1 non-finite"),
        (infinity_in_a_weight, "model.layers.0.self_attn.q_proj.weight holds 1 non-finite"),
        (nan_in_the_embedding, "model.embed_tokens.weight holds 1 non-finite"),
        (nan_in_an_evaluated_weight, "non-finite"),
        (config_is_not_json, "config.json"),
        (config_of_unknown_architecture, "nonesuch"),
        (config_without_a_kind, "cannot load"),
        (config_with_a_wrong_type, "'hidden_size' expected int"),
        (config_of_an_encoder, "cannot load"),
        (already_compressed, "already compressed"),
        (missing_text, "--calib"),
        (missing_evaluation_text, "--ppl"),
        (a_directory_as_text, "is a directory"),
        (short_text, "smaller --seqlen"),
        (empty_text, "empty.txt holds no text"),
        (empty_evaluation_text, "empty.txt holds no text"),
        (text_in_another_encoding, "latin1.txt is not UTF-8 text (byte 3)"),
        (json_lines_without_text, "answer; got the fields body; rename one"),
        (json_lines_with_a_number, "rows.jsonl:1"),
        (broken_json_lines, "rows.jsonl:2"),
        (fewer_windows_than_asked_for, "lower --windows"),
        (windows_longer_than_the_model_reads, "at most 256 tokens"),
        (samples_longer_than_the_model_reads, "at most 256 tokens"),
        (truncated_checkpoint, "cannot load"),
        (checkpoint_lacks_a_packed_tensor, ".coefficients"),
        (exported_checkpoint_lacks_a_packed_tensor, "coefficients"),
        (checkpoint_lacks_its_shard, "no .safetensors file"),
        (truncated_checkpoint_to_export, "model.safetensors"),
        (checkpoint_of_a_later_version, "version 99"),
        (checkpoint_packed_by_a_later_version, "version 99"),
        (checkpoint_with_a_damaged_manifest, "not readable JSON"),
        (checkpoint_with_an_incomplete_manifest, "not a complete lrsd manifest"),
        (checkpoint_packs_a_layer_that_is_none, "'model.nonesuch'"),
        (inspect_a_plain_model, "lrsd.json"),
        (inspect_nothing, "lrsd.json"),
        (export_a_plain_model, "not compressed by lrsd"),
        (export_nothing, "nowhere"),
        (plot_into_a_missing_directory, "layers.png"),
    ]
] + [
    (f"a pointer in place of {name}", pointer(name),
     f"{name} is a git-lfs pointer, three lines that stand for the file; run `git lfs pull` there", 1)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer.model", "model.gguf")
] + [
    ("an adapter as GGUF", gguf_of("llama", "adapter"), "LoRA adapter; merge it into its base model", 1),
    ("an imatrix as GGUF", gguf_of("llama", "imatrix"),
     "an importance matrix for llama.cpp's quantizer; give the model", 1),
    ("a projector as GGUF", gguf_of("clip", "model"),
     "projector of images or sound; give the language model's file", 1),
    ("a GGUF of a type from nowhere", gguf_of("llama", "riddle"), "'riddle'; give a model", 1),
    ("ratio 0.5x", ratio("0.5x"), "above 1x", 2),
    ("ratio 1x", ratio("1x"), "above 1x", 2),
    ("ratio 120%", ratio("120%"), "above 1x", 2),
    ("ratio 0%", ratio("0%"), "1.25x, 1.25 or 80%", 2),
    ("ratio abc", ratio("abc"), "1.25x, 1.25 or 80%", 2),
    ("ratio nan", ratio("nan"), "1.25x, 1.25 or 80%", 2),
    ("ratio below the floor", ratio("1000x"), "try a ratio below", 1),
    ("no ratio", lambda place: ("compress", place.model), "--ratio", 2),
    ("no output", no_output, "--dry-run", 2),
    ("unknown command", unknown_command, "squeeze", 2),
    ("unknown option", option("--ration", 2), "--ratio", 2),
    ("unknown method", option("--method", "magic"), "svd-llm", 2),
    ("one sample", option("--samples", 1), "samples must be at least 2", 2),
    ("no tokens", option("--seqlen", 1), "seqlen must be at least 8", 2),
    ("negative seed", option("--seed", -1), "seed must be at least 0", 2),
    ("a text twice", lambda place: compress(place.model, place.text, "--calib", place.text),
     "twice; give each source once", 2),
    ("a text under two names", a_text_under_two_names, "hold the same; give each text once", 1),
    ("more texts than samples", option("--calib", "self", "--calib", "c4", "--samples", 2),
     "samples must be at least 3, one of each calib source", 2),
    ("no text in a recipe", recipe("r.json", b'{"calib": 3}'), "calib must be a list of texts", 2),
    ("samples in words", option("--samples", "many"), "not a valid integer", 2),
    ("rank in words", option("--rank", "high"), "auto, energy or a whole number", 2),
    ("rank in another script", option("--rank", "²"), "auto, energy or a whole number", 2),
    ("samples without end", option("--samples", 10**12), "more than 1,073,741,824 in all", 2),
    ("memory without end", option("--memory", "9" * 400 + "G"), "a size must look like", 2),
    ("rank 0 at 16 bit", option("--rank", 0, "--bits", 16), "rank must be at least 1", 2),
    ("option of another method", option("--method", "svd", "--structure", "row"),
     "method svd has no structure; leave it out, or use --method lrsd or gptq or ssd", 2),
    ("flag of another method", option("--method", "svd", "--mean-correction"), "no mean-correction", 2),
    ("block of no method typed", option("--block", 64), "method lrsd has no block", 2),
    ("choice of another method", option("--method", "gptq", "--bits", 16), "must be one of auto, 8, 6", 2),
    ("recipe of another method", recipe("r.json", b'{"method": "svd", "structure": "row"}'),
     "method svd has no structure", 2),
    ("allocation that is not the method's", option("--method", "ssd", "--allocation", "kl"),
     "method ssd shares bytes by one energy threshold, not by allocation kl", 2),
    ("structure of no such kind", option("--bits", "16", "--structure", "column,diagonal"),
     "structure must be auto, none, or some of column,row,block,2:4,unstructured, got 'column,diagonal'", 2),
    ("structure given twice", option("--bits", "16", "--structure", "row,row"),
     "structure must be auto, none", 2),
    ("share of no energy", option("--method", "ssd", "--energy", "2"), "energy must be auto or a share", 2),
    ("energy that is no number", option("--method", "ssd", "--energy", "much"),
     "energy must be auto or a share such as 0.9, got 'much'", 2),
    ("no columns per group", option("--coding", "fixed", "--group", 0), "group must be at least 1", 2),
    ("structure on top of codes", option("--structure", "row"), "add --bits 16, or --coding fixed", 2),
    ("shards in words", option("--shard-size", "large"), "5GB or 500MB", 2),
    ("unknown device", option("--device", "abacus"), "abacus", 1),
    ("absent device", option("--device", "cuda:99"), "cuda:99", 1),
    ("no recipe", option("--recipe", "nowhere.toml"), "nowhere.toml", 2),
    ("recipe with an unknown key", recipe("r.toml", b"color = 1"), "unknown setting 'color'", 2),
    ("recipe that is no TOML", recipe("r.toml", b"ratio: 2"), "neither TOML nor JSON", 2),
    ("recipe that is no JSON", recipe("r.json", b"{"), "neither TOML nor JSON", 2),
    ("recipe in another encoding", recipe("r.toml", b"# caf\xe9"), "neither TOML nor JSON", 2),
    ("recipe that is a list", recipe("r.json", b"[1]"), "no table", 2),
    ("recipe with a list as value", recipe("r.json", b'{"batch": [1, 2]}'), "batch", 2),
    ("recipe with a table as value", recipe("r.json", b'{"batch": {"a": 2}}'), "batch", 2),
    ("recipe with a wrong choice", recipe("r.json", b'{"method": "magic"}'), "magic", 2),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "says", "code"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_one_clear_line_and_nothing_written(
    case: Case,
    says: str,
    code: int,
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    arguments = case(place)
    output = place.directory.parent / "output"
    if arguments[0] == "compress" and case is not no_output:
        arguments = (*arguments, "-o", output / "new")
    before = _content(place.directory)

    outcome = _run(monkeypatch, capfd, arguments)

    assert says in _complaint(outcome, code)
    assert list(output.iterdir()) == []
    assert _content(place.directory) == before


def test_output_directory_that_is_not_empty_stays_as_it_is(
    place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (place.directory / "thesis.txt").write_text("years of work")
    for arguments in (
        (*compress(place.model, place.text), "-o", place.directory),
        (*compress(place.model, place.text), "-o", place.directory / "thesis.txt"),
        ("export", place.compressed, "--dense", place.directory),
    ):
        outcome = _run(monkeypatch, capfd, arguments)
        assert "choose another output directory" in _complaint(outcome, 1)
        assert _content(place.directory.parent) == {"input/thesis.txt": b"years of work"}


def test_an_output_that_nothing_can_be_renamed_to_is_refused_before_the_work(
    place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lrsd.compress.load_source", lambda *arguments: pytest.fail("work was begun"))
    (place.directory / "empty").mkdir()
    (place.directory / "link").symlink_to(place.directory / "empty")
    monkeypatch.chdir(place.directory / "empty")
    for output, says in (
        (place.directory / "link", "is a link"), (".", "is the current directory"),
        ("/", "has no name of its own"), ("..", "has no name of its own"), ("/proc", "is a mount point"),
    ):  # fmt: skip
        if output == "/proc" and not Path(output).is_mount():
            continue
        for arguments in (
            (*compress(place.model, place.text), "-o", output),
            ("export", place.compressed, "--dense", output),
        ):
            assert f"{says}; name one" in _complaint(_run(monkeypatch, capfd, arguments), 1)
    assert list((place.directory / "empty").iterdir()) == []


def test_model_without_linear_layers(
    place: Place,
    make_model: Callable[[PretrainedConfig], Path],
    tiny_llama: Callable[..., PretrainedConfig],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = make_model(tiny_llama(num_hidden_layers=0))
    output = place.directory / "new"
    outcome = _run(monkeypatch, capfd, (*compress(model, place.text), "-o", output))
    assert "linear layers" in _complaint(outcome, 1)
    assert list(place.directory.iterdir()) == []


def test_learned_positions_end_where_the_model_ends(
    place: Place,
    make_model: Callable[[PretrainedConfig], Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = make_model(
        GPT2Config(
            vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=1
        )
    )
    outcome = _run(monkeypatch, capfd, evaluate(model, place.text, "--seqlen", 65))
    assert "at most 64 tokens" in _complaint(outcome, 1)


def test_pickled_weights_are_never_opened(
    place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = place.copy(place.model)
    (model / "model.safetensors").unlink()
    canary = place.directory / "the pickle ran"
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(_Canary(canary)))
    for arguments in (
        (*compress(model, place.text), "-o", place.directory.parent / "output" / "new"),
        evaluate(model, place.text),
    ):
        assert "pickle (pytorch_model.bin)" in _complaint(_run(monkeypatch, capfd, arguments), 1)
    assert not canary.exists()
    assert list((place.directory.parent / "output").iterdir()) == []


class _Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_never_run(
    place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    canary = place.directory / "the code ran"
    model = place.copy(place.model)
    (model / "evil.py").write_text(f"from pathlib import Path\nPath({str(canary)!r}).touch()\n")
    classes = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    _edit_json(model, "config.json", model_type="evil", auto_map=classes)
    for arguments in (
        (*compress(model, place.text), "-o", place.directory.parent / "output" / "new"),
        evaluate(model, place.text),
    ):
        _complaint(_run(monkeypatch, capfd, arguments), 1)
    assert not canary.exists()
    assert list((place.directory.parent / "output").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "way_on"),
    [
        ("compress MODEL --ratio 2 --calib owner/nonesuch --seqlen 64 -o NEW", "--calib FILE"),
        ("compress MODEL --ratio 2 --calib wikitext --seqlen 64 -o NEW", "--calib FILE"),
        ("eval MODEL", "--ppl FILE"),
        ("eval owner/nonesuch --ppl TEXT", "owner/nonesuch, which is no directory here"),
        ("compress nowhere --ratio 2 -o NEW", "nowhere, which is no directory here"),
    ],
)
def test_nothing_on_the_network_can_be_reached(
    arguments: str,
    way_on: str,
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """HF_HUB_OFFLINE is set for all tests, see conftest.py."""
    monkeypatch.chdir(place.directory)
    known = {"MODEL": place.model, "TEXT": place.text, "NEW": place.directory / "new"}
    words = tuple(known.get(word, word) for word in arguments.split())
    assert way_on in _complaint(_run(monkeypatch, capfd, words), 1)
    assert list(place.directory.iterdir()) == []


@pytest.mark.slow
def test_a_process_of_its_own_complains_alike(place: Place, tmp_path: Path) -> None:
    """As users run it, with nothing in the cache."""
    command = [sys.executable, "-m", "lrsd_cli.main", "compress", place.model, "--ratio", "2", "-o", "new"]
    found = subprocess.run(
        [*command, "--calib", "wikitext", "--seqlen", "64"],
        env=os.environ | {"HF_HOME": str(tmp_path / "home")},
        cwd=place.directory, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "--calib FILE" in _complaint(Outcome(found.returncode, found.stdout, found.stderr), 1)
    assert list(place.directory.iterdir()) == []


def _run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], arguments: Arguments) -> Outcome:
    capfd.readouterr()
    code = _exit_code(monkeypatch, arguments)
    return Outcome(code, *capfd.readouterr())


def _exit_code(monkeypatch: pytest.MonkeyPatch, arguments: Arguments) -> int:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["lrsd", *map(str, arguments)])
        patch.setattr(signal, "signal", lambda number, handler: None)
        # Libraries keep the stderr of the moment they were imported in, which for tests is another one.
        for name in ("transformers", "datasets", "huggingface_hub"):
            for handler in logging.getLogger(name).handlers:
                if type(handler) is logging.StreamHandler:
                    patch.setattr(handler, "stream", sys.stderr)
        with pytest.raises(SystemExit) as end:
            main()
    return int(end.value.code or 0)


def _complaint(outcome: Outcome, code: int) -> str:
    """The one line on stderr that is no progress."""
    lines = [line for line in outcome.stderr.splitlines() if not _PROGRESS.fullmatch(line)]
    assert len(lines) == 1, outcome.stderr
    assert lines[0].startswith("lrsd: ")
    assert outcome.code == code
    assert outcome.stdout == ""
    return lines[0]


def _content(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }
