"""Where a layer's output enters the residual stream, found by trying; and what such a layer is aimed at."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, GPT2Config, GPTNeoXConfig, LlamaConfig

from lrsd.model.layout import find_layout
from lrsd.model.load import load_model
from lrsd.model.replay import Replay, Residual
from lrsd.model.samples import Samples
from lrsd.numerics.solver import propagated_target
from lrsd.steps.propagate import TwoStreams, followed_batches, pair_moments
from lrsd.work.journal import Workspace

SMALL = {"vocab_size": 320, "num_hidden_layers": 2}
WIDTHS = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, **WIDTHS, num_key_value_heads=2),
    # Its norms take away what all channels are shifted by.
    "gpt2": GPT2Config(vocab_size=320, n_layer=2, n_embd=64, n_head=4, n_inner=96),
    # Norms between a layer and the stream.
    "gemma2": Gemma2Config(**SMALL, **WIDTHS, num_key_value_heads=2, head_dim=16),
    # Attention and the rest side by side.
    "neox": GPTNeoXConfig(**SMALL, **WIDTHS, use_parallel_residual=True),
}
PLACES = {
    "llama": {
        "self_attn.o_proj": Residual.AMID,
        "mlp.down_proj": Residual.AFTER,
        "self_attn.q_proj": Residual.NOWHERE,
    },
    "gpt2": {"attn.c_proj": Residual.AMID, "mlp.c_proj": Residual.AFTER, "attn.c_attn": Residual.NOWHERE},
    "gemma2": {"self_attn.o_proj": Residual.NOWHERE, "mlp.down_proj": Residual.NOWHERE},
    "neox": {"attention.dense": Residual.AFTER, "mlp.dense_4h_to_h": Residual.AFTER},
}


def replay_of(directory: Path, dtype: str = "float32") -> Replay:
    loaded = load_model(str(directory), dtype=dtype)
    tokens = torch.arange(4 * 12).view(4, 12) * 7 % 290 + 3
    layout = find_layout(loaded.model, loaded.kind.example(loaded.model))
    with torch.no_grad():
        return Replay.start(loaded.model, layout, list(Samples({"input_ids": tokens}).split(2)))


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", PLACES)
def test_where_a_layer_adds_to_the_stream(make_model: Any, family: str, dtype: str) -> None:
    replay = replay_of(make_model(CONFIGS[family]), dtype)
    for index, block in enumerate(replay.layout.blocks):
        hidden = replay.inputs[0][0]
        for layer, place in PLACES[family].items():
            assert replay.residual_of(index, f"{block.name}.{layer}", hidden) is place, layer
        assert not any(
            module._forward_hooks or module._forward_pre_hooks for module in replay.model.modules()
        )


@torch.no_grad()
@pytest.mark.parametrize("layer", ["self_attn.o_proj", "mlp.down_proj"])
def test_a_layer_that_writes_the_stream_is_aimed_at_what_is_missing_there(
    make_model: Any, layer: str
) -> None:
    """In the stream after it, with its own weight still dense: found by running both models through."""
    replay = replay_of(make_model(CONFIGS["llama"]))
    block = replay.layout.blocks[0]
    group = next(group for group in block.groups if group.name.endswith(layer))
    module, after = replay.model.get_submodule(group.name), replay.block(0)
    if group.name.endswith("o_proj"):
        after = after.get_submodule("post_attention_layernorm")

    def seen() -> list[tuple[Tensor, Tensor]]:
        """The layer's input and the stream after it, by batch."""
        inputs, streams = [], []
        hooks = [module.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))]
        if after is replay.block(0):
            hooks.append(after.register_forward_hook(lambda m, args, output: streams.append(output)))
        else:
            hooks.append(after.register_forward_pre_hook(lambda m, args: streams.append(args[0])))
        for batch, hidden in enumerate(replay.inputs[0]):
            replay.run(0, batch, hidden)
        for hook in hooks:
            hook.remove()
        return list(zip(inputs, streams, strict=True))

    two = TwoStreams.start(Workspace(), replay, 0, rounds=True)
    dense = seen()
    noise = torch.Generator().manual_seed(0)
    for name in ("self_attn.q_proj", "self_attn.v_proj"):
        weight = replay.block(0).get_submodule(name).weight
        weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=noise)
    compressed = seen()
    pair = pair_moments(replay, 0, group, two, {}, {0})
    assert pair.writes_residual
    assert pair.ends == (layer == "mlp.down_proj")

    m_TO = torch.cat([d[1] - c[1] for d, c in zip(dense, compressed, strict=True)]).flatten(0, 1).double()
    x_TI = torch.cat([c[0] for c in compressed]).flatten(0, 1).double()
    aims = two.dense_outputs if pair.ends else replay.inputs[0]
    norms = [aim.square().sum(-1) for aim in aims]
    w_T = torch.cat([(norm.mean() / norm).flatten() for norm in norms]).double()
    expected_OI = (m_TO.T * w_T) @ x_TI / w_T.sum()
    found_OI = (pair.fit_missing + pair.held_out_missing).mean
    torch.testing.assert_close(found_OI, expected_OI, rtol=1e-3, atol=1e-5 * float(expected_OI.abs().max()))
    gram_II = (x_TI.T * w_T) @ x_TI / w_T.sum()
    torch.testing.assert_close((pair.fit + pair.held_out).gram, gram_II, rtol=1e-3, atol=1e-6)
    alike_II = x_TI.T @ x_TI / len(x_TI)
    torch.testing.assert_close(pair.compressed.gram, alike_II, rtol=1e-3, atol=1e-6)

    W_OI = module.weight.double()
    step_OI = (
        propagated_target(W_OI, gram_II, pair.missing(W_OI, pair.fit_missing + pair.held_out_missing))[0]
        - W_OI
    )
    left_T = (m_TO - x_TI @ step_OI.T).square().sum(1)
    assert float(w_T @ left_T) < 0.9 * float(w_T @ m_TO.square().sum(1))


@torch.no_grad()
def test_errors_are_followed_on_the_first_samples(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = replay_of(make_model(CONFIGS["llama"]))
    for samples, batches in ((1, 1), (2, 1), (3, 2), (100, 2)):
        monkeypatch.setattr("lrsd.steps.propagate._FOLLOWED", {True: samples})
        assert followed_batches(replay, rounds=True) == batches
        assert len(TwoStreams.start(Workspace(), replay, 0, rounds=True).dense_outputs) == batches
