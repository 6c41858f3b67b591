"""GGUF files made of GGUF files: everything kept but the weights, and these as good as the bytes allow."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gguf import GGUFReader, GGUFWriter
from gguf_files import write_llama
from lrsd_cli.main import commands
from torch import Tensor
from transformers import LlamaConfig

from lrsd.checkpoint.manifest import read_manifest
from lrsd.checkpoint.verify import verify
from lrsd.compress import compress, dry_run
from lrsd.errors import BudgetError, CheckpointError, InputError, SettingsError
from lrsd.export.dense import export_dense
from lrsd.forms.ggml import BLOCK_TYPES
from lrsd.model.gguf import row_order
from lrsd.model.load import load_model
from lrsd.recipe import Recipe
from lrsd.report.tables import plan_table
from lrsd.settings import parse_size

TEXT = {"samples": 8, "seqlen": 32}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(
    request: pytest.FixtureRequest,
    tiny_llama: Callable[..., LlamaConfig],
    tokenizer: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Rows of 256 and of 96 columns: types of both block sizes; heads that transformers puts in another
    order."""
    config = tiny_llama(hidden_size=256, intermediate_size=96, tie_word_embeddings=request.param)
    return write_llama(tmp_path_factory.mktemp("base") / "base.gguf", config, tokenizer, np.float16)


@pytest.fixture(scope="module")
def made(base: Path, text_file: Path) -> Path:
    path = base.with_name("made.gguf")
    compress(str(base), path, recipe(text_file, ratio=3.2))
    return path


def recipe(text_file: Path, **settings: Any) -> Recipe:
    return Recipe.of(format="gguf", calib=str(text_file), **TEXT, **settings)


def weights(path: Path) -> dict[str, Tensor]:
    return {name: value.float() for name, value in load_model(str(path)).model.state_dict().items()}


def test_every_weight_is_near_the_one_it_stands_for(base: Path, made: Path) -> None:
    """Under the model's own names and in its own order of rows."""
    before, after = weights(base), weights(made)
    assert before.keys() == after.keys()
    errors = {name: float((after[name] - W).square().sum() / W.square().sum()) for name, W in before.items()}
    matrices = {name: error for name, error in errors.items() if before[name].dim() == 2}
    assert 1e-4 < max(matrices.values()) < 0.15, errors
    assert all(errors[name] < 1e-4 for name in errors.keys() - matrices.keys())


def test_metadata_and_the_other_tensors_are_the_sources(base: Path, made: Path) -> None:
    source, found = GGUFReader(base), GGUFReader(made)
    own = {"general.file_type", "general.quantization_version", "lrsd.manifest"}
    names = {name for name in found.fields if not name.startswith("GGUF.")}
    assert names - own == {name for name in source.fields if not name.startswith("GGUF.")}
    for name in names - own:
        assert found.fields[name].contents() == source.fields[name].contents(), name
    assert [t.name for t in found.tensors] == [t.name for t in source.tensors]
    for before, after in zip(source.tensors, found.tensors, strict=True):
        assert before.shape.tolist() == after.shape.tolist()
        if len(before.shape) == 1:
            assert np.array_equal(before.data, after.data)


def test_types_are_what_the_manifest_says(base: Path, made: Path) -> None:
    manifest = read_manifest(made)
    stored = {record.stored_as for record in manifest.layers.values()}
    assert len(stored) > 1
    assert stored <= {*BLOCK_TYPES, "dense"}
    in_file = {t.tensor_type.name for t in GGUFReader(made).tensors if len(t.shape) == 2}
    assert in_file == {"F16" if kind == "dense" else kind for kind in stored}
    assert sum(record.bytes for record in manifest.layers.values()) <= manifest.budget_bytes
    own = {"model.embed_tokens", "lm_head"} & manifest.layers.keys()
    untied = "output.weight" in {tensor.name for tensor in GGUFReader(base).tensors}
    assert own == {"model.embed_tokens", *(["lm_head"] if untied else [])}


def test_a_file_of_the_size_asked_for(base: Path, text_file: Path, tmp_path: Path) -> None:
    size = int(base.stat().st_size * 0.45)
    compress(str(base), tmp_path / "out.gguf", recipe(text_file, size=f"{size}B"))
    assert 0.8 * size < (tmp_path / "out.gguf").stat().st_size <= size
    with pytest.raises(BudgetError, match="tokenizer, norms and metadata alone take"):
        compress(str(base), tmp_path / "less.gguf", recipe(text_file, size="10KB"))
    assert not list(tmp_path.glob("less*"))


