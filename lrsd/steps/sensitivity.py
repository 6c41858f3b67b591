"""How much the model's output suffers from each layer's error, measured by forward passes only."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor, nn

from lrsd.methods.base import Probe
from lrsd.model.layout import Block, Layout
from lrsd.model.replay import Replay
from lrsd.model.samples import Samples, distance
from lrsd.model.slots import weight_slot
from lrsd.model.types import Model
from lrsd.work.onloading import bring_outside

# Tokens of a probe: set by the time they take, their effect on quality is not measured. The KL is read
# off every second one, since the head costs as much as a third of all blocks.
_SAMPLES = 2
_TOKENS = 192
_READ_EVERY = 2


def probe_rows(samples: Samples) -> int:
    """Rows of logits that a probe compares."""
    return probe_samples(samples).positions // _READ_EVERY


def probe_samples(samples: Samples) -> Samples:
    """What a probe runs on."""
    return samples[:_SAMPLES].cut(_TOKENS)


@contextmanager
def in_float32(
    model: nn.Module, layout: Layout, *, first: int = 0, blocks_only: bool = False
) -> Iterator[None]:
    """A 16-bit model that computes in float32: each block's weights are widened while it runs.

    No more is held twice than one block and what is not in a block: embeddings, head and norms, which
    models also read without running them. blocks_only: these stay as they are. first: the first block that
    will run.
    """
    narrow: dict[nn.Parameter, Tensor] = {}

    def widen(parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.is_floating_point() and parameter.dtype != torch.float32:
                narrow[parameter] = parameter.data
                parameter.data = parameter.data.float()

    def restore(parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter in narrow:
                parameter.data = narrow.pop(parameter)

    blocks = [model.get_submodule(block.name) for block in layout.blocks]
    within = {parameter for block in blocks for parameter in block.parameters()}
    others = [] if blocks_only else [p for p in model.parameters() if p not in within]
    with ExitStack() as hooks:
        for block in blocks[first:]:
            enter = block.register_forward_pre_hook(lambda module, args: widen(module.parameters()))
            leave = block.register_forward_hook(
                lambda module, args, output: restore(module.parameters()), always_call=True
            )
            hooks.callback(enter.remove)
            hooks.callback(leave.remove)
        if others:
            bring_outside(model)
        widen(others)
        try:
            yield
        finally:
            restore(others)


class BlockProbe:
    """KL(dense || the layers of a block perturbed), shared out among these layers.

    The pass after a block is made once for all of its layers; each layer's share of the KL is its
    share of the squared change of the block's output, relative to the token's norm. One pass per
    input group takes three times as long; at 4x on SmolLM2-135M it made no better plans (KL on other
    text 0.071 and 0.080 in two tries against 0.073 and 0.076, 0.122 without sensitivities).

    Runs in float32: in bfloat16 the rounding alone moves the output by about 1e-3 nats per token, as
    much as most layers do.
    """

    def __init__(
        self,
        model: Model,
        layout: Layout,
        samples: Samples,
        start: int = 0,
        before: Tensor | None = None,
    ) -> None:
        """start: the first block to measure; before: `after` of the block before it."""
        self._samples = probe_samples(samples)
        with in_float32(model, layout):
            self._replay = Replay.start(model, layout, [self._samples])
            self._index = 0
            self._before = self._replay.inputs[0][0]
            self._reference = self._answer()
        self._enter(start, None if before is None else before.to(self._replay.device, copy=True))

    @property
    def after(self) -> Tensor:
        """The hidden states after the block that is measured."""
        return self._after

    @property
    def reached(self) -> frozenset[str]:
        """Names of the block's groups that a token of the probe reached: all but those of some experts."""
        return self._reached

    def advance(self) -> None:
        """Go on to the next block."""
        if self._index + 1 < len(self._replay.layout.blocks):
            self._enter(self._index + 1, self._after)

    def measure(self, probes: Mapping[str, Probe]) -> dict[str, float]:
        """KL in nats per token per unit of relative error, by layer name. probes: of the block's layers."""
        probes = {name: probe for name, probe in probes.items() if probe.error > 0}
        if not probes:
            return {}
        with ExitStack() as replaced:
            replaced.enter_context(in_float32(self._replay.model, self._replay.layout, first=self._index))
            for name, probe in probes.items():
                replaced.enter_context(self._perturbed(name, probe))
            per_token = distance(self._replay.model, self._reference, self._answer())
        changes = {name: self._change(name, probe) for name, probe in probes.items()}
        total = sum(changes.values()) or 1.0
        return {name: per_token * changes[name] / total / probe.error for name, probe in probes.items()}

    def _enter(self, index: int, before: Tensor | None) -> None:
        block = self._replay.layout.blocks[index]
        self._index = index
        if block.is_first or before is None:
            before = self._replay.inputs[block.stack][0]
        self._before = before
        with self._widened_blocks():
            self._after, inputs = self._replay.run_with_inputs(index, 0, self._before)
        self._reached = frozenset(inputs)

    def _widened_blocks(self) -> AbstractContextManager[None]:
        return in_float32(self._replay.model, self._replay.layout, blocks_only=True)

    def _perturbed(self, name: str, probe: Probe) -> AbstractContextManager[None]:
        return weight_slot(self._replay.model, name).swapped(probe.W_OI, torch.float32)

    def _change(self, name: str, probe: Probe) -> float:
        """Mean squared change of the block's output, relative to each token's squared norm."""
        with self._widened_blocks(), self._perturbed(name, probe):
            moved = self._replay.run(self._index, 0, self._before) - self._after
        norm = (self._after**2).sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        return float(((moved**2).sum(-1) / norm).mean())

    def _answer(self) -> Tensor:
        return self._replay.logits_from(self._index, self._samples, self._before, _READ_EVERY)


def with_unreached_experts(
    block: Block, measured: Mapping[str, float], reached: Collection[str], routed: Mapping[str, int]
) -> dict[str, float]:
    """Sensitivities of a block's layers, with those of experts that no token of the probe reached: measured,
    these are 0, which says nothing of them.

    They get the mean of the reached experts' layers in the same place (`ups` or `downs`), times their share
    of the calibration tokens relative to the mean of those: one sensitivity per token for all of them.

    Args: measured: by layer name; reached: names of the groups that the probe reached; routed: calibration
        tokens by name of the experts' groups.
    """
    found = dict(measured)
    # A group of an expert's is one layer, and has its name.
    for place in {group.routed for group in block.groups if group.routed}:
        names = [group.name for group in block.groups if group.routed == place and group.name in measured]
        seen = [name for name in names if name in reached]
        tokens = sum(routed[name] for name in seen)
        for name in names:
            if name not in reached and tokens:
                found[name] = sum(measured[other] for other in seen) * routed[name] / tokens
    return found
