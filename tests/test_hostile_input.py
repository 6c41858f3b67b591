"""A checkpoint from a stranger: refused by name, at once, without memory for what it promises; nothing
outside its directory is read, and nothing in it is run. `scripts/fuzz.py` tries this by the thousand.
"""

import json
import os
import resource
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recipes import on
from safetensors.torch import load_file, save_file

from lrsd.checkpoint.manifest import read_manifest
from lrsd.checkpoint.verify import verify
from lrsd.compress import compress
from lrsd.data.sources import read_labelled, read_pairs, read_tensors, read_text
from lrsd.data.tokens import tokenize
from lrsd.errors import CheckpointError, InputError, LrsdError
from lrsd.export.dense import export_dense
from lrsd.intake.json import parse_json, read_json
from lrsd.intake.safetensors import INDEX_NAME, take_inventory
from lrsd.model.kinds.speech import Speech
from lrsd.model.load import load_model
from lrsd.recipe import Recipe
from lrsd.settings import Calibration
from lrsd.steps.observe import ObservedBlock
from lrsd.work.journal import JOURNAL, Journal
from lrsd.work.process import current_rss
from lrsd.work.records import read_record

UP_PROJ = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def compressed(tiny_model_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("hostile") / "compressed"
    calibration = Calibration(calib=str(text_file), samples=4, seqlen=32)
    compress(str(tiny_model_dir), output, on(Recipe.of(ratio=1.25, bits="16"), calibration))
    return output


def copy(source: Path, place: Path) -> Path:
    place.mkdir()
    for path in source.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    return place


@pytest.fixture(scope="module")
def good_model(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that loads, whose two shards are named by an index."""
    place = copy(tiny_model_dir, tmp_path_factory.mktemp("hostile") / "model")
    tensors = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        save_file({name: tensors[name] for name in part}, place / f"{number}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(part, f"{number}.safetensors")
    (place / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    load_model(str(place))
    return place


@pytest.fixture
def model(good_model: Path, tmp_path: Path) -> Path:
    return copy(good_model, tmp_path / "model")


# --- what leads out of the directory, or is no file -----------------------------------------------------


def redirect(model: Path, target: str) -> None:
    """Every tensor of the second shard is to be found in `target`."""
    index = json.loads((model / INDEX_NAME).read_text())
    entries = index["weight_map"].items()
    index["weight_map"] = {name: target if shard == "1.safetensors" else shard for name, shard in entries}
    (model / INDEX_NAME).write_text(json.dumps(index))


def outside(model: Path) -> Path:
    """The second shard, moved out of the directory."""
    target = model.parent / "1.safetensors"
    (model / "1.safetensors").rename(target)
    return target


def absolute(model: Path) -> None:
    redirect(model, str(outside(model)))


def dots(model: Path) -> None:
    outside(model)
    redirect(model, "../1.safetensors")


def link(model: Path) -> None:
    (model / "1.safetensors").symlink_to(outside(model))


def device(model: Path) -> None:
    redirect(model, "/dev/zero")


def linked_device(model: Path) -> None:
    (model / "1.safetensors").unlink()
    (model / "1.safetensors").symlink_to("/dev/zero")


def fifo(model: Path) -> None:
    (model / "1.safetensors").unlink()
    os.mkfifo(model / "1.safetensors")


def pickle_by_index(model: Path) -> None:
    """transformers takes the suffix of the first shard for that of all."""
    (model / "1.safetensors").rename(model / "0.bin")
    redirect(model, "0.bin")


def missing(model: Path) -> None:
    (model / "1.safetensors").unlink()


def linked_config(model: Path) -> None:
    target = model.parent / "config.json"
    (model / "config.json").rename(target)
    (model / "config.json").symlink_to(target)


# --- what is not as it says -----------------------------------------------------------------------------


def rewrite(model: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((model / name).read_text())
    change(content)
    (model / name).write_text(json.dumps(content))


def config(**values: Any) -> Callable[[Path], None]:
    return lambda model: rewrite(model, "config.json", lambda content: content.update(values))


def header(length: int) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        content = (model / "1.safetensors").read_bytes()
        (model / "1.safetensors").write_bytes(struct.pack("<Q", length) + content[8:])

    return write


def truncated(model: Path) -> None:
    os.truncate(model / "1.safetensors", (model / "1.safetensors").stat().st_size - 100)


def promises(model: Path) -> None:
    """A consistent header of a terabyte that is not there."""
    entry = {"dtype": "BF16", "shape": [2**20, 2**19], "data_offsets": [0, 2**40]}
    text = json.dumps({UP_PROJ: entry}).encode()
    (model / "1.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


def twice(model: Path) -> None:
    first, second = (load_file(model / f"{number}.safetensors") for number in (0, 1))
    save_file(
        second | {next(iter(first)): next(iter(first.values()))}, model / "1.safetensors", {"format": "pt"}
    )


def integers(model: Path) -> None:
    tensors = load_file(model / "1.safetensors")
    tensors[UP_PROJ] = torch.ones(tensors[UP_PROJ].shape, dtype=torch.int64)
    save_file(tensors, model / "1.safetensors", {"format": "pt"})


def too_few(model: Path) -> None:
    tensors = load_file(model / "1.safetensors")
    del tensors[UP_PROJ]
    save_file(tensors, model / "1.safetensors", {"format": "pt"})


def deep(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).write_text("[" * 10**6) and None


def sparse(name: str) -> Callable[[Path], None]:
    return lambda model: os.truncate(model / name, 2**40)


def adapter(model: Path) -> None:
    (model / "adapter_config.json").write_text("{}")


def linked(name: str) -> Callable[[Path], None]:
    def link_to_a_secret(model: Path) -> None:
        (model.parent / "secret").write_text("{}")
        (model / name).symlink_to(model.parent / "secret")

    return link_to_a_secret


def tokenizer_elsewhere(model: Path) -> None:
    """transformers joins the name to the directory as it is."""
    (model / "tokenizer.json").rename(model.parent / "tokenizer.4.0.0.json")
    names = {"fast_tokenizer_files": ["../tokenizer.4.0.0.json"]}
    rewrite(model, "tokenizer_config.json", lambda content: content.update(names))


def replacements(model: Path) -> None:
    """10^10 letters for each e."""
    step = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 100}
    chain = {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [step] * 5}]}
    rewrite(model, "tokenizer.json", lambda content: content.update(normalizer=chain))


GPTJ = {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 16, "vocab_size": 300}
HOSTILE: list[tuple[Callable[[Path], None], str]] = [
    (absolute, "no .safetensors file of this directory"),
    (dots, "no .safetensors file of this directory"),
    (link, "leads out of"),
    (device, "no .safetensors file of this directory"),
    (linked_device, "no regular file"),
    (fifo, "no regular file"),
    (pickle_by_index, "no .safetensors file of this directory"),
    (missing, "lacks 1.safetensors"),
    (linked_config, "leads out of"),
    (header(2**63), "its header should have"),
    (header(10**9), "its header should have"),
    (header(0), "its header is damaged"),
    (truncated, "cut off or damaged"),
    (promises, "cut off or damaged"),
    (twice, "it must be in one"),
    (integers, "stored as I64"),
    (too_few, UP_PROJ),
    (deep("config.json"), "nested too deeply"),
    (deep(INDEX_NAME), "nested too deeply"),
    (sparse("config.json"), "bytes, at most"),
    (sparse("tokenizer.json"), "bytes, at most"),
    (sparse(INDEX_NAME), "bytes, at most"),
    (adapter, "adapter"),
    (config(vocab_size=10**7), "asks for"),
    (config(vocab_size=10**12), "asks for|cannot load"),
    (config(hidden_size=10**6), "asks for|cannot load"),
    (config(intermediate_size=10**8), "asks for|cannot load"),
    (config(num_hidden_layers=10**7), "num_hidden_layers is 10,000,000"),
    (config(num_hidden_layers=-1), "num_hidden_layers is -1"),
    (config(num_labels=10**9), "num_labels is 1,000,000,000"),
    (config(num_attention_heads=0), "cannot load"),
    (config(hidden_size=10**30), "not readable JSON"),
    (config(attn_implementation="stranger/kernel"), "would fetch code"),
    (linked("preprocessor_config.json"), "leads out of"),
    (linked("chat_template.jinja"), "leads out of"),
    (tokenizer_elsewhere, "only tokenizer.json is read"),
    (replacements, "normalizer makes a text 1,000,000 times longer"),
    (
        config(
            model_type="gptj", architectures=["GPTJForCausalLM"], max_position_embeddings=2 * 10**8, **GPTJ
        ),
        "tables of",
    ),
    (
        config(model_type="funnel", architectures=["FunnelModel"], block_sizes=[60_000]),
        "block_sizes is 60,000",
    ),
    (
        config(model_type="convnext", architectures=["ConvNextModel"], depths=[10**6, 1, 1, 1]),
        "more than [0-9]+ tensors",
    ),
    (config(model_type="gpt_neo", attention_types=[[["global"], 10**9]]), "attention_types is 1,000,000,000"),
    (config(quantization_config={"quant_method": "fp8"}), "quantized by 'fp8'"),
    (config(quantization_config=7), "quantized by 7"),
]


@pytest.mark.parametrize(("spoil", "says"), HOSTILE, ids=lambda value: getattr(value, "__name__", str(value)))
def test_refused_by_name_at_once(spoil: Callable[[Path], None], says: str, model: Path) -> None:
    spoil(model)
    before, start = current_rss(), time.perf_counter()
    with pytest.raises(LrsdError, match=says):
        load_model(str(model))
    assert time.perf_counter() - start < 5
    assert current_rss() < before + 500 * 10**6


def test_what_the_files_hold_beyond_the_model_is_told(model: Path) -> None:
    assert load_model(str(model)).ignored == ()
    tensors = load_file(model / "1.safetensors")
    save_file(tensors | {"stranger": torch.zeros(3)}, model / "1.safetensors", {"format": "pt"})
    assert load_model(str(model)).ignored == ("stranger",)


def test_links_within_the_hubs_cache_are_followed(model: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(blobs / str(number))
    assert len(take_inventory(snapshot)) > 10


# --- compressed checkpoints -----------------------------------------------------------------------------


def packed_layer(checkpoint: Path, part: str) -> str:
    tensors = load_file(checkpoint / "model.safetensors")
    return next(name for name, t in tensors.items() if name.endswith(f".{part}") and t.numel() > 1)


@pytest.mark.parametrize("values", [[0, 0], [-1, 2], [5, 10**4]], ids=["twice", "negative", "outside"])
def test_indices_of_packed_layers_are_checked(compressed: Path, tmp_path: Path, values: list[int]) -> None:
    checkpoint = copy(compressed, tmp_path / "checkpoint")
    tensors = load_file(checkpoint / "model.safetensors")
    name = packed_layer(checkpoint, "pivots")
    tensors[name][-2:] = torch.tensor(values)
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    for read in (load_model, lambda place: export_dense(Path(place), tmp_path / "dense")):
        with pytest.raises(CheckpointError, match=r"pivots must be ascending numbers below"):
            read(str(checkpoint))
    assert not (tmp_path / "dense").exists()


def low_rank(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda entry: entry["terms"][0].update(changes)


def and_a(**term: Any) -> Callable[[dict[str, Any]], None]:
    return lambda entry: entry["terms"].append(term)


def layer(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda entry: entry.update(changes)


def of_version_1(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """The flat entry that version 1 had, changed."""

    def write(entry: dict[str, Any]) -> None:
        (term,) = entry.pop("terms")
        entry |= {key: value for key, value in term.items() if key != "form"} | changes

    return write


FLAT = (
    {"rank": 10**9}, {"rows": 10**7}, {"entries": 10**9}, {"stream": 10**12}, {"rank": None}, {"rank": 2**70},
    {"columns": -1}, {"bits": 99}, {"bits": 4, "group": 0}, {"stream": 3, "exponent": 10**5}, {"stranger": 1},
)  # fmt: skip
ENTRIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "rank 10^9": low_rank(rank=10**9),
    "rank 2^70": low_rank(rank=2**70),
    "rank -1": low_rank(rank=-1),
    "no rank": low_rank(rank=None),
    "rank 1.5": low_rank(rank=1.5),
    "a stranger in a term": low_rank(stranger=1),
    "a form of none": low_rank(form="nonesuch"),
    "a form that is a list": low_rank(form=["low_rank"]),
    "another low rank": and_a(form="low_rank", rank=1),
    "10^9 entries": and_a(form="masked", columns=1, entries=10**9),
    "10^9 masked columns": and_a(form="masked", columns=10**9, entries=1),
    "10^12 bytes": and_a(form="entropy", stream=10**12),
    "-1 bytes": and_a(form="entropy", stream=-1),
    "no such exponent": and_a(form="entropy", stream=3, exponent=10**5),
    "10^9 blocks": and_a(form="blocks", blocks=10**9, size=16),
    "blocks of 10^9": and_a(form="blocks", blocks=1, size=10**9),
    "blocks of nothing": and_a(form="blocks", blocks=1, size=0),
    "blocks that nothing divides": and_a(form="blocks", blocks=1, size=7),
    "fours that are not there": and_a(form="semi_structured"),
    "rank 10^9 in 8 bit": and_a(form="coded_low_rank", rank=10**9, bits=8),
    "rank 1 in 3 bit": and_a(form="coded_low_rank", rank=1, bits=3),
    "rows masked twice": and_a(form="masked", columns=10**9, entries=1, outputs=True),
    "99 bits": and_a(form="groupwise", bits=99, group=8),
    "no group": and_a(form="groupwise", bits=4, group=0),
    "half a form": and_a(form="groupwise", bits=4),
    "10^5 forms": lambda entry: entry.update(terms=entry["terms"] * 10**5),
    "10^7 rows": layer(rows=10**7),
    "-1 columns": layer(columns=-1),
    "a bias of 2": layer(bias=2),
    "a stranger": layer(stranger=1),
    "rank beside terms": layer(rank=3),
    "terms of an object": layer(terms={}),
    "terms of numbers": layer(terms=[1]),
    "no terms": layer(terms=None),
    **{f"version 1, {changes}": of_version_1(**changes) for changes in FLAT},
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if "10^5" in case else ()) for case in ENTRIES]
)
def test_formats_of_packed_layers_are_checked(compressed: Path, tmp_path: Path, case: str) -> None:
    checkpoint = copy(compressed, tmp_path / "checkpoint")
    rewrite(
        checkpoint,
        "config.json",
        lambda c: ENTRIES[case](next(iter(c["quantization_config"]["layers"].values()))),
    )
    before = current_rss()
    for read in (load_model, lambda place: export_dense(Path(place), tmp_path / "dense")):
        with pytest.raises(LrsdError) as refusal:
            read(str(checkpoint))
        assert "\n" not in str(refusal.value)
        assert len(str(refusal.value)) < 1000
    assert current_rss() < before + 500 * 10**6


def test_a_link_to_a_secret_is_not_exported(compressed: Path, tmp_path: Path) -> None:
    checkpoint = copy(compressed, tmp_path / "checkpoint")
    (tmp_path / "secret").write_text("years of work")
    (checkpoint / "notes.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="leads out of"):
        export_dense(checkpoint, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_scales_of_an_embedding_must_fit_its_rows(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    settings = Recipe.of(ratio=2.5, scope="checkpoint")
    calibration = Calibration(calib=str(text_file), samples=4, seqlen=32)
    compress(str(tiny_model_dir), tmp_path / "out", on(settings, calibration))
    shard = tmp_path / "out" / "model.safetensors"
    tensors = load_file(shard)
    scales = tensors["model.embed_tokens.scales"]
    save_file(tensors | {"model.embed_tokens.scales": torch.cat([scales, scales])}, shard, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"a scale per row of it, got .*'scales': \(600,\)"):
        export_dense(tmp_path / "out", tmp_path / "dense")


# --- texts ----------------------------------------------------------------------------------------------


READERS: dict[str, Callable[[str], object]] = {
    "text": lambda path: read_text(path, split="train", option="--calib"),
    "pairs": read_pairs,
    "labelled": read_labelled,
    "features": lambda path: read_tensors(path, Speech(), "--calib"),
}


def test_rows_are_refused_before_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n" * 10**7)
    before, start = current_rss(), time.perf_counter()
    with pytest.raises(InputError, match=r"rows\.jsonl:1: expected"):
        read_text(str(path), split="train", option="--calib")
    assert read_pairs(str(path)) == []
    assert time.perf_counter() - start < 5
    assert current_rss() < before + 500 * 10**6


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".safetensors"])
@pytest.mark.parametrize("kind", ["sparse", "fifo", "device", "deep", "digits", "latin1", "gzip"])
def test_texts_end_in_a_text_or_a_refusal(reader: str, suffix: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"text{suffix}"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        content = {
            "deep": b"[" * 10**5,
            "digits": b"7" * 5000,
            "latin1": b"caf\xe9\n",
            "gzip": b"\x1f\x8b\x08" * 9,
        }
        path.write_bytes(content.get(kind, b""))
        if kind == "sparse":
            os.truncate(path, 2**40)
    done = threading.Event()

    def read() -> None:
        try:
            READERS[reader](str(path))
        except LrsdError:
            pass
        finally:
            done.set()

    threading.Thread(target=read, daemon=True).start()
    assert done.wait(5), "hangs"


def test_a_word_without_end_is_refused(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="without a space"):
        tokenize(tokenizer, "a" * (2**20 + 1))


def test_long_texts_are_tokenized_in_pieces(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "One line, and another.\n" * 50
    whole = tokenize(tokenizer, text)
    monkeypatch.setattr("lrsd.data.tokens._PIECE", 100)
    assert torch.equal(tokenize(tokenizer, text), whole)


# --- by the thousand --------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_are_read_or_refused(data: st.DataObject, compressed: Path, tmp_path: Path) -> None:
    """A few bytes of a shard's header, an index, a manifest, a record or a journal replaced by any others."""
    kind = data.draw(st.sampled_from(["shard", "index", "manifest", "record", "journal"]))
    place = tmp_path / "case"
    place.mkdir(exist_ok=True)
    for path in place.iterdir():
        path.unlink()
    good = {
        "shard": (compressed / "model.safetensors").read_bytes(),
        "index": json.dumps({"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}).encode(),
        "manifest": (compressed / "lrsd.json").read_bytes(),
        "record": (compressed / "model.safetensors").read_bytes(),
        "journal": b'{"model": "x"}\n{"step": "text", "keep": [], "seconds": 1.0}\n',
    }[kind]
    start = data.draw(st.integers(0, min(len(good), 4000)))
    length = data.draw(st.integers(0, 40))
    bad = good[:start] + data.draw(st.binary(max_size=40)) + good[start + length :]
    name = {"index": INDEX_NAME, "manifest": "lrsd.json", "journal": JOURNAL}.get(kind, "model.safetensors")
    (place / "config.json").write_bytes((compressed / "config.json").read_bytes())
    if kind == "index":
        (place / "model-1.safetensors").write_bytes((compressed / "model.safetensors").read_bytes())
    (place / name).write_bytes(bad)
    try:
        if kind in ("shard", "index"):
            take_inventory(place)
        elif kind == "manifest":
            read_manifest(place)
            verify(place)
        elif kind == "record":
            read_record(place / name, ObservedBlock)
        else:
            Journal(place).close()
    except LrsdError as error:
        said = str(error)
    else:
        said = ""
    assert "\n" not in said


@given(st.binary(max_size=200))
def test_json_is_parsed_or_a_value_error(content: bytes) -> None:
    with suppress(ValueError):
        parse_json(content)


def test_json_of_a_device_is_refused() -> None:
    with pytest.raises(InputError, match="no regular file"):
        read_json(Path("/dev/zero"))


@pytest.mark.slow
def test_a_short_run_of_the_fuzzer() -> None:
    script = Path(__file__).parents[1] / "scripts" / "fuzz.py"
    limit = resource.getrlimit(resource.RLIMIT_AS)
    done = subprocess.run(
        [sys.executable, str(script), "--count", "300", "--seconds", "5"],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "300 cases" in done.stdout
    assert resource.getrlimit(resource.RLIMIT_AS) == limit
