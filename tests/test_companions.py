"""What stands beside the weights is kept, by compress and by export, and vouched for; weights of other
formats, code and pickles are not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from lrsd.checkpoint.verify import verify
from lrsd.compress import compress
from lrsd.errors import CheckpointError, InputError
from lrsd.export.dense import export_dense
from lrsd.intake import companions as module
from lrsd.intake.companions import companions
from lrsd.recipe import Recipe

KEPT = {
    "preprocessor_config.json": "{}", "processor_config.json": "{}", "video_preprocessor_config.json": "{}",
    "chat_template.json": '{"chat_template": "x"}', "config_sentence_transformers.json": '{"prompts": {}}',
    "sentence_bert_config.json": "{}", "tekken.json": "{}", "tokenizer.model": "pieces", "merges.txt": "a b",
    "source.spm": "pieces", "LICENSE": "Apache", "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "modules.json": json.dumps([
        {"path": "", "type": "Transformer"}, {"path": "1_Pooling", "type": "Pooling"},
        {"path": "2_Dense", "type": "Dense"},
    ]),
    "1_Pooling/config.json": '{"pooling_mode_cls_token": true}', "2_Dense/config.json": "{}",
}  # fmt: skip
LEFT = {
    "modeling_own.py": "raise SystemExit", "training_args.bin": "pickle", "model.onnx": "",
    "flax_model.msgpack": "", ".gitattributes": "", ".git/config": "", "onnx/model.onnx": "",
    "onnx/config.json": "{}", "checkpoint-5/optimizer.pt": "", "checkpoint-5/trainer_state.json": "{}",
    "__pycache__/a.txt": "", "model.safetensors.index.json": "{}",
}  # fmt: skip


@pytest.fixture
def full(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A model with everything beside it that model directories have."""
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    for name, content in (KEPT | LEFT).items():
        (model / name).parent.mkdir(exist_ok=True, parents=True)
        (model / name).write_text(content)
    save_file({"linear.weight": torch.ones(2, 2)}, model / "2_Dense/model.safetensors")
    (model / "README.md").write_text("Ask it with 'query: ' before the question.")
    return model


@pytest.fixture
def small(text_file: Path) -> Recipe:
    return Recipe.of(ratio=4, calib=str(text_file), samples=8, seqlen=32)


def contents(directory: Path, names: dict[str, str]) -> dict[str, str | None]:
    return {n: (directory / n).read_text() if (directory / n).is_file() else None for n in names}


def test_what_is_beside_the_weights_is_kept_and_vouched_for(
    full: Path, small: Recipe, tmp_path: Path
) -> None:
    out, dense = tmp_path / "out", tmp_path / "dense"
    compress(str(full), out, small)
    export_dense(out, dense)
    for directory in (out, dense):
        assert contents(directory, KEPT) == KEPT
        assert not {name for name, found in contents(directory, LEFT).items() if found is not None}
        assert (directory / "2_Dense/model.safetensors").read_bytes() == (
            full / "2_Dense/model.safetensors"
        ).read_bytes()
        assert (directory / "README.base.md").read_text() == (full / "README.md").read_text()
    assert "compressed" in (out / "README.md").read_text()
    assert not (dense / "lrsd.json").exists()
    verify(out)
    (out / "1_Pooling/config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"1_Pooling/config\.json changed"):
        verify(out)


def test_the_tokenizer_is_the_one_that_came(full: Path, small: Recipe, tmp_path: Path) -> None:
    settings = json.loads((full / "tokenizer_config.json").read_text())
    (full / "tokenizer_config.json").write_text(json.dumps(settings | {"of_its_own": 1}))
    compress(str(full), tmp_path / "out", small)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((full / name).read_text())
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("The tokens").input_ids


def test_code_that_is_not_kept_is_not_asked_for(full: Path, small: Recipe, tmp_path: Path) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        settings = json.loads((full / name).read_text())
        (full / name).write_text(json.dumps(settings | {"auto_map": {"AutoConfig": "own.Config"}, "kept": 1}))
    compress(str(full), tmp_path / "out", small)
    export_dense(tmp_path / "out", tmp_path / "dense")
    for directory in (tmp_path / "out", tmp_path / "dense"):
        for name in ("config.json", "preprocessor_config.json"):
            settings = json.loads((directory / name).read_text())
            assert "auto_map" not in settings
            assert settings["kept"] == 1


def to_a_file(model: Path, outside: Path) -> None:
    (model / "1_Pooling/more.json").symlink_to(outside / "secret")


def to_a_folder(model: Path, outside: Path) -> None:
    (model / "more").symlink_to(outside)


@pytest.mark.parametrize("link", [to_a_file, to_a_folder])
def test_links_lead_nowhere_else(
    full: Path, small: Recipe, tmp_path: Path, link: Callable[[Path, Path], None]
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    link(full, outside)
    with pytest.raises(CheckpointError, match="is a link that leads out of"):
        compress(str(full), tmp_path / "out", small)
    assert not (tmp_path / "out").exists()


def test_what_is_too_large_for_a_model_is_refused(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = sum((full / path).stat().st_size for path in companions(full))
    monkeypatch.setattr(module, "_MOST_BYTES", sizes)
    assert list(companions(full))
    monkeypatch.setattr(module, "_MOST_BYTES", sizes - 1)
    with pytest.raises(InputError, match="besides weights and code"):
        list(companions(full))


def test_a_list_of_modules_without_paths_is_one_line(full: Path) -> None:
    (full / "modules.json").write_text('["1_Pooling"]')
    with pytest.raises(InputError, match=r"modules\.json is no list of modules with a path each"):
        list(companions(full))
