"""How much the model's output suffers from each layer's error, measured by forward passes only."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel

from lrsd.model.layout import Layout, LinearSpec, replaced_weight
from lrsd.model.replay import Replay

# Tokens of a probe: set by the time they take, their effect on quality is not measured. The KL is read
# off every second one, since the head costs as much as a third of all blocks.
_SAMPLES = 2
_TOKENS = 192
_READ_EVERY = 2
PROBE_LOGITS = _SAMPLES * _TOKENS // _READ_EVERY


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """A 16-bit model that computes in float32: each module's own weights are widened while it runs.

    No more than one module's weights are held twice.
    """
    narrow: dict[nn.Parameter, Tensor] = {}

    def widen(module: nn.Module, args: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() and parameter.dtype != torch.float32:
                narrow[parameter] = parameter.data
                parameter.data = parameter.data.float()

    def restore(module: nn.Module, args: Any, output: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter in narrow:
                parameter.data = narrow.pop(parameter)

    with ExitStack() as hooks:
        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                hooks.callback(module.register_forward_pre_hook(widen).remove)
                hooks.callback(module.register_forward_hook(restore, always_call=True).remove)
        yield


@dataclass(frozen=True)
class Perturbation:
    """A layer's weight replaced by an approximation of a known relative output error."""

    spec: LinearSpec
    approximation_OI: Tensor
    error: float


class Probe:
    """KL(dense || the layers of a block perturbed), shared out among these layers.

    The pass behind a block is made once for all of its layers; each layer's share of the KL is its
    share of the squared change of the block's output, relative to the token's norm. One pass per
    input group takes three times as long; at 4x on SmolLM2-135M it made no better plans (KL on other
    text 0.071 and 0.080 in two tries against 0.073 and 0.076, 0.122 without sensitivities).

    Runs in float32: in bfloat16 the rounding alone moves the output by about 1e-3 nats per token, as
    much as most layers do.
    """

    def __init__(self, model: PreTrainedModel, layout: Layout, tokens: Tensor) -> None:
        self._tokens = tokens[:_SAMPLES, :_TOKENS]
        with in_float32(model):
            self._replay, stream = Replay.start(model, layout, [self._tokens])
            self._before = stream[0]
            self._reference = self._log_probabilities(0)
            self._index = 0
            self._after = self._replay.run(0, self._before)

    def advance(self) -> None:
        """Go on to the next block."""
        self._index += 1
        self._before = self._after
        if self._index < len(self._replay.layout.blocks):
            with in_float32(self._replay.model):
                self._after = self._replay.run(self._index, self._before)

    def measure(self, block: list[Perturbation]) -> dict[str, float]:
        """KL in nats per token per unit of relative error, by layer name."""
        block = [perturbation for perturbation in block if perturbation.error > 0]
        if not block:
            return {}
        with ExitStack() as replaced:
            replaced.enter_context(in_float32(self._replay.model))
            for perturbation in block:
                replaced.enter_context(self._perturbed(perturbation))
            perturbed = self._log_probabilities(self._index)
        divergence = kl_div(perturbed, self._reference, reduction="sum", log_target=True)
        per_token = max(float(divergence), 0.0) * _READ_EVERY / self._tokens.numel()
        changes = [self._change(perturbation) for perturbation in block]
        total = sum(changes) or 1.0
        return {
            perturbation.spec.name: per_token * change / total / perturbation.error
            for perturbation, change in zip(block, changes, strict=True)
        }

    def _perturbed(self, perturbation: Perturbation) -> AbstractContextManager[None]:
        W_OI = perturbation.approximation_OI.float()
        return replaced_weight(self._replay.model, perturbation.spec, W_OI, W_OI.dtype)

    def _change(self, perturbation: Perturbation) -> float:
        """Mean squared change of the block's output, relative to each token's squared norm."""
        with in_float32(self._replay.model), self._perturbed(perturbation):
            moved = self._replay.run(self._index, self._before) - self._after
        norm = (self._after**2).sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        return float(((moved**2).sum(-1) / norm).mean())

    def _log_probabilities(self, index: int) -> Tensor:
        return log_softmax(self._replay.logits_from(index, self._tokens, self._before, _READ_EVERY), -1)
