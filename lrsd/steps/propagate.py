"""Error-propagating calibration: hidden states of the dense model and of the compressed one, side by side."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import linear

from lrsd.model.layout import InputGroup
from lrsd.model.replay import Replay, Residual
from lrsd.model.slots import weight_slot
from lrsd.numerics.moments import CrossMoments, Moments, grain
from lrsd.numerics.solver import propagated_target
from lrsd.work.journal import Workspace
from lrsd.work.streams import Leading, Stream
from lrsd.work.world import World

# Samples whose errors are followed through the model: how inputs move there is added to the moments of all.
# Without rounding errors are large, and 64 instead of 16 take 8 % off SmolLM2-135M's KL at 1.25x.
_FOLLOWED = {True: 16, False: 64}
# One in so many of them chooses how far a target is followed.
_CHOOSING = 4

# Ridges of the targets that are tried, in units of the mean diagonal.
RIDGES = (1e-2, 1e-1, 1.0)
# Squared norm, in units of the mean, that every token is taken to have at least.
_LEAST_NORM = 1e-6

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
    def start(workspace: Workspace, replay: Replay, index: int, *, rounds: bool) -> "TwoStreams":
        """Before block `index`, which is still dense and is run once, as it is. rounds: see `followed`."""
        block = replay.layout.blocks[index]
        before: list[Stream] = [
            Leading(replay.inputs[block.stack], followed_batches(replay, rounds=rounds))
        ] * 2
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
        for batch in self._workspace.world.share(len(self.compressed)):
            y, x = self.last_outputs[batch], self.last_inputs[batch]
            # In float32: not every CPU has products for 16 bit.
            moved = y.float() + linear(x.float(), change_OI, shift_O).view_as(y)
            self.compressed_outputs.put(batch, moved.to(y.dtype))

    def finish(self) -> None:
        """The block is fitted, and the next one begins with `streams_after` it."""
        self._workspace.drop(*self._scratch)

    def used(self, stream: Stream) -> None:
        """What one group read in the dense model is not read again."""
        self._workspace.drop(stream)

    def _new(self, name: str) -> Stream:
        stream = self._workspace.new_stream(f"{self._step}-{name}")
        self._scratch.append(stream)
        return stream


def followed(*, rounds: bool) -> int:
    """Samples that are run through the compressed model, at least; rounds: whether that has integers."""
    return _FOLLOWED[rounds]


def followed_batches(replay: Replay, *, rounds: bool) -> int:
    """The leading batches that hold so many."""
    samples, least = list(accumulate(replay.batch_sizes)), followed(rounds=rounds)
    return 1 + next((i for i, count in enumerate(samples) if count >= least), len(samples) - 1)


def fit_step(index: int) -> str:
    """The name of a block's step in the journal."""
    return f"fit-{index:04d}"


def streams_after(index: int) -> tuple[str, str]:
    """Names of the streams that leave a block."""
    return _names(fit_step(index))


def _names(step: str) -> tuple[str, str]:
    return f"{step}-dense", f"{step}-compressed"


@dataclass
class Pair:
    """Moments of a group's inputs x~ in the compressed model, of the samples fitted to and of those held out.

    missing: E[t x~^T] with t = x - x~, x the input in the dense model; or, for a layer that writes the
    residual stream, what is missing in that stream while its weight is still dense. Of such a layer every
    token counts relative to the stream's squared norm, in `fit` and `held_out` too: what follows normalizes
    it, and a few are a thousand times the others. dense, compressed: of x and x~ of all of these samples,
    not so weighed, until `moments_` gives them up. ends: whether it is the block's output that this layer
    writes.
    """

    fit: Moments
    fit_missing: CrossMoments
    held_out: Moments
    held_out_missing: CrossMoments
    dense: Moments | None
    compressed: Moments | None
    writes_residual: bool
    ends: bool

    def missing(self, W_OI: Tensor, cross: CrossMoments) -> Tensor:
        """E[m x~^T], (O, I): m is what the output lacks with the dense weight on the compressed inputs."""
        return cross.mean if self.writes_residual else W_OI @ cross.mean

    def missing_mean(self, W_OI: Tensor, cross: CrossMoments) -> Tensor:
        return cross.target_mean if self.writes_residual else W_OI @ cross.target_mean

    def moments_(self, observed: Moments) -> Moments:
        """Of x~ on all samples. observed: of x. Once only: what they are made of takes gigabytes."""
        assert self.dense is not None
        assert self.compressed is not None
        moved = observed.moved(self.dense, self.compressed)
        self.dense = self.compressed = None
        return moved


