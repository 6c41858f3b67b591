"""Tiny GGUF files, as llama.cpp's converter would write them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

# llama.cpp's names of a block's tensors, and of the others.
NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_header(
    path: Path, architecture: str, fields: Mapping[str, Any], tensors: Mapping[str, list[float]] | None = None
) -> Path:
    """A file without weights: fields, under "ARCH." those of the architecture, and lists of float32."""
    writer = GGUFWriter(path, architecture)
    add_fields(writer, fields, tensors or {})
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_fields(writer: GGUFWriter, fields: Mapping[str, Any], tensors: Mapping[str, list[float]]) -> None:
    adders = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in fields.items():
        adders[type(value)](key.replace("ARCH", writer.arch), value)
    for name, values in tensors.items():
        writer.add_tensor(name, np.array(values, np.float32))


def write_llama(
    path: Path,
    config: LlamaConfig,
    tokenizer: Any,
    dtype: type = np.float32,
    more: Callable[[GGUFWriter], None] = lambda writer: None,
) -> Path:
    """A random Llama with a tokenizer; without the head where that is tied, like the converter; and more."""
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__))
    writer.add_token_types([1] * config.vocab_size)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state: dict[str, Tensor] = AutoModelForCausalLM.from_config(config).state_dict()
    for name, tensor in state.items():
        module = name.removesuffix(".weight")
        if module == "lm_head" and config.tie_word_embeddings:
            continue
        known = OUTSIDE.get(module)
        if known is None:
            _, _, block, inner = module.split(".", 3)
            known = f"blk.{block}.{NAMES[inner]}"
        kind = dtype if tensor.ndim > 1 else np.float32
        writer.add_tensor(f"{known}.weight", tensor.float().numpy().astype(kind))
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
