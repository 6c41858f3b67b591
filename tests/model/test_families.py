"""Families of other shapes: fused or biased projections, flattened inputs, parallel blocks, LayerNorm."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPTNeoXConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
)

from lrsd.compress import compress
from lrsd.config import CalibrationSettings, CompressionSettings
from lrsd.storage.checkpoint import stored_bytes

LLAMA_LIKE = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
GPT_LIKE = {"vocab_size": 300, "hidden_size": 64, "bos_token_id": 0, "eos_token_id": 1}
FAMILIES: dict[str, PretrainedConfig] = {
    "qwen2, biased q k v": Qwen2Config(**LLAMA_LIKE),
    "phi3, fused projections": Phi3Config(**LLAMA_LIKE),
    "gemma2, norms behind the linears": Gemma2Config(**LLAMA_LIKE, head_dim=16),
    "bloom, heads interleaved": BloomConfig(**GPT_LIKE, n_layer=2, n_head=4),
    "opt, flattened inputs": OPTConfig(
        **GPT_LIKE, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
        word_embed_proj_dim=64, pad_token_id=1,
    ),
    "neox, parallel block": GPTNeoXConfig(
        **GPT_LIKE, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    ),
    "phi, parallel block on one norm": PhiConfig(**LLAMA_LIKE),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_compresses_to_its_budget_and_reloads_near_itself(
    make_model, text_file: Path, tmp_path: Path, family: str
) -> None:
    base = make_model(FAMILIES[family])
    manifest = compress(
        str(base), tmp_path / "out", CompressionSettings(ratio=1.1, batch=4),
        CalibrationSettings(source=str(text_file), samples=9, seqlen=32),
    )  # fmt: skip
    dense, packed = (
        AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32).eval() for d in (base, tmp_path / "out")
    )
    assert 0.99 * manifest.budget_bytes <= manifest.linear_bytes <= manifest.budget_bytes
    assert manifest.untouched in ((), ("lm_head",))
    saved = manifest.dense_linear_bytes - manifest.linear_bytes
    assert stored_bytes(base) - stored_bytes(tmp_path / "out") == saved
    tokens = torch.arange(2, 42)[None]
    with torch.inference_mode():
        expected, found = dense(tokens).logits, packed(tokens).logits
    assert float((found - expected).square().mean().sqrt()) <= 0.5 * float(expected.std())
