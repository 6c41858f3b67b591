"""Checkpoints in the compressed-tensors format load without lrsd and compute what lrsd computes."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

from lrsd.checkpoint.manifest import read_manifest
from lrsd.checkpoint.reader import stored_bytes
from lrsd.checkpoint.verify import verify
from lrsd.compress import compress
from lrsd.errors import CheckpointError, InputError
from lrsd.export.compressed_tensors import export_compressed_tensors
from lrsd.recipe import Recipe

TEXT = {"samples": 8, "seqlen": 32}
# What a user without lrsd does; the logits as numbers.
_LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
assert "lrsd" not in sys.modules
with torch.inference_mode():
    logits = model(torch.arange(3, 40)[None]).logits.float()
torch.save(logits, sys.argv[2])
"""


@pytest.fixture(scope="module")
def base(make_model: Any, tiny_llama: Callable[..., LlamaConfig]) -> Path:
    return make_model(tiny_llama(intermediate_size=192))


@pytest.fixture(scope="module")
def both(base: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same compression in lrsd's format and in the other."""
    place = tmp_path_factory.mktemp("formats")
    recipe = Recipe.of(ratio=3.4, format="compressed-tensors", calib=str(text_file), **TEXT)
    compress(str(base), place / "theirs", recipe)
    compress(str(base), place / "ours", replace(recipe, run=replace(recipe.run, format="lrsd")))
    return place / "ours", place / "theirs"


def test_it_loads_without_lrsd_and_computes_the_same(both: tuple[Path, Path], tmp_path: Path) -> None:
    ours, theirs = both
    subprocess.run([sys.executable, "-c", _LOAD, theirs, tmp_path / "logits"], check=True)
    found = torch.load(tmp_path / "logits", weights_only=True)
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(ours).eval()(torch.arange(3, 40)[None]).logits.float()
    assert float((found - expected).square().mean().sqrt()) <= 0.03 * float(expected.std())


def test_integers_and_scales_are_those_of_the_other_format(both: tuple[Path, Path]) -> None:
    ours, theirs = (load_file(directory / "model.safetensors") for directory in both)
    config = QuantizationConfig.model_validate(
        json.loads((both[1] / "config.json").read_text())["quantization_config"]
    )
    schemes = {name: scheme.weights for scheme in config.config_groups.values() for name in scheme.targets}
    assert len(schemes) == 14
    for name, weights in schemes.items():
        packed = ours[f"{name}.weight_packed"]
        assert torch.equal(packed, theirs[f"{name}.weight_packed"])
        assert torch.equal(ours[f"{name}.weight_scale"], theirs[f"{name}.weight_scale"])
        shape = torch.Size(theirs[f"{name}.weight_shape"].tolist())
        codes_OI = unpack_from_int32(packed, weights.num_bits, shape)
        assert codes_OI.shape == shape
        assert theirs[f"{name}.weight_scale"].shape == (shape[0], shape[1] // weights.group_size)
        assert weights.symmetric
    assert not any(key.endswith(".weight") and key[: -len(".weight")] in schemes for key in theirs)


def test_layers_that_engines_fuse_are_stored_alike(both: tuple[Path, Path]) -> None:
    layers = read_manifest(both[1]).layers
    for block in range(2):
        for part, names in (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj"))):
            found = [layers[f"model.layers.{block}.{part}.{name}"].layer for name in names]
            assert all(entry == found[0] for entry in found)


def test_the_budget_is_kept_and_the_files_are_vouched_for(both: tuple[Path, Path]) -> None:
    ours, theirs = (read_manifest(directory) for directory in both)
    assert theirs.linear_bytes == ours.linear_bytes <= theirs.budget_bytes
    assert theirs.linear_bytes >= 0.97 * theirs.budget_bytes
    names = set(theirs.layers)
    assert stored_bytes(both[1], dict.fromkeys(names)) == theirs.linear_bytes
    verify(both[1])
    assert sorted(path.name for path in both[1].parent.iterdir()) == ["ours", "theirs"]


def test_the_card_says_how_this_one_is_loaded(both: tuple[Path, Path]) -> None:
    ours, theirs = ((directory / "README.md").read_text() for directory in both)
    assert "import lrsd" in ours
    assert "import lrsd" not in theirs
    assert "vLLM and SGLang serve the directory as it is" in theirs


def test_export_gives_the_same_as_compress(both: tuple[Path, Path], tmp_path: Path) -> None:
    export_compressed_tensors(both[0], tmp_path / "exported")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "exported" / name).read_bytes() == (both[1] / name).read_bytes()


def test_what_engines_cannot_read_is_refused_before_any_work(
    make_model: Any, text_file: Path, tmp_path: Path
) -> None:
    recipe = Recipe.of(ratio=3, format="compressed-tensors", calib=str(text_file), **TEXT)
    gpt2 = make_model(GPT2Config(vocab_size=300, n_positions=64, n_embd=64, n_layer=1, n_head=2))
    experts = make_model(MixtralConfig(
        vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, max_position_embeddings=64, pad_token_id=None,
    ))  # fmt: skip
    for model, reason in ((gpt2, "Conv1D"), (experts, "experts in fused tensors")):
        with pytest.raises(InputError, match=f"{reason}.*leave out --format"):
            compress(str(model), tmp_path / "out", recipe)
        assert not any(tmp_path.iterdir())


def test_another_form_is_refused_by_name(base: Path, text_file: Path, tmp_path: Path) -> None:
    compress(str(base), tmp_path / "out", Recipe.of(ratio=3, calib=str(text_file), **TEXT))
    with pytest.raises(CheckpointError, match=r"is stored as trellis codes.*--format compressed-tensors"):
        export_compressed_tensors(tmp_path / "out", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_a_missing_package_is_said_before_any_work(
    base: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrsd.export.compressed_tensors.find_spec", lambda name: None)
    recipe = Recipe.of(ratio=3, format="compressed-tensors", calib=str(text_file), **TEXT)
    with pytest.raises(InputError, match="pip install compressed-tensors"):
        compress(str(base), tmp_path / "out", recipe)
    assert not any(tmp_path.iterdir())