def test_more_bytes_lose_less(base: Path, made: Path, text_file: Path, tmp_path: Path) -> None:
    compress(str(base), tmp_path / "more.gguf", recipe(text_file, ratio=2))
    tokens = torch.arange(3, 60)[None]
    paths = (base, made, tmp_path / "more.gguf")
    with torch.inference_mode():
        dense, less, more = (load_model(str(path)).model(tokens).logits.float() for path in paths)
    assert float((more - dense).norm()) < 0.5 * float((less - dense).norm())


def test_what_was_written_is_vouched_for(base: Path, made: Path, text_file: Path, tmp_path: Path) -> None:
    assert verify(made).recipe["format"] == "gguf"
    again = compress(str(base), made, recipe(text_file, ratio=3.2), resume=True)
    assert again == read_manifest(made)
    with pytest.raises(InputError, match="already exists"):
        compress(str(base), made, recipe(text_file, ratio=3.2))
    content = bytearray(made.read_bytes())
    content[-1] ^= 1
    (tmp_path / "damaged.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match="not as lrsd wrote it"):
        verify(tmp_path / "damaged.gguf")
    with pytest.raises(CheckpointError, match="no metadata of lrsd's"):
        verify(base)


def test_the_same_bytes_every_time(base: Path, made: Path, text_file: Path, tmp_path: Path) -> None:
    compress(str(base), tmp_path / "again.gguf", recipe(text_file, ratio=3.2))
    assert (tmp_path / "again.gguf").read_bytes() == made.read_bytes()


def test_embedding_and_head_stay_as_they_are_for_a_ratio_of_the_linear_weights(
    base: Path, text_file: Path, tmp_path: Path
) -> None:
    compress(str(base), tmp_path / "out.gguf", recipe(text_file, ratio=3.2, scope="linear"))
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "out.gguf").tensors}
    assert {kinds["token_embd.weight"], kinds.get("output.weight", "F16")} == {"F16"}
    assert kinds["blk.0.ffn_up.weight"] != "F16"