def pair_moments(
    replay: Replay,
    index: int,
    group: InputGroup,
    streams: TwoStreams,
    tokens: Mapping[int, Tensor],
    owners: Collection[int],
) -> Pair:
    """Moments of one group's inputs in both models; of the group that writes the residual stream last also
    what `TwoStreams.move_on` needs.

    tokens: weights by batch, none: alike; owners: the processes that will make use of the moments: others
    have parts of them.
    """
    stream, dense_inputs = streams.compressed, streams.dense_inputs[group.name]
    residual = Residual.NOWHERE
    if len(group.linears) == 1:
        residual = replay.residual_of(index, group.name, stream[0])
    # What other groups add to the output is not known before they are fitted.
    ends = residual is Residual.AFTER and group is replay.layout.blocks[index].groups[-1]
    writes = ends or residual is Residual.AMID
    weight_OI = weight_slot(replay.model, group.name).read()
    rows = group.linears[0].shape.out_features if writes else group.in_features
    device = replay.solver_device(group.in_features)
    parts = [
        (Moments(group.in_features, device), CrossMoments(rows, group.in_features, device)) for _ in range(2)
    ]
    dense, alike = Moments(group.in_features, device), Moments(group.in_features, device)
    count = sum(replay.batch_sizes[: len(stream)])
    first_held_out = count - max(1, count // _CHOOSING)
    grains = _PairGrains(replay.world, rows, group.in_features, device)

    def observe(batch: int, hidden: Tensor, output: Tensor, inputs: dict[str, Tensor]) -> None:
        x, own = inputs[group.name], dense_inputs[batch]
        weights = tokens[batch].view(len(hidden), -1) if batch in tokens else None
        t, by_token = own.float() - x.float(), weights
        if writes:
            found = output if ends else hidden
            aim = (streams.dense_outputs if ends else streams.dense)[batch].float()
            added = 0.0 if ends else linear(t, weight_OI).view_as(found)
            t = aim - found.float() + added
            norms = aim.square().sum(-1).view(len(hidden), -1)
            level = norms.mean().clamp(min=torch.finfo(torch.float32).tiny)
            weights = 1 / (norms / level).clamp(min=_LEAST_NORM)
        if ends:
            streams.last_outputs.put(batch, output)
            streams.last_inputs.put(batch, x)
        grains.settle(own, x, t, weights)
        dense.update_(own, None if by_token is None else by_token.flatten(), grains.plain_I)
        if writes:
            alike.update_(x, None if by_token is None else by_token.flatten(), grains.plain_I)
        # Some families flatten (samples, tokens) before their linears.
        x, t = (z.reshape(len(hidden), -1, z.shape[-1]) for z in (x, t))
        seen = sum(replay.batch_sizes[:batch])
        cut = min(max(first_held_out - seen, 0), len(hidden))
        for (moments, cross), part in zip(parts, (slice(None, cut), slice(cut, None)), strict=True):
            if len(x[part]):
                weights_T = None if weights is None else weights[part].flatten()
                moments.update_(x[part], weights_T, grains.weighted_I)
                cross.update_(t[part], x[part], weights_T, (grains.target_O, grains.plain_I))

    replay.pass_(index, stream, observe=observe, until=None if ends else group.name)
    grains.settle(None, None, None, None)  # a process without a batch
    _add_up(replay.world, [dense, alike, *(part for both in parts for part in both)], owners)
    streams.used(dense_inputs)
    (fit, fit_cross), (rest, rest_cross) = parts
    return Pair(
        fit, fit_cross, rest, rest_cross, dense, alike if writes else fit + rest, writes, ends
    )  # fmt: skip


class _PairGrains:
    """By what the sums of a pair are rounded, see `numerics.moments.grain`: of x, of x with its tokens
    weighed, and of the target."""

    def __init__(self, world: World, rows: int, columns: int, device: torch.device) -> None:
        ones = partial(torch.ones, dtype=torch.float64, device=device)
        self.plain_I, self.weighted_I, self.target_O = ones(columns), ones(columns), ones(rows)
        self._world, self._settled = world, False

    def settle(self, own: Tensor | None, x: Tensor | None, t: Tensor | None, weights: Tensor | None) -> None:
        """Of this process's first batch; those of batch 0 count."""
        if self._settled:
            return
        self._settled = True
        if self._world.owns(0):
            assert own is not None
            assert x is not None
            assert t is not None
            x_TI, t_TO = x.reshape(-1, x.shape[-1]).float(), t.reshape(-1, t.shape[-1])
            weights_T1 = torch.ones_like(x_TI[:, :1]) if weights is None else weights.reshape(-1, 1).to(x_TI)
            self.plain_I.copy_(grain(own))
            self.weighted_I.copy_(grain(x_TI * weights_T1.sqrt()))
            self.target_O.copy_(grain(t_TO * weights_T1))
        self._world.tell_([self.plain_I, self.weighted_I, self.target_O], self._world.owner(0))


def _add_up(world: World, moments: Sequence[Moments | CrossMoments], owners: Collection[int]) -> None:
    """What all processes have found goes to those who need it."""
    for one in moments:
        *sums, counts = one.sums()
        for owner in owners if len(owners) == 1 else (None,):
            world.add_([*sums, counts], owner)
        one.restore_counts_(counts)


@dataclass(frozen=True)
class Way:
    """W*, at one ridge: by output channel the slope and the curvature of the held-out error from W to W*."""

    ridge: float
    slopes_O: Tensor
    curvatures_O: Tensor

    def best(self, rows: slice, importances_O: Tensor) -> tuple[float, float, float]:
        """What the best step takes from the error of these rows; how far it goes, 0 to 1; and the ridge."""
        slope, curvature = (
            float(found_O[rows].double() @ importances_O) for found_O in (self.slopes_O, self.curvatures_O)
        )
        length = min(max(slope / curvature, 0.0), 1.0) if curvature > 0 else 0.0
        return length * (2 * slope - length * curvature), length, self.ridge


def ways_of(pair: Pair, W_OI: Tensor) -> list[Way]:
    """One for each ridge that is tried, in float32: choosing needs no more. Raises: SolverError."""
    fit_II, held_out_II = pair.fit.gram.float(), pair.held_out.gram.float()
    fit_OI = pair.missing(W_OI, pair.fit_missing).float()
    held_out_OI = pair.missing(W_OI, pair.held_out_missing).float()
    ways = []
    for ridge in RIDGES:
        step_OI = propagated_target(torch.zeros_like(fit_OI), fit_II, fit_OI, damping=ridge)[0]
        curvatures_O = ((step_OI @ held_out_II) * step_OI).sum(1)
        ways.append(Way(ridge, (step_OI * held_out_OI).sum(1), curvatures_O))
    return ways
