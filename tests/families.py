"""What the tests of families share: sizes of tiny random models, inputs, outputs."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrsd.model.samples import Samples, logits_of, run_model

LLAMA_LIKE = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
GPT_LIKE = {"vocab_size": 300, "hidden_size": 64, "bos_token_id": 0, "eos_token_id": 1}
BERT_LIKE = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 70, "pad_token_id": 1,
}  # fmt: skip
EXPERTS = {
    **LLAMA_LIKE, "head_dim": 16, "num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4,
    "moe_intermediate_size": 48,
}  # fmt: skip
TWO_STACKS = {
    "vocab_size": 300, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip


def varied(samples: Samples) -> Samples:
    """Inputs of the same form, whose tokens are not all the same."""
    return Samples({
        name: torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
        if value.is_floating_point()
        else torch.arange(value.shape[1])[None] * 7 % 290 + 3
        for name, value in samples.inputs.items()
    })  # fmt: skip


@torch.inference_mode()
def outputs(model: PreTrainedModel, samples: Samples) -> Tensor:
    return logits_of(run_model(model.eval(), samples))
