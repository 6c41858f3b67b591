"""Before a result appears, it is read back and run: what cannot be used is never written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lrsd.compress import compress
from lrsd.errors import CheckpointError, NumericsError
from lrsd.progress import Progress
from lrsd.recipe import Recipe
from lrsd.steps import proof


@pytest.fixture
def small(text_file: Path) -> Recipe:
    return Recipe.of(ratio=4, calib=str(text_file), samples=8, seqlen=32)


def spoiled(change: Callable[[Path], None]) -> Callable[..., None]:
    """`write_result`, and then something happens to the files."""
    from lrsd.steps.write import write_result

    def write(done: Any, path: Path, seconds: dict[str, float]) -> None:
        write_result(done, path, seconds)
        change(path)

    return write


def flip(part: str) -> Callable[[Path], None]:
    """One bit of one tensor."""

    def change(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        name = next(name for name in sorted(tensors) if name.endswith(part))
        tensors[name].view(torch.uint8).flatten()[3] ^= 1
        save_file(tensors, path / "model.safetensors", {"format": "pt"})

    return change


def lose_a_layer(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def other_settings(path: Path) -> None:
    config = (path / "config.json").read_text()
    assert '"rms_norm_eps": 1e-06' in config
    (path / "config.json").write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1.0'))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(flip("up_proj.codes"), "up_proj.codes is not as it was written", id="codes"),
        pytest.param(flip("norm.weight"), "norm.weight is not as it was written", id="norm"),
        pytest.param(lose_a_layer, "the result cannot be loaded", id="incomplete"),
        pytest.param(other_settings, "has other logits than the model that was compressed", id="config"),
    ],
)
def test_a_result_that_cannot_be_used_does_not_appear(
    tiny_model_dir: Path, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None], reason: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("lrsd.compress.write_result", spoiled(change))
    with pytest.raises(CheckpointError, match=reason):
        compress(str(tiny_model_dir), tmp_path / "out", small)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    compress(str(tiny_model_dir), tmp_path / "out", small, resume=True)
    assert (tmp_path / "out/model.safetensors").exists()


def test_a_model_whose_output_is_not_finite_does_not_appear(
    tiny_model_dir: Path, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "logits_of", lambda output: output.logits.float() * torch.inf)
    with pytest.raises(NumericsError, match="the compressed model's output holds"):
        compress(str(tiny_model_dir), tmp_path / "out", small)
    assert not (tmp_path / "out").exists()


def test_a_result_is_not_run_where_memory_is_short(
    tiny_model_dir: Path, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(Progress, "note", lambda self, text: said.append(text))
    monkeypatch.setattr(proof, "_LOADING", 2**60)
    compress(str(tiny_model_dir), tmp_path / "out", small)
    assert any("was read back, but not run: that may take" in text for text in said)
    monkeypatch.setattr("lrsd.compress.write_result", spoiled(flip("up_proj.codes")))
    with pytest.raises(CheckpointError, match="is not as it was written"):
        compress(str(tiny_model_dir), tmp_path / "other", small)
