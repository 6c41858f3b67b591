"""Error-propagating calibration: hidden states of the dense model and of the compressed one, side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import linear

from lrsd.model.layout import InputGroup
from lrsd.model.load import exact_device
from lrsd.model.replay import Replay
from lrsd.numerics.moments import CrossMoments, Moments
from lrsd.steps.observe import fitted_samples
from lrsd.work.journal import Workspace
from lrsd.work.streams import Stream

_Affine = tuple[Tensor, Tensor | None]


class TwoStreams:
    """Inputs and outputs of one block, in the dense model and in the compressed one; and, for as long as the
    block is fitted, the dense inputs of its groups and what its last layer adds to the residual stream.
    """

    def __init__(self, workspace: Workspace, step: str, dense: Stream, compressed: Stream) -> None:
        self._workspace, self._step = workspace, step
        self.dense, self.compressed = dense, compressed
        self.dense_outputs, self.compressed_outputs = (workspace.new_stream(name) for name in _names(step))
        self._scratch: list[Stream] = []
        self.dense_inputs: dict[str, Stream] = {}
        self.last_outputs, self.last_inputs = self._new("last-outputs"), self._new("last-inputs")

    @staticmethod
    def start(workspace: Workspace, replay: Replay, index: int) -> "TwoStreams":
        """Before block `index`, which is still dense and is run once, as it is."""
        block = replay.layout.blocks[index]
        before = [replay.inputs[block.stack]] * 2
        if not block.is_first:
            before = [workspace.stream(name) for name in _names(fit_step(index - 1))]
        streams = TwoStreams(workspace, fit_step(index), *before)
        streams.dense_inputs = {
            g.name: streams._new(f"input-{g.name}") for g in block.groups if g.token_aligned
        }

        def observe(batch: int, hidden: Tensor, output: Tensor, inputs: dict[str, Tensor]) -> None:
            for name, stream in streams.dense_inputs.items():
                stream.put(batch, inputs[name])

        replay.pass_(index, streams.dense, streams.dense_outputs, observe)
        return streams

    def move_on(self, before: _Affine, after: _Affine) -> None:
        """The block's outputs once the layer that writes the residual stream, whose inputs are known, has
        changed from one weight (O, I) and bias (O,) to the other: no second run."""
        change_OI = after[0] - before[0]
        shift_O = None if after[1] is None else after[1] - (before[1] if before[1] is not None else 0.0)
        for batch, (y, x) in enumerate(zip(self.last_outputs, self.last_inputs, strict=True)):
            shift = None if shift_O is None else shift_O.to(x.dtype)
            moved = y + linear(x, change_OI.to(x.dtype), shift).view_as(y)
            self.compressed_outputs.put(batch, moved)

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
    """Moments of a group's inputs in the compressed model, of the samples fitted to and of those held out.

    cross: E[t x~^T] with t the dense model's input x of this group, or, for the layer that writes the
    residual stream last, what is missing in the block's output while its weight is still dense.
    """

    fit: Moments
    fit_cross: CrossMoments
    held_out: Moments
    held_out_cross: CrossMoments
    writes_residual: bool


def pair_moments(
    replay: Replay, index: int, group: InputGroup, streams: TwoStreams, tokens: Mapping[int, Tensor]
) -> Pair:
    """Moments of one group's inputs in both models; of the group that writes the residual stream last also
    what `TwoStreams.move_on` needs. tokens: weights by batch, none: alike."""
    stream, dense_inputs = streams.compressed, streams.dense_inputs[group.name]
    last = group is replay.layout.blocks[index].groups[-1] and len(group.linears) == 1
    writes = last and replay.writes_residual(index, group.name, stream[0])
    rows = group.linears[0].shape.out_features if writes else group.in_features
    device = exact_device(replay.model.device)
    parts = [
        (Moments(group.in_features, device), CrossMoments(rows, group.in_features, device)) for _ in range(2)
    ]
    first_held_out = fitted_samples(sum(replay.batch_sizes))

    def observe(batch: int, hidden: Tensor, output: Tensor, inputs: dict[str, Tensor]) -> None:
        x, t = inputs[group.name], dense_inputs[batch]
        if writes:
            streams.last_outputs.put(batch, output)
            streams.last_inputs.put(batch, x)
            t = streams.dense_outputs[batch].float() - output.float()
        # Some families flatten (samples, tokens) before their linears.
        x, t = (z.reshape(len(hidden), -1, z.shape[-1]) for z in (x, t))
        seen = sum(replay.batch_sizes[:batch])
        cut = min(max(first_held_out - seen, 0), len(hidden))
        weights = tokens[batch].view(len(hidden), -1) if batch in tokens else None
        for (moments, cross), part in zip(parts, (slice(None, cut), slice(cut, None)), strict=True):
            if len(x[part]):
                weights_T = None if weights is None else weights[part].flatten()
                moments.update_(x[part], weights_T)
                cross.update_(t[part], x[part], weights_T)

    replay.pass_(index, stream, observe=observe, until=None if writes else group.name)
    dense_inputs.drop()
    (fit, fit_cross), (rest, rest_cross) = parts
    return Pair(fit, fit_cross, rest, rest_cross, writes)
