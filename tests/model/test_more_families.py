"""Families unlike the others: routers, shared weights, recurrent layers, latent attention, several media, and
keys and values of earlier layers. Each round-trips at nearly its full budget, exports under the names of its
own checkpoint, and runs at 4x; or is refused at once.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import EXPERTS, GPT_LIKE, LLAMA_LIKE, TWO_STACKS, outputs, varied
from recipes import on
from transformers import AutoModelForCausalLM as Causal
from transformers import AutoModelForImageTextToText as ImageText
from transformers import AutoModelForMaskedLM as Masked
from transformers import AutoModelForSeq2SeqLM as Seq2Seq

from lrsd.compress import compress
from lrsd.errors import InputError
from lrsd.export.dense import export_dense
from lrsd.intake.json import read_json
from lrsd.intake.safetensors import take_inventory
from lrsd.model.kinds import kind_of
from lrsd.recipe import Recipe
from lrsd.settings import Calibration

LLAMA = {**LLAMA_LIKE, "head_dim": 16, "pad_token_id": 0}
MIXTURE = {**EXPERTS, "pad_token_id": 0}
SHARED_BLOCK = {
    **LLAMA, "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "use_mamba_kernels": False,
    "attention_head_dim": 32, "attention_hidden_size": 128,
}  # fmt: skip
SHARED_KEYS = {
    **LLAMA, "num_hidden_layers": 4, "vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 16,
}  # fmt: skip
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
LATENT = {
    **LLAMA, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "moe_intermediate_size": 48, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1,
}  # fmt: skip
SWITCH = {
    "vocab_size": 300, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2,
    "num_heads": 4, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "num_experts": 4,
    "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
# More weights than the text decoder has.
LARGE_VISION = {**VISION, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
QWEN_VISION = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
    "patch_size": 14, "num_position_embeddings": 16,
}  # fmt: skip
QWEN_TOKENS = {
    "image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8,
}  # fmt: skip


def rope(*sections: int, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections), **more}


QWEN_TEXT = {**LLAMA, "rope_parameters": rope(2, 3, 3)}
QWEN35_TEXT = {
    **LLAMA, **LINEAR_ATTENTION, "rope_parameters": rope(2, 1, 1, partial_rotary_factor=0.5),
}  # fmt: skip
HEAD = {"lm_head"}
# By name: configuration, its settings, the head, and what of the names of untouched weights must be there.
FAMILIES: dict[str, tuple[str, dict[str, Any], Any, set[str]]] = {
    "zamba": (
        "ZambaConfig", {**SHARED_BLOCK, "mamba_d_state": 8, "n_mamba_heads": 2}, Causal, {"shared_transf"},
    ),
    "zamba2": (
        "Zamba2Config",
        {
            **SHARED_BLOCK, "mamba_d_state": 16, "n_mamba_heads": 8, "mamba_headdim": 16, "mamba_ngroups": 1,
            "num_mem_blocks": 1, "adapter_rank": 8, "chunk_size": 16,
        },
        Causal, {"shared_transformer"},
    ),
    "llama4-text": (
        "Llama4TextConfig",
        {**MIXTURE, "num_experts_per_tok": 1, "intermediate_size_mlp": 128, "interleave_moe_layer_step": 1},
        Causal, {"router"},
    ),
    "phimoe": ("PhimoeConfig", MIXTURE, Causal, {"router"}),
    "gemma4": ("Gemma4TextConfig", {**SHARED_KEYS, "global_head_dim": 16}, Causal, HEAD),
    "gemma3n": (
        "Gemma3nTextConfig",
        {**SHARED_KEYS, "laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4},
        Causal, HEAD,
    ),
    "qwen3.5-text": ("Qwen3_5TextConfig", QWEN35_TEXT, Causal, {"conv1d"}),
    "qwen3-next": (
        "Qwen3NextConfig", {**MIXTURE, **LINEAR_ATTENTION, "shared_expert_intermediate_size": 48}, Causal,
        {"conv1d"},
    ),
    "jamba": (
        "JambaConfig",
        {
            **MIXTURE, "use_mamba_kernels": False, "mamba_d_state": 8, "attn_layer_period": 2,
            "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        },
        Causal, {"conv1d"},
    ),
    "lfm2": ("Lfm2Config", {**LLAMA, "layer_types": ["conv", "full_attention"]}, Causal, {"conv.conv"}),
    "falcon-h1": (
        "FalconH1Config",
        {
            **LLAMA, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
            "mamba_chunk_size": 16,
        },
        Causal, {"conv1d"},
    ),
    "granite-hybrid": (
        "GraniteMoeHybridConfig",
        {
            **LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 64,
            "layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 16,
            "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16,
        },
        Causal, {"conv1d"},
    ),
    "mamba2": (
        "Mamba2Config",
        {
            **GPT_LIKE, "num_hidden_layers": 2, "state_size": 16, "num_heads": 8, "head_dim": 16,
            "n_groups": 1, "chunk_size": 16, "pad_token_id": 0,
        },
        Causal, {"conv1d"},
    ),
    "deepseek-v2": ("DeepseekV2Config", LATENT, Causal, HEAD),
    "deepseek-v3": ("DeepseekV3Config", LATENT, Causal, HEAD),
    "olmoe": ("OlmoeConfig", {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2}, Causal, HEAD),
    "glm4-moe": (
        "Glm4MoeConfig",
        {
            **MIXTURE, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
            "topk_group": 1,
        },
        Causal, HEAD,
    ),
    "openai-gpt": (
        "OpenAIGPTConfig", {"vocab_size": 300, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4},
        Causal, HEAD,
    ),
    "switch": ("SwitchTransformersConfig", SWITCH, Seq2Seq, HEAD),
    "nllb-moe": (
        "NllbMoeConfig",
        {
            **TWO_STACKS, "max_position_embeddings": 70, "num_experts": 4, "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
        },
        Seq2Seq, HEAD,
    ),
    "modernbert": (
        "ModernBertConfig",
        {**LLAMA, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}, Masked, set(),
    ),
    "llava": (
        "LlavaConfig",
        {
            "text_config": {**LLAMA, "model_type": "llama"}, "image_token_index": 5,
            "vision_config": {**VISION, "model_type": "clip_vision_model", "projection_dim": 32},
        },
        ImageText, {"vision_tower", "multi_modal_projector"},
    ),
    "gemma3-vl": (
        "Gemma3Config",
        {
            "text_config": {**LLAMA, "sliding_window": 16}, "vision_config": LARGE_VISION,
            "mm_tokens_per_image": 4, "image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7,
        },
        ImageText, {"vision_tower"},
    ),
    "gemma4-vl": (
        "Gemma4Config",
        {
            "text_config": {**SHARED_KEYS, "global_head_dim": 16}, "vision_config": VISION,
            "audio_config": None,
        },
        ImageText, {"vision_tower"},
    ),
    "mistral3": (
        "Mistral3Config",
        {
            "text_config": {**LLAMA, "model_type": "mistral"}, "image_token_index": 5,
            "spatial_merge_size": 1, "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 16},
        },
        ImageText, {"vision_tower", "multi_modal_projector"},
    ),
    "qwen2-vl": (
        "Qwen2VLConfig",
        {
            "text_config": QWEN_TEXT, **QWEN_TOKENS,
            "vision_config": {
                "depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2,
                "patch_size": 14,
            },
        },
        ImageText, {"visual"},
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VLConfig",
        {
            "text_config": QWEN_TEXT, **QWEN_TOKENS,
            "vision_config": {**QWEN_VISION, "fullatt_block_indexes": [1]},
        },
        ImageText, {"visual"},
    ),
    "qwen3-vl": (
        "Qwen3VLConfig",
        {
            "text_config": QWEN_TEXT, **QWEN_TOKENS,
            "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0]},
        },
        ImageText, {"visual"},
    ),
    "qwen3.5": (
        "Qwen3_5Config", {"text_config": QWEN35_TEXT, "vision_config": QWEN_VISION, **QWEN_TOKENS}, ImageText,
        {"visual"},
    ),
}  # fmt: skip
QUICK = {"phimoe", "gemma4", "llava"}
CASES = [
    pytest.param(name, marks=() if name in QUICK else (pytest.mark.slow, pytest.mark.oldest))
    for name in FAMILIES
]


def config_of(name: str) -> Any:
    config, settings, _, _ = FAMILIES[name]
    if not hasattr(transformers, config):
        pytest.skip(f"this transformers has no {config}")
    return getattr(transformers, config)(**settings)


@pytest.mark.parametrize("name", CASES)
def test_further_family(make_model, text_file: Path, tmp_path: Path, name: str) -> None:
    _, _, head, untouched = FAMILIES[name]
    base = make_model(config_of(name), head)
    calibration = Calibration(calib=str(text_file), samples=9, seqlen=32)
    out, dense = tmp_path / "out", tmp_path / "dense"
    whole = Recipe.of(ratio=1.001, batch=4, propagate=False)
    manifest = compress(str(base), out, on(whole, calibration))

    assert manifest.linear_bytes <= manifest.budget_bytes
    for part in untouched:
        assert any(part in known for known in manifest.untouched)
        assert not any(part in known for known in manifest.layers)
    model = head.from_pretrained(base, dtype=torch.float32)
    samples = varied(kind_of(model).example(model))
    expected = outputs(model, samples)
    packed = outputs(head.from_pretrained(out, dtype=torch.float32), samples)
    assert (packed - expected).square().sum() <= 1e-3 * expected.square().sum()

    export_dense(out, dense)
    assert take_inventory(dense).keys() == take_inventory(base).keys()
    exported = outputs(head.from_pretrained(dense, dtype=torch.float32), samples)
    assert (exported - packed).square().sum() <= 1e-3 * packed.square().sum()

    small = compress(
        str(base), tmp_path / "small", on(Recipe.of(ratio=4, batch=4, propagate=True), calibration)
    )
    assert small.linear_bytes <= small.budget_bytes
    assert torch.isfinite(outputs(head.from_pretrained(tmp_path / "small"), samples)).all()


def test_blocks_that_run_more_than_once_are_refused(make_model, text_file: Path, tmp_path: Path) -> None:
    config = transformers.AlbertConfig(
        vocab_size=300, embedding_size=32, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=64,
    )  # fmt: skip
    base = make_model(config, Masked)
    with pytest.raises(InputError, match=r"runs its blocks \[3\] times per pass"):
        compress(str(base), tmp_path / "out", on(Recipe.of(ratio=2), Calibration(calib=str(text_file))))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["llava", "gemma3-vl"])
def test_images_are_read_as_before(make_model, text_file: Path, tmp_path: Path, name: str) -> None:
    """What reads images is kept to the bit; what is generated after one is the same where next to nothing is
    rounded."""
    base = make_model(config_of(name), ImageText)
    recipe = Recipe.of(ratio=1.001, batch=4, propagate=False)
    compress(str(base), tmp_path / "out", on(recipe, Calibration(calib=str(text_file), samples=9, seqlen=32)))
    before, after = (
        ImageText.from_pretrained(path, dtype=torch.float32) for path in (base, tmp_path / "out")
    )
    kept = {k: v for k, v in before.state_dict().items() if "vision_tower" in k or "projector" in k}
    assert kept
    assert all(torch.equal(after.state_dict()[key], value) for key, value in kept.items())
    images = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[9, *[5] * 4, 30, 31, 32]])
    read = {"input_ids": tokens, "pixel_values": images, "attention_mask": torch.ones_like(tokens)}
    with torch.inference_mode():
        without = before(input_ids=tokens[:, 5:]).logits
        with_image = before(**read).logits
        assert not torch.allclose(with_image[:, 5:], without, atol=0.1)
        error = (after(**read).logits - with_image).square().sum() / with_image.square().sum()
        assert error <= 1e-3
        written = [m.generate(**read, max_new_tokens=6, do_sample=False) for m in (before, after)]
    assert torch.equal(*written)


def test_experts_of_llama_4_are_fitted_to_their_own_tokens(
    make_model, text_file: Path, tmp_path: Path
) -> None:
    base = make_model(config_of("llama4-text"))
    text = Calibration(calib=str(text_file), samples=9, seqlen=32)
    manifest = compress(str(base), tmp_path / "out", on(Recipe.of(ratio=4), text))
    ups = {name: layer.routed_tokens for name, layer in manifest.layers.items() if ".ups." in name}
    assert len(ups) == 2 * 4
    for block in range(2):
        counts = [count for name, count in ups.items() if f"layers.{block}." in name]
        assert sum(counts) == 9 * 32  # one expert per token
        assert max(counts) < 9 * 32


@pytest.mark.parametrize(
    ("config", "settings", "earlier"),
    [
        ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
         {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("PhiConfig", {"rope_parameters": {**rope(), "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
         {"rope_theta": 500.0, "partial_rotary_factor": 0.5}),
        ("Gemma3TextConfig",
         {"rope_parameters": {
             "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
             "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
         }},
         {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
          "rope_local_base_freq": 100.0}),
    ],
)  # fmt: skip
def test_exports_have_rotary_settings_where_transformers_4_looks(
    make_model, text_file: Path, tmp_path: Path, config: str, settings: dict[str, Any],
    earlier: dict[str, Any],
) -> None:  # fmt: skip
    base = make_model(getattr(transformers, config)(**{**LLAMA, **settings}))
    text = Calibration(calib=str(text_file), samples=9, seqlen=32)
    compress(str(base), tmp_path / "out", on(Recipe.of(ratio=4, batch=4), text))
    export_dense(tmp_path / "out", tmp_path / "dense")
    written = read_json(tmp_path / "dense/config.json")
    assert {name: written.get(name) for name in earlier} == earlier
    before, after = (Causal.from_pretrained(tmp_path / name) for name in ("out", "dense"))
    frequencies = [
        {name: value for name, value in model.named_buffers() if "inv_freq" in name}
        for model in (before, after)
    ]
    assert frequencies[0].keys() == frequencies[1].keys()
    assert all(torch.equal(value, frequencies[1][name]) for name, value in frequencies[0].items())
