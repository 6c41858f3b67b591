"""Adapters trained on a packed model, read back on it and on what is exported of it."""

import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lrsd.compress import compress
from lrsd.export.dense import export_dense
from lrsd.forms.packed import PackedLinear
from lrsd.recipe import Recipe
from lrsd.runtimes.peft import on_packed

TOKENS = torch.arange(3, 40)[None]


def logits(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model.eval()(TOKENS).logits.float()
    return found


@pytest.mark.parametrize("settings", [{"ratio": 4}, {"ratio": 1.5, "bits": "16"}], ids=["codes", "16 bit"])
def test_an_adapter_learns_and_goes_with_the_packed_and_the_exported_model(
    settings: dict[str, object], tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = Recipe.of(**settings, calib=str(text_file), samples=8, seqlen=32)
    compress(str(tiny_model_dir), tmp_path / "small", recipe)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    packed = [name for name, module in before.named_modules() if isinstance(module, PackedLinear)]
    assert packed
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of a layer that it has not met
        model = get_peft_model(before, on_packed(config))
    losses = []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 4
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    for _ in range(6):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.2, losses
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    known = on_packed(LoraConfig.from_pretrained(tmp_path / "adapter"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = PeftModel.from_pretrained(again, tmp_path / "adapter", config=known)
    assert torch.equal(logits(read), expected)

    export_dense(tmp_path / "small", tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    found = logits(PeftModel.from_pretrained(plain, tmp_path / "adapter"))
    assert float((found - expected).square().mean().sqrt()) < 0.05 * float(expected.std())


def test_all_linear_means_packed_layers_too(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = Recipe.of(ratio=4, calib=str(text_file), samples=8, seqlen=32, exclude=("*.0.mlp.*",))
    compress(str(tiny_model_dir), tmp_path / "small", recipe)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"give the model too: on_packed\(config, model\)"):
        on_packed(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, on_packed(config, model))
    layers = {name for name, _ in adapted.named_modules() if name.endswith(".lora_A.default")}
    assert len(layers) == 2 * 7
    assert not any("lm_head" in name for name in layers)
