"""Recovery block by block: each block's continuous tensors are fitted to the dense block's output on the
dense model's hidden states, the compressed block reading those of the recovered blocks before it.

Source: Li et al., "BRECQ", ICLR 2021, section 3; Chen et al., "EfficientQAT", ACL 2025, section 3.
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lrsd.model.replay import Replay
from lrsd.model.samples import Samples
from lrsd.progress import Progress
from lrsd.training.descent import Schedule, arithmetic, descend
from lrsd.training.differentiable import continuous, store, trainable
from lrsd.training.settings import Recovery
from lrsd.work.journal import Workspace
from lrsd.work.streams import Stream


@dataclass(frozen=True)
class RecoveredBlock:
    """What became of a block: its values, as stored, by their names in the block; none if nothing got better.
    losses: on the held-out samples, at the start and after every epoch."""

    values: dict[str, Tensor]
    losses: list[float]


def recover_blocks(
    dense: Replay,
    compressed: Replay,
    batches: list[Samples],
    trained: int,
    settings: Recovery,
    progress: Progress,
    workspace: Workspace,
) -> dict[str, RecoveredBlock]:
    """Recover all blocks of `compressed.model`, in place, in their order.

    Minimized is the mean over tokens of ||y - d||^2 / ||d||^2, d being the dense block's output: what follows
    normalizes it, and the norms of a few tokens are a thousand times those of the others.

    Args: batches: the samples; trained: how many of the batches are trained on, the others are held out.
    Returns: by the name of the block. Raises: NumericsError if a loss is not finite.
    """
    found = {}
    progress.stage("recover blocks", len(dense.layout.blocks))
    for index, block in enumerate(dense.layout.blocks):
        if block.is_first and index > 0:  # the decoder looks at what the recovered encoder gives
            compressed = Replay.start(
                compressed.model, compressed.layout, batches,
                lambda name: workspace.new_stream(f"compressed-{name}"),
            )  # fmt: skip
        step, module = step_name(index), compressed.block(index)
        if step not in workspace:
            before = _entering(index, dense, compressed, workspace)
            recovered = _recover(index, dense, compressed, before, trained, settings, workspace)
            workspace.finish(step, recovered, keep=_streams(index))
        recovered = workspace.read(step, RecoveredBlock)
        store(module, recovered.values)
        dense.finished(dense.block(index))
        found[block.name] = recovered
        progress.step(f"{block.name}, held out {recovered.losses[0]:.3g} -> {min(recovered.losses):.3g}")
    return found


def step_name(index: int) -> str:
    """Of a block, in the journal."""
    return f"recover-{index:04d}"


def _streams(index: int) -> tuple[str, str]:
    """Names of the dense and the compressed hidden states that leave a block."""
    return f"{step_name(index)}-dense", f"{step_name(index)}-compressed"


def _entering(index: int, dense: Replay, compressed: Replay, workspace: Workspace) -> tuple[Stream, Stream]:
    block = dense.layout.blocks[index]
    if block.is_first:
        return dense.inputs[block.stack], compressed.inputs[block.stack]
    first, second = _streams(index - 1)
    return workspace.stream(first), workspace.stream(second)


def _recover(
    index: int,
    dense: Replay,
    compressed: Replay,
    before: tuple[Stream, Stream],
    trained: int,
    settings: Recovery,
    workspace: Workspace,
) -> RecoveredBlock:
    """Train one block, and run it on all samples, the dense one too."""
    outputs, reached_outputs = (workspace.new_stream(name) for name in _streams(index))
    dense.pass_(index, before[0], outputs)
    module, hidden = compressed.block(index), before[1]
    dtypes = {name: module.get_parameter(name).dtype for name in continuous(module)}
    every = range(len(outputs))
    with trainable(module) as masters, ExitStack() as stack:
        arithmetic(compressed.device, stack)
        wide = _widened(compressed, index)

        def error(batch: int) -> Tensor:
            return relative_error(wide.run(index, batch, hidden[batch].float()), outputs[batch])

        def loss(batch: int) -> float:
            with torch.enable_grad():
                found = error(batch)
                found.backward()
            return float(found.detach())

        def held_out() -> float:
            sizes = compressed.batch_sizes
            total = sum(float(error(batch)) * sizes[batch] for batch in every[trained:])
            return total / sum(sizes[trained:])

        schedule = Schedule(
            batches=trained, epochs=settings.block_epochs, rate=settings.block_rate,
            seed=settings.seed + index,
        )  # fmt: skip
        name = compressed.layout.blocks[index].name
        reached = descend(masters, dtypes, schedule, loss=loss, held_out=held_out, what=name)
        for batch in every:
            output = wide.run(index, batch, hidden[batch].float())
            reached_outputs.put(batch, output.to(hidden[batch].dtype))
    return RecoveredBlock(reached.values if reached.improved else {}, reached.losses)


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens of ||found - wanted||^2 / ||wanted||^2."""
    wanted = wanted.float()
    norms = wanted.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return ((found.float() - wanted).square().sum(-1) / norms).mean()


def _widened(replay: Replay, index: int) -> Replay:
    """With what block `index` is called with besides its hidden states in float32."""
    calls: dict[int, Any] = {}
    for batch in replay.calls:
        if id(batch) not in calls:
            call = batch[index]
            wide = replace(call, args=_wide(call.args), kwargs=_wide(call.kwargs))
            calls[id(batch)] = [*batch[:index], wide, *batch[index + 1 :]]
    return replace(replay, calls=tuple(calls[id(batch)] for batch in replay.calls))


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_wide(item) for item in value)
    if type(value) is dict:
        return {name: _wide(item) for name, item in value.items()}
    return value