def test_weights_that_are_small_already_are_taken_as_they_stand(
    made: Path, text_file: Path, tmp_path: Path
) -> None:
    """Compressed again to more bytes than it has, every tensor is the source's, byte for byte."""
    manifest = compress(str(made), tmp_path / "out.gguf", recipe(text_file, ratio=2.5, propagate=True))
    assert {(r.state, r.interpolation, r.stored_as) for r in manifest.layers.values()} == {
        ("kept", 0.0, record.stored_as) for record in read_manifest(made).layers.values()
    }
    found = GGUFReader(tmp_path / "out.gguf").tensors
    for before, after in zip(GGUFReader(made).tensors, found, strict=True):
        assert before.tensor_type == after.tensor_type
        assert np.array_equal(before.data, after.data)


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_names_that_say_something_else_are_refused(
    base: Path, text_file: Path, tmp_path: Path, suffix: str, tiny_model_dir: Path
) -> None:
    with pytest.raises(InputError, match=r"one file, name it out\.gguf"):
        compress(str(base), tmp_path / f"out{suffix}", recipe(text_file, ratio=4))
    plain = Recipe.of(ratio=4, calib=str(text_file), **TEXT)
    with pytest.raises(InputError, match=r"a directory, not out\.gguf"):
        compress(str(base), tmp_path / "out.gguf", plain)
    with pytest.raises(InputError, match="is made of a GGUF file, got"):
        compress(str(tiny_model_dir), tmp_path / "out.gguf", recipe(text_file, ratio=4))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"ratio": 4, "size": "1GB"}, "either --ratio, like 4x, or --size"),
        ({}, "either --ratio, like 4x, or --size"),
        ({"size": "much"}, "a size must look like"),
        ({"size": "1GB", "scope": "linear"}, "not of scope linear"),
        ({"ratio": 4, "format": "gguf", "method": "integers"}, "holds what --method gguf makes"),
        ({"ratio": 4, "method": "gguf", "format": "lrsd"}, "makes what format gguf holds, not lrsd"),
        ({"ratio": 4, "format": "gguf", "types": "Q4_0,Q9_9"}, "types must be among"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        Recipe.of(**settings)


def test_a_recipe_with_a_size_reads_back() -> None:
    made = Recipe.of(size="1.5GiB", format="gguf")
    assert Recipe.of(**json.loads(json.dumps(made.to_dict()))).to_dict() == made.to_dict()
    sizes = [parse_size(text) for text in ("700B", "2K", "1.5GiB", "3MB")]
    assert sizes == [700, 2048, 3 * 2**29, 3_000_000]


def test_rows_are_found_in_whatever_order_they_are(generator: torch.Generator) -> None:
    known = torch.randn(7, 4, generator=generator).bfloat16()
    known[5] = known[2]
    known[6, 0] = -0.0
    found = known[torch.tensor([3, 2, 0, 1, 6, 5, 4])].clone()
    found[4, 0] = 0.0
    order = row_order(found, known)
    assert order is not None
    assert torch.equal(known[order], found)
    assert order.sort().values.tolist() == list(range(7))
    found[1, 1] += 1
    assert row_order(found, known) is None


def test_a_dry_run_shows_the_embedding_too(base: Path, text_file: Path) -> None:
    prepared = dry_run(str(base), recipe(text_file, ratio=3.2))
    assert "model.embed_tokens" in plan_table(prepared)
    assert prepared.plan.nbytes <= prepared.source.budget
    assert prepared.to_dict()["planned_bytes"] == prepared.plan.nbytes


def test_the_commands_read_a_file(made: Path, text_file: Path, tmp_path: Path) -> None:
    runner = CliRunner()

    def said(*arguments: str) -> str:
        done = runner.invoke(commands, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output
        return done.output

    assert "its tensors are as lrsd" in said("verify", str(made))
    shown = said("inspect", str(made))
    assert "model.embed_tokens" in shown
    assert "(embeddings and head among them)" in shown
    assert "left dense" not in shown
    measured = said("eval", str(made), "--ppl", str(text_file), "--seqlen", "32", "--windows", "2", "--json")
    assert json.loads(measured[measured.index("{") :])["perplexity"][0]["perplexity"] > 1
    with pytest.raises(CheckpointError, match="is a file; expected a directory"):
        export_dense(made, tmp_path / "dense")


def test_what_is_kept_beside_compressed_layers_does_not_make_up_for_them(
    base: Path, text_file: Path, tmp_path: Path
) -> None:
    """A fit that went on with other weights than those written would be calibrated on another model."""
    asked = recipe(text_file, ratio=2, types="Q4_0", propagate=True)
    layers = compress(str(base), tmp_path / "out.gguf", asked).layers.values()
    assert {record.state for record in layers} == {"kept", "rounded"}
    assert any(record.interpolation for record in layers)
    assert not any(record.interpolation for record in layers if record.state == "kept")


@pytest.mark.parametrize(
    "where",
    ["lrsd.steps.prepare.choose_plan", "lrsd.compress.fit_embeddings", "lrsd.steps.write.write_gguf"],
)
def test_a_stopped_run_goes_on_to_the_same_bytes(
    base: Path, made: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def stop(*arguments: Any, **_: Any) -> None:
        if where.endswith("write_gguf"):
            Path(arguments[1]).write_bytes(b"GGUF, half of it")
        raise KeyboardInterrupt

    out = tmp_path / "out.gguf"
    with monkeypatch.context() as patch:
        patch.setattr(where, stop)
        with pytest.raises(KeyboardInterrupt):
            compress(str(base), out, recipe(text_file, ratio=3.2))
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf.partial"]
    compress(str(base), out, recipe(text_file, ratio=3.2), resume=True)
    assert out.read_bytes() == made.read_bytes()
    assert list(tmp_path.iterdir()) == [out]


def test_a_source_that_is_cut_off_is_one_line(base: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(base.read_bytes()[: base.stat().st_size // 2])
    for source, says in (("cut.gguf", "is not a readable GGUF file"), ("none.gguf", "no such file")):
        with pytest.raises(InputError, match=says) as caught:
            compress(str(tmp_path / source), tmp_path / "out.gguf", recipe(text_file, ratio=4))
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["cut.gguf"]


def test_fields_that_say_how_the_file_is_read_are_heeded(
    tiny_llama, tokenizer, text_file: Path, tmp_path: Path
) -> None:
    """An alignment of its own, by which readers find tensors; and an empty list, which no writer knows."""

    def more(writer: GGUFWriter) -> None:
        writer.add_custom_alignment(256)
        writer.add_array("general.tags", ["one"])
        writer.add_array("x.empty", [7])

    source = write_llama(tmp_path / "base.gguf", tiny_llama(hidden_size=64), tokenizer, np.float16, more)
    content = source.read_bytes()
    # The length of the list of one number, and the number.
    place = content.index(b"x.empty") + len(b"x.empty") + 8
    length, number = (1).to_bytes(8, "little"), (7).to_bytes(4, "little")
    assert content[place : place + 12] == length + number
    data = GGUFReader(source).data_offset
    emptied = content[:place] + bytes(8) + content[place + 12 : data]
    source.write_bytes(emptied.ljust(data, b"\0") + content[data:])
    assert GGUFReader(source).fields["x.empty"].contents() == []

    made = tmp_path / "made.gguf"
    compress(str(source), made, recipe(text_file, ratio=2))
    reader = GGUFReader(made)
    assert reader.alignment == 256
    assert all(tensor.data_offset % 256 == 0 for tensor in reader.tensors)
    assert reader.fields["general.tags"].contents() == ["one"]
    assert "x.empty" not in reader.fields
    assert weights(made).keys() == weights(source).keys()
