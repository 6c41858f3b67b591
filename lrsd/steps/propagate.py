"""The compressed prefix: hidden states of the dense model and of the compressed one, side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import linear

from lrsd.model.layout import InputGroup
from lrsd.model.load import exact_device
from lrsd.model.replay import Replay
from lrsd.numerics.moments import CrossMoments, Moments
from lrsd.steps.observe import HELD_OUT
from lrsd.work.journal import Workspace
from lrsd.work.streams import Stream

_Affine = tuple[Tensor, Tensor | None]


class TwoStreams:
    """Hidden states before and behind one block, in the dense model and behind the compressed prefix; and,
    for as long as the block is fitted, the dense inputs of its groups and what its last layer closes with.
    """

    def __init__(self, workspace: Workspace, step: str, dense: Stream, compressed: Stream) -> None:
        self._workspace, self._step = workspace, step
        self.dense, self.compressed = dense, compressed
        self.dense_behind, self.compressed_behind = (workspace.new_stream(name) for name in _names(step))
        self._scratch: list[Stream] = []
        self.dense_inputs: dict[str, Stream] = {}
        self.closing = self._new("closing-outputs"), self._new("closing-inputs")

    @staticmethod
    def start(workspace: Workspace, replay: Replay, index: int) -> "TwoStreams":
        """Before block `index`, which is still dense and is run once, as it is."""
        block = replay.layout.blocks[index]
        before = [replay.entering[block.stack]] * 2
        if not block.leads:
            before = [workspace.stream(name) for name in _names(fit_step(index - 1))]
        streams = TwoStreams(workspace, fit_step(index), *before)
        streams.dense_inputs = {g.name: streams._new(f"input-{g.name}") for g in block.groups if g.aligned}
        for batch, hidden in enumerate(streams.dense):
            output, seen = replay.run_with_inputs(index, batch, hidden)
            for name, stream in streams.dense_inputs.items():
                stream.append(seen[name])
            streams.dense_behind.append(output)
        return streams

    def move_on(self, before: _Affine, after: _Affine) -> None:
        """The block's outputs once its closing layer, whose inputs are known, has changed from one weight
        (O, I) and bias (O,) to the other: no second run."""
        change_OI = after[0] - before[0]
        shift_O = None if after[1] is None else after[1] - (before[1] if before[1] is not None else 0.0)
        for y, x in zip(*self.closing, strict=True):
            shift = None if shift_O is None else shift_O.to(x.dtype)
            self.compressed_behind.append(y + linear(x, change_OI.to(x.dtype), shift).view_as(y))

    def finish(self) -> Sequence[str]:
        """The block is fitted. Returns: names of the streams that the next one begins with."""
        for stream in self._scratch:
            stream.drop()
        return _names(self._step)

    def _new(self, name: str) -> Stream:
        stream = self._workspace.new_stream(f"{self._step}-{name}")
        self._scratch.append(stream)
        return stream


def fit_step(index: int) -> str:
    """The name of a block's step in the journal."""
    return f"fit-{index:04d}"


def _names(step: str) -> tuple[str, str]:
    return f"{step}-dense", f"{step}-compressed"


@dataclass(frozen=True)
class Pair:
    """Moments behind the compressed prefix, of the samples fitted to and of those held out.

    cross: E[t x~^T] with t the dense model's input x of this group, or, for the layer that closes
    the block, the residual that is missing in the block's output while its weight is still dense.
    """

    fit: Moments
    fit_cross: CrossMoments
    held_out: Moments
    held_out_cross: CrossMoments
    closes: bool


def pair_moments(replay: Replay, index: int, group: InputGroup, streams: TwoStreams) -> Pair:
    """Moments of one group's inputs in both models; of the group that closes the block also what
    `TwoStreams.move_on` needs."""
    stream, dense_inputs = streams.compressed, streams.dense_inputs[group.name]
    last = group is replay.layout.blocks[index].groups[-1] and len(group.linears) == 1
    closes = last and replay.adds_to_output(index, group.name, stream[0])
    rows = group.linears[0].shape.out_features if closes else group.in_features
    device = exact_device(replay.model.device)
    parts = [
        (Moments(group.in_features, device), CrossMoments(rows, group.in_features, device)) for _ in range(2)
    ]
    samples = sum(replay.batch_sizes)
    first_held_out = samples - max(1, samples // HELD_OUT)
    seen = 0
    both = zip(stream, dense_inputs, streams.dense_behind, strict=True)
    for batch, (hidden, dense_x, dense_y) in enumerate(both):
        if closes:
            y, inputs = replay.run_with_inputs(index, batch, hidden)
            x, t = inputs[group.name], dense_y.float() - y.float()
            for kept, value in zip(streams.closing, (y, x), strict=True):
                kept.append(value)
        else:
            x, t = replay.input_of(index, group.name, batch, hidden), dense_x
        # Some families flatten (samples, tokens) before their linears.
        x, t = (z.reshape(len(hidden), -1, z.shape[-1]) for z in (x, t))
        cut = min(max(first_held_out - seen, 0), len(hidden))
        for (moments, cross), part in zip(parts, (slice(None, cut), slice(cut, None)), strict=True):
            if len(x[part]):
                moments.update_(x[part])
                cross.update_(t[part], x[part])
        seen += len(hidden)
    dense_inputs.drop()
    (fit, fit_cross), (rest, rest_cross) = parts
    return Pair(fit, fit_cross, rest, rest_cross, closes)
