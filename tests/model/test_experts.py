"""Experts: taken apart and put together without a change, and one that no token reaches."""

import math
from pathlib import Path

import pytest
import torch
from recipes import on
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, PreTrainedModel, Qwen3MoeConfig

from lrsd.checkpoint.manifest import Manifest
from lrsd.compress import compress, dry_run
from lrsd.model.experts import fuse_experts, unfuse_experts
from lrsd.model.layout import find_layout
from lrsd.model.samples import Samples
from lrsd.recipe import Recipe
from lrsd.report.tables import summary_lines
from lrsd.settings import Calibration

TINY = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
STARVED = 3


def model_of(config: type) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**TINY), dtype=torch.float32).eval()


@pytest.mark.parametrize("config", [MixtralConfig, Qwen3MoeConfig, GptOssConfig])
@torch.inference_mode()
def test_experts_taken_apart_compute_the_same_and_fuse_to_the_same(config: type) -> None:
    model, tokens = model_of(config), torch.arange(3, 40)[None]
    expected, before = model(tokens).logits, {n: p.clone() for n, p in model.named_parameters()}
    unfuse_experts(model)
    assert not any(name.endswith("_proj") and ".experts" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-5)
    layout = find_layout(model, Samples({"input_ids": tokens[:, :2]}))
    routed = [group for group in layout.groups if group.routed]
    assert len(routed) == 2 * 2 * 4, "up and down of every expert, whether the trace reached it or not"
    assert {len(group.linears) for group in routed} == {1}
    fuse_experts(model)
    after = dict(model.named_parameters())
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model(tokens).logits, expected)


@pytest.fixture(scope="module")
def starving(make_model, tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """gpt-oss, its routers' biases against one expert so strong that no token goes there."""
    base = make_model(GptOssConfig(**TINY))
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.router.bias[STARVED] = -1e4
    directory = tmp_path_factory.mktemp("starving")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def compressed(base: Path, output: Path, text_file: Path, **changes: object) -> Manifest:
    settings = Recipe.of(**{"ratio": 4.0, "allocation": "uniform", "propagate": False, **changes})
    calibration = Calibration(calib=str(text_file), samples=16, seqlen=32)
    return compress(str(base), output, on(settings, calibration))


@pytest.mark.parametrize("bits", ["auto", pytest.param("16", marks=(pytest.mark.slow, pytest.mark.oldest))])
def test_a_starved_expert_is_fitted_on_the_tokens_of_the_others_and_reported(
    starving: Path, text_file: Path, tmp_path: Path, bits: str
) -> None:
    ratio = 4.0 if bits == "auto" else 1.5
    manifest = compressed(starving, tmp_path / "out", text_file, bits=bits, ratio=ratio)
    experts = {name: layer for name, layer in manifest.layers.items() if ".experts." in name}
    starved = {name: layer for name, layer in experts.items() if name.endswith(f".{STARVED}")}
    assert {layer.routed_tokens for layer in starved.values()} == {0}
    assert (
        sum(layer.routed_tokens for n, layer in experts.items() if ".0.mlp.experts.ups." in n) == 16 * 32 * 2
    )
    assert all(math.isfinite(layer.error) and layer.error < 0.5 for layer in experts.values())
    # A metric of no tokens would call every error 0.
    assert all(layer.error > 0 for layer in starved.values())
    said = "\n".join(summary_lines(manifest))
    assert all(f"{name} saw 0" in said for name in starved)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model(torch.arange(3, 40)[None]).logits).all()

    without = compressed(
        starving, tmp_path / "without", text_file, bits=bits, ratio=ratio, exclude=(f"*.experts.*.{STARVED}",)
    )
    for name in set(experts) - set(starved):
        # The last layer is fitted to whatever bytes are left.
        assert experts[name].error <= 1.1 * without.layers[name].error + 1e-5, name
    assert {without.untouched[name] for name in starved} == {"--exclude"}


@torch.inference_mode()
def test_experts_that_the_probe_misses_are_as_sensitive_per_token_as_those_that_it_reaches(
    make_model, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A probe of one token reaches two of four experts; by measurement the others would do without bytes."""
    for name in ("_SAMPLES", "_TOKENS"):
        monkeypatch.setattr(f"lrsd.steps.sensitivity.{name}", 1)
    recipe = Recipe.of(ratio=4, allocation="kl", propagate=False)
    calibration = Calibration(calib=str(text_file), samples=16, seqlen=32)
    observation = dry_run(str(make_model(Qwen3MoeConfig(**TINY))), on(recipe, calibration)).observation
    for block in range(2):
        for place in (f"model.layers.{block}.mlp.experts.{part}" for part in ("ups", "downs")):
            names = [f"{place}.{expert}" for expert in range(TINY["num_experts"])]
            per_token = {n: observation.sensitivity[n] / observation.routed[n] for n in names}
            assert min(per_token.values()) > 0
            missed = [
                n for n in names if sum(per_token[n] == pytest.approx(v) for v in per_token.values()) > 1
            ]
            reached = [n for n in names if n not in missed]
            assert len(missed) == len(reached) == 2
            mean = sum(observation.sensitivity[n] for n in reached) / sum(
                observation.routed[n] for n in reached
            )
            assert per_token[missed[0]] == pytest.approx(mean)
