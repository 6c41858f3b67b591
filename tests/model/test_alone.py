"""A model whose blocks need more than hidden states is run with it, or refused before anything is begun."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma4TextConfig
from transformers.models.llama import modeling_llama

from lrsd.compress import compress
from lrsd.errors import InputError
from lrsd.model.alone import require_separable
from lrsd.model.layout import find_layout
from lrsd.model.load import load_model
from lrsd.model.replay import Replay
from lrsd.recipe import Recipe

LAYER = modeling_llama.LlamaDecoderLayer


def leaves_it_in_a_module(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Every block adds what the one before it left."""
    output = FORWARD(self, hidden_states, *args, **kwargs) + LEFT.get("states", 0.0)
    LEFT["states"] = hidden_states.mean(dim=(1, 2), keepdim=True) + hidden_states[:, -1:, :1]
    return output


def needs_the_block_before(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if self.self_attn.layer_idx == 0:
        LEFT["states"] = hidden_states
        return FORWARD(self, hidden_states, *args, **kwargs)
    return FORWARD(self, hidden_states + LEFT.pop("states"), *args, **kwargs)


FORWARD = LAYER.forward
LEFT: dict[str, Tensor] = {}


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (leaves_it_in_a_module, "alone, it gives something else than within the model"),
        (needs_the_block_before, "KeyError: 'states'"),
    ],
)
def test_blocks_that_read_what_others_left_are_refused(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forward: Any,
    reason: str,
) -> None:  # fmt: skip
    LEFT.clear()
    monkeypatch.setattr(LAYER, "forward", forward)
    recipe = Recipe.of(ratio=4, calib=str(text_file), samples=8, seqlen=32)
    with pytest.raises(InputError, match=f"cannot be run block by block.*{reason}"):
        compress(str(tiny_model_dir), tmp_path / "out", recipe)
    assert not list(tmp_path.iterdir())


def test_others_are_left_as_they_were(tiny_model_dir: Path) -> None:
    loaded = load_model(str(tiny_model_dir))
    example = loaded.kind.example(loaded.model)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    require_separable(loaded.model, find_layout(loaded.model, example), example)
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    for module in loaded.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


@torch.inference_mode()
def test_what_a_block_writes_for_later_ones_is_not_what_they_read_next_time(make_model) -> None:
    """Gemma 4's last blocks read keys and values of earlier ones: those of the model as it was, whatever
    these ran on since."""
    config = Gemma4TextConfig(
        vocab_size=300, hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, global_head_dim=16, vocab_size_per_layer_input=300,
        hidden_size_per_layer_input=16, num_kv_shared_layers=2, sliding_window=16, pad_token_id=0,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    loaded = load_model(str(make_model(config)))
    example = loaded.kind.example(loaded.model)
    layout = find_layout(loaded.model, example)
    replay = Replay.start(loaded.model, layout, [example])
    hidden = replay.inputs[0][0]
    first = replay.run(3, 0, hidden)
    for writer in (0, 1):
        replay.run(writer, 0, -2 * hidden)
    assert torch.equal(replay.run(3, 0, hidden), first)
