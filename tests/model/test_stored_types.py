"""The type of a tensor is its own: `auto` follows the tensors, what is rounded is told, bytes are counted in
the type that is stored; and what a checkpoint holds beyond the model is told, too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, T5Config

from lrsd.checkpoint.reader import stored_bytes
from lrsd.compress import compress
from lrsd.intake.json import read_json
from lrsd.model.load import load_model
from lrsd.progress import Progress
from lrsd.recipe import Recipe
from lrsd.steps.source import checkpoint_bytes
from lrsd.steps.write import model_name
from lrsd.work.files import write_json

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


class Notes(Progress):
    def __init__(self) -> None:
        self.said = ""

    def note(self, text: str) -> None:
        self.said += f"{text}\n"


Rewrite = Callable[..., Path]


@pytest.fixture
def rewritten(tiny_model_dir: Path, tmp_path: Path) -> Rewrite:
    """The tiny model with its tensors in other types, config.json saying whatever it likes."""

    def rewrite(says: str | None, type_of: Callable[[str], torch.dtype], **more: Tensor) -> Path:
        model = tmp_path / "model"
        model.mkdir()
        tensors = load_file(tiny_model_dir / "model.safetensors")
        tensors = {name: tensor.to(type_of(name)) for name, tensor in tensors.items()} | more
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
        config = read_json(tiny_model_dir / "config.json")
        config.pop("dtype")
        write_json(model / "config.json", config | ({} if says is None else {"dtype": says}))
        for path in tiny_model_dir.glob("tokenizer*"):
            (model / path.name).write_bytes(path.read_bytes())
        return model

    return rewrite


@pytest.fixture
def small(text_file: Path) -> Recipe:
    return Recipe.of(ratio=4, calib=str(text_file), samples=8, seqlen=32)


@pytest.mark.parametrize("says", [None, "float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("stored", "computed"), [(HALF, HALF), (BRAIN, BRAIN), (FULL, BRAIN)])
def test_auto_follows_the_tensors(
    rewritten: Rewrite, says: str | None, stored: torch.dtype, computed: torch.dtype
) -> None:
    loaded = load_model(str(rewritten(says, lambda name: stored)))
    assert loaded.model.dtype == computed
    assert loaded.stored_as == str(stored).removeprefix("torch.")
    assert bool(loaded.rounded) == (stored != computed)


def test_what_is_not_compressed_keeps_its_bits(rewritten: Rewrite, small: Recipe, tmp_path: Path) -> None:
    model, notes = rewritten(None, lambda name: HALF), Notes()
    compress(str(model), tmp_path / "out", small, notes)
    before, after = (load_file(path / "model.safetensors") for path in (model, tmp_path / "out"))
    assert torch.equal(before[EMBEDDING], after[EMBEDDING])
    assert "rounded" not in notes.said


@pytest.mark.parametrize("other", [FULL, BRAIN])
def test_a_tensor_that_is_rounded_is_told(
    rewritten: Rewrite, small: Recipe, tmp_path: Path, other: torch.dtype
) -> None:
    notes = Notes()
    compress(str(rewritten(None, lambda n: other if n == NORM else HALF)), tmp_path / "out", small, notes)
    assert (
        f"1 tensors are rounded to float16 from the type that they are stored in, {NORM} among" in notes.said
    )


@pytest.fixture
def half_t5(make_model: Any, tmp_path: Path) -> Path:
    """In float16, T5's `wo` stays in float32."""
    config = T5Config(
        vocab_size=300, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    base = make_model(config, AutoModelForSeq2SeqLM)
    AutoModelForSeq2SeqLM.from_pretrained(base, dtype=HALF).save_pretrained(tmp_path / "t5")
    for path in base.glob("tokenizer*"):
        (tmp_path / "t5" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "t5"


@pytest.mark.parametrize("settings", [{"ratio": 1.05, "bits": "16"}, {"ratio": 1.6, "scope": "checkpoint"}])
def test_weights_that_the_model_keeps_in_float32_do_not_break_the_budget(
    half_t5: Path, small: Recipe, tmp_path: Path, settings: dict[str, Any]
) -> None:
    text = {"calib": small.calibration.calib, "samples": 8, "seqlen": 16}
    manifest = compress(str(half_t5), tmp_path / "out", Recipe.of(**settings, **text))
    kept = {name for name in manifest.untouched if name.endswith(".wo")}
    assert len(kept) == 4
    assert {manifest.untouched[name] for name in kept} == {"kept in float32 by the model"}
    assert stored_bytes(tmp_path / "out", manifest.layers) == manifest.linear_bytes <= manifest.budget_bytes
    if "scope" in settings:
        whole = checkpoint_bytes(load_model(str(half_t5)).model)
        assert stored_bytes(tmp_path / "out") <= whole / settings["ratio"]


def test_buffers_and_their_types_are_counted(half_t5: Path) -> None:
    model = load_model(str(half_t5)).model
    assert checkpoint_bytes(model) == stored_bytes(half_t5)
    model.register_buffer("state", torch.zeros(10, dtype=torch.float64))
    assert checkpoint_bytes(model) == stored_bytes(half_t5) + 80


def test_heads_for_several_tokens_at_once_are_told(
    rewritten: Rewrite, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers passes over them without a word."""
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp.*", "inv_freq"])
    more = {"mtp.layers.0.proj.weight": torch.zeros(2, 2), "model.rotary.inv_freq": torch.zeros(2)}
    notes = Notes()
    compress(str(rewritten(None, lambda name: BRAIN, **more)), tmp_path / "out", small, notes)
    assert (
        "1 tensors are no part of the model as transformers runs it, and left out, mtp.layers.0" in notes.said
    )


def test_a_model_has_the_name_that_people_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--org--Tiny-Model/snapshots/0123abcd"
    snapshot.mkdir(parents=True)
    monkeypatch.chdir(snapshot)
    assert model_name(str(snapshot)) == model_name(".") == "org/Tiny-Model"
    (tmp_path / "model.gguf").touch()
    names = {str(tmp_path): tmp_path.name, "org/Tiny": "org/Tiny", str(tmp_path / "model.gguf"): "model.gguf"}
    assert {source: model_name(source) for source in names} == names
