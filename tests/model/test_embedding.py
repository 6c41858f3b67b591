"""Embeddings in 8 bit: every value within half a step, ties kept, other kinds left alone."""

from pathlib import Path

import pytest
import torch
from recipes import on
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config

from lrsd.checkpoint.manifest import read_manifest
from lrsd.checkpoint.reader import stored_bytes
from lrsd.compress import compress
from lrsd.errors import BudgetError
from lrsd.model.embedding import Int8Embedding, Int8Head, embedding_names
from lrsd.recipe import Recipe
from lrsd.settings import Calibration


@pytest.fixture
def calibration(text_file: Path) -> Calibration:
    return Calibration(calib=str(text_file), samples=8, seqlen=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_value_is_within_half_a_step_of_its_row(generator: torch.Generator, dtype: torch.dtype) -> None:
    weight_VD = torch.randn(50, 24, generator=generator) * torch.rand(50, 1, generator=generator).exp()
    weight_VD[7] = 0
    weight_VD = weight_VD.to(dtype)
    packed = Int8Embedding.pack(weight_VD)
    exact_VD = packed.weight.float() * packed.scales.float()[:, None]
    # Half a step, and what rounding the scale to 8 bits moves the largest code by.
    slack = 0.5 if dtype == torch.float32 else 0.5 + 127 * 2**-8
    steps_V = weight_VD.float().abs().amax(1) / 127
    assert bool(((exact_VD - weight_VD.float()).abs() <= slack * steps_V[:, None] * 1.001).all())
    assert not packed.weight[7].any()
    tokens = torch.tensor([[3, 7, 49]])
    torch.testing.assert_close(packed(tokens), packed.dense_weight()[tokens])


def test_a_tied_head_has_no_weights_of_its_own(generator: torch.Generator) -> None:
    rows = Int8Embedding.pack(torch.randn(20, 8, generator=generator))
    x = torch.randn(3, 8, generator=generator)
    for tied in (True, False):
        head = Int8Head(rows, tied=tied)
        assert len(list(head.parameters())) == (0 if tied else 2)
        torch.testing.assert_close(head(x), x @ rows.dense_weight().T, rtol=1e-5, atol=1e-5)


def test_the_whole_checkpoint_is_as_small_as_asked_for(
    tiny_model_dir: Path, calibration: Calibration, tmp_path: Path
) -> None:
    settings = Recipe.of(ratio=2.5, scope="checkpoint")
    manifest = compress(str(tiny_model_dir), tmp_path / "out", on(settings, calibration))
    ratio = stored_bytes(tiny_model_dir) / stored_bytes(tmp_path / "out")
    assert 2.5 <= ratio <= 2.52
    assert manifest.checkpoint_ratio == pytest.approx(ratio, rel=1e-3)
    assert read_manifest(tmp_path / "out").recipe["scope"] == "checkpoint"


def test_a_checkpoint_ratio_that_the_embeddings_alone_exceed_is_refused(
    tiny_model_dir: Path, calibration: Calibration, tmp_path: Path
) -> None:
    with pytest.raises(BudgetError, match="embeddings at 8 bit and norms alone"):
        compress(
            str(tiny_model_dir), tmp_path / "out", on(Recipe.of(ratio=30, scope="checkpoint"), calibration),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_an_embedding_that_is_more_than_a_table_stays_as_it_is(make_model) -> None:
    """Gemma scales what it looks up, and its head is tied to that table."""
    config = Gemma2Config(
        vocab_size=300, hidden_size=64, intermediate_size=160, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, bos_token_id=0, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(make_model(config))
    names = embedding_names(model)
    assert all(type(model.get_submodule(name)) in (nn.Embedding, nn.Linear) for name in names)
