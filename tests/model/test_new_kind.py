"""A new kind of model is one class and one line of the table: here one that reads images and text."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from recipes import on
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from lrsd.compress import compress
from lrsd.errors import InputError
from lrsd.evaluate import evaluate
from lrsd.model import kinds
from lrsd.model.kinds.base import EvaluationItem, Kind
from lrsd.model.load import load_model
from lrsd.model.samples import Samples
from lrsd.model.types import Model
from lrsd.recipe import Recipe
from lrsd.settings import Calibration

IMAGE, PATCHES, TEXT = 299, 4, 20


class VisionLanguage(Kind):
    """Text that follows an image."""

    name = "vision-language model"
    tensors = MappingProxyType({
        "pixel_values": ("samples", "channels", "height", "width"), "input_ids": ("samples", "tokens"),
    })  # fmt: skip
    perplexity_protocol = "token perplexity of the text that follows an image"

    def recognizes(self, model: Model) -> bool:
        return isinstance(model, LlavaForConditionalGeneration)

    def example(self, model: Model) -> Samples:
        size = model.config.vision_config.image_size
        images, tokens = torch.zeros(2, 3, size, size), torch.tensor([[IMAGE] * PATCHES + [0] * 4] * 2)
        return Samples({"pixel_values": images, "input_ids": tokens})

    def samples_from_tensors(self, model: Model, tensors: Mapping[str, Tensor], seqlen: int) -> Samples:
        return Samples(dict(tensors)).cut(PATCHES + seqlen)

    def items_from_tensors(
        self, model: Model, tensors: Mapping[str, Tensor], seqlen: int
    ) -> list[EvaluationItem]:
        samples = self.samples_from_tensors(model, tensors, seqlen)
        rows = torch.arange(PATCHES, samples.inputs["input_ids"].shape[1] - 1)
        return [EvaluationItem(s, rows, s.inputs["input_ids"][0, rows + 1]) for s in samples.split(1)]


@pytest.fixture(scope="module")
def base(make_model) -> Path:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16,
        patch_size=8,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return make_model(config, AutoModelForImageTextToText)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(290, (6, TEXT), generator=generator)
    tokens = torch.cat([torch.full((6, PATCHES), IMAGE), words], 1)
    images = torch.randn(6, 3, 16, 16, generator=generator)
    save_file({"pixel_values": images, "input_ids": tokens}, tmp_path / "pictures.safetensors")
    return tmp_path / "pictures.safetensors"


def test_a_new_kind_is_a_class_and_a_line(
    base: Path, pictures: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = (VisionLanguage(), *kinds.KINDS)
    monkeypatch.setattr(kinds, "KINDS", table)
    assert load_model(str(base)).kind is table[0]
    calibration = Calibration(calib=str(pictures), samples=6, seqlen=16)
    out = tmp_path / "out"
    manifest = compress(str(base), out, on(Recipe.of(ratio=4), calibration))
    assert manifest.linear_bytes <= manifest.budget_bytes
    assert all(name.startswith("model.language_model.layers.") for name in manifest.layers)
    result = evaluate(str(out), (str(pictures),), seqlen=16, windows=3, dense=str(base))
    (score,), (divergence,) = result.perplexity, result.divergence
    assert (score.windows, score.scored_tokens) == (3, 3 * 15)
    assert score.protocol == VisionLanguage.perplexity_protocol
    assert 0 < divergence.kl < 1
    with pytest.raises(InputError, match="reads a safetensors file of pixel_values and input_ids; give that"):
        evaluate(str(out), (str(text_file),))
    save_file({"pixel_values": torch.zeros(6, 3, 16, 16)}, tmp_path / "wrong.safetensors")
    wrong = Calibration(calib=str(tmp_path / "wrong.safetensors"), samples=6, seqlen=16)
    with pytest.raises(InputError, match=r"input_ids \(samples, tokens\) for a vision-language model, got"):
        compress(str(base), tmp_path / "other", on(Recipe.of(ratio=4), wrong))
