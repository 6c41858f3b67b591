"""Whether a model can be compressed block by block: tried on a small input before anything is begun."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrsd.errors import InputError
from lrsd.model.layout import Layout
from lrsd.model.load import check_finite
from lrsd.model.replay import Replay
from lrsd.model.samples import Samples, logits_of, run_model

# A token id that no `Kind.example` is made of.
_OTHER_TOKEN = 1
# Deviation allowed, relative to the size of what is compared: kernels may add in another order.
_TOLERANCE = 0.02


@torch.inference_mode()
def require_separable(model: PreTrainedModel, layout: Layout, example: Samples) -> None:
    """Run every block on its own, after another input went through the model, and the rest of the model from
    each stack's last block on: what they give must be what the whole model gave.

    Raises: InputError naming the block that reads what others left in a way that is not known.
    """
    outputs: list[Tensor] = []

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple | list) else output)

    with ExitStack() as hooks:
        for block in layout.blocks:
            module = model.get_submodule(block.name)
            hooks.callback(module.register_forward_hook(leave).remove)
        logits = logits_of(run_model(model, example))
    replay = Replay.start(model, layout, [example, _other(example)])
    check_finite("the model's output", logits)
    for index, block in enumerate(layout.blocks):
        before = replay.inputs[block.stack][0] if block.is_first else outputs[index - 1]
        try:
            agrees = _agree(replay.run(index, 0, before), outputs[index])
            last = index + 1 == len(layout.blocks) or layout.blocks[index + 1].is_first
            if last and agrees:
                agrees = _agree(replay.logits_from(index, example, before), logits)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # models raise errors of every kind
            raise _refusal(model, block.name, f"{type(error).__name__}: {error}") from error
        if not agrees:
            raise _refusal(model, block.name, "alone, it gives something else than within the model")


def _refusal(model: PreTrainedModel, block: str, reason: str) -> InputError:
    lines = reason.strip().splitlines()
    return InputError(
        f"{type(model).__name__} cannot be run block by block, as lrsd compresses: {block} depends on what "
        f"others left behind ({lines[0]})"
    )


def _other(example: Samples) -> Samples:
    """The same with other features, and another last token: tokens that stand for images stay."""
    found = {}
    for name, value in example.inputs.items():
        found[name] = value + 1 if value.is_floating_point() else value.clone()
        if not value.is_floating_point():
            found[name][:, -1] = _OTHER_TOKEN
    return Samples(found)


def _agree(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    found, expected = found.float(), expected.float()
    size = expected.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return bool((found - expected).abs().max() <= _TOLERANCE * size)
