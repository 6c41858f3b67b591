"""Text sampled from the model itself: kept for the next run, sampled again where what is kept is damaged."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lrsd.data.sources import require_text
from lrsd.data.tokens import calibration_samples
from lrsd.model.load import load_model
from lrsd.progress import Progress
from lrsd.settings import Calibration

SETTINGS = Calibration(samples=3, seqlen=8)


class Notes(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lrsd"


@torch.inference_mode()
def sampled(model: Path, notes: Notes | None = None) -> Tensor:
    samples = calibration_samples(load_model(str(model)), "model", SETTINGS, notes or Notes())
    return samples.inputs["input_ids"]


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def other_size(path: Path) -> None:
    save_file({"tokens": load_file(path)["tokens"][:2]}, path)


def unknown_tokens(path: Path) -> None:
    save_file({"tokens": load_file(path)["tokens"] + 10**6}, path)


def other_type(path: Path) -> None:
    save_file({"tokens": load_file(path)["tokens"].float()}, path)


@pytest.mark.parametrize("damage", [truncated, other_size, unknown_tokens, other_type])
def test_what_is_kept_is_read_unless_it_is_damaged(
    tiny_model_dir: Path, cache: Path, damage: Callable[[Path], None]
) -> None:
    first = sampled(tiny_model_dir)
    (kept,) = cache.iterdir()
    changed = first.flip(1)
    save_file({"tokens": changed}, kept)
    notes = Notes()
    assert torch.equal(sampled(tiny_model_dir, notes), changed)
    assert notes.said == [f"calibration text from {kept}"]
    damage(kept)
    assert torch.equal(sampled(tiny_model_dir), first)
    assert torch.equal(load_file(kept)["tokens"], first)


def test_text_that_cannot_be_kept_is_used_all_the_same(tiny_model_dir: Path, cache: Path) -> None:
    cache.parent.write_text("in the way")
    notes = Notes()
    assert sampled(tiny_model_dir, notes).shape == (3, 8)
    assert "not kept" in notes.said[0]


def test_a_directory_of_the_same_name_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("self", "wikitext"):
        (tmp_path / name).mkdir()
        require_text(name, "--calib")


def test_only_tokens_that_exist_are_written(make_model, tiny_llama, tokenizer, cache: Path) -> None:
    """Embeddings are padded beyond the tokenizer's last id; what is written is kept for the next run."""
    model = make_model(tiny_llama(vocab_size=512))
    ordinary = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
    settings = Calibration(samples=16, seqlen=32)
    for said in ("", "calibration text from"):
        notes = Notes()
        samples = calibration_samples(load_model(str(model)), "padded", settings, notes)
        assert set(samples.inputs["input_ids"].flatten().tolist()) <= ordinary
        assert said in "".join(notes.said)
    assert len(list(cache.iterdir())) == 1


def test_a_user_without_a_home_keeps_no_text(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    notes = Notes()
    assert sampled(tiny_model_dir, notes).shape == (3, 8)
    assert "not kept for other runs: there is no home directory" in "".join(notes.said)
