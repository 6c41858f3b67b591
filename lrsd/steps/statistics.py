"""What a block's layers read, and what their outputs do: sums over the calibration text."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lrsd.model.derivatives import with_derivatives
from lrsd.model.layout import Block, InputGroup
from lrsd.model.replay import Replay
from lrsd.numerics.moments import Moments, grain, power_of_two, rounded
from lrsd.numerics.weights import row_exponents, token_weights
from lrsd.work.streams import Stream
from lrsd.work.world import World

# Samples whose derivatives weigh the output channels: means over thousands of tokens.
_DERIVED = 8


@dataclass(frozen=True)
class GroupStatistics:
    """Moments of a group's inputs, each token weighed by `tokens`; by number of batch, none: alike.

    rows: sums of squared derivatives by output channel, by layer; none: channels count alike. reached: tokens
    that came here, where the moments are made up to more.
    """

    moments: Moments
    rows: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[int, Tensor] = field(default_factory=dict)
    reached: int | None = None

    def __add__(self, other: "GroupStatistics") -> "GroupStatistics":
        rows = dict(self.rows)
        for name, sums_O in other.rows.items():
            rows[name] = rows[name] + sums_O if name in rows else sums_O
        return GroupStatistics(self.moments + other.moments, rows, self.tokens | other.tokens)

    @property
    def count(self) -> int:
        """Tokens that came here."""
        return self.moments.count if self.reached is None else self.reached

    def exponents(self, layer: str) -> Tensor | None:
        """Row exponents of one layer of the group, see `numerics.weights`."""
        return row_exponents(self.rows[layer]) if layer in self.rows else None


@dataclass(frozen=True)
class BlockStatistics:
    """`GroupStatistics` by group, moments as `Moments.state`, tokens' weights by batch: a record of its own,
    read when the block is fitted."""

    moments: dict[str, dict[str, Tensor]]
    rows: dict[str, dict[str, Tensor]]
    tokens: dict[str, dict[str, Tensor]]
    reached: dict[str, int | None]

    @staticmethod
    def of(groups: Mapping[str, GroupStatistics]) -> "BlockStatistics":
        return BlockStatistics(
            {name: group.moments.state() for name, group in groups.items()},
            {name: group.rows for name, group in groups.items()},
            {name: {str(n): t for n, t in group.tokens.items()} for name, group in groups.items()},
            {name: group.reached for name, group in groups.items()},
        )

    def group(self, name: str, device: torch.device | str) -> GroupStatistics:
        rows = {layer: sums_O.to(device) for layer, sums_O in self.rows[name].items()}
        tokens = {int(number): weights_T.to(device) for number, weights_T in self.tokens[name].items()}
        moments = Moments.from_state(self.moments[name], device)
        return GroupStatistics(moments, rows, tokens, self.reached[name])


def observe_step(index: int) -> str:
    """The name of a block's step in the journal, and of the stream of its outputs."""
    return f"observe-{index:04d}"


def statistics_of(index: int) -> str:
    """The name of the record of a block's statistics."""
    return f"{observe_step(index)}.moments"


class StoredStatistics(Mapping[str, GroupStatistics]):
    """Statistics of every input group, read from the finished steps when asked for: about two bytes per entry
    of G, of all layers of a large model, do not fit in memory beside it."""

    def __init__(self, read: Callable[[str, type[BlockStatistics]], BlockStatistics], replay: Replay) -> None:
        """read: the record of a name."""
        self._read = read
        self._devices = {g.name: replay.solver_device(g.in_features) for g in replay.layout.groups}
        blocks = enumerate(replay.layout.blocks)
        self._records = {
            group.name: statistics_of(index) for index, block in blocks for group in block.groups
        }
        self._last: tuple[str, BlockStatistics | None] = "", None

    def __getitem__(self, group: str) -> GroupStatistics:
        record = self._records[group]
        block = self._last[1]
        if (
            block is None or self._last[0] != record
        ):  # a block's groups follow each other, and share its record
            block = self._read(record, BlockStatistics)
            self._last = record, block
        return block.group(group, self._devices[group])

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)


@dataclass
class Weights:
    """Which weights are asked for. missing: why there are none of a block, once it has been run."""

    rows: bool = False
    tokens: bool = False
    missing: str = ""


def block_statistics(
    replay: Replay, index: int, before: Stream, outputs: Stream, weights: Weights
) -> dict[str, GroupStatistics]:
    """Statistics of every input group of one block, over the batches of all processes, for the block's owner:
    the others have parts of them. The block's outputs go into `outputs`.

    weights: are noted as missing where the block cannot be differentiated.
    """
    block, world = replay.layout.blocks[index], replay.world
    devices = {g.name: replay.solver_device(g.in_features) for g in block.groups}
    found = {g.name: GroupStatistics(Moments(g.in_features, devices[g.name])) for g in block.groups}
    if weights.rows:
        for group in block.groups:
            for spec in group.linears:
                found[group.name].rows[spec.name] = torch.zeros(
                    spec.shape.out_features, dtype=torch.float64, device=devices[group.name]
                )
    grains = _Grains(block, world, devices)
    squares: dict[str, Tensor] = {}

    def run(index: int, batch: int, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        squares.clear()
        wanted = weights.tokens or (weights.rows and sum(replay.batch_sizes[:batch]) < _DERIVED)
        if wanted and not weights.missing:
            try:
                output, inputs, derivatives = with_derivatives(replay, index, batch, hidden)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # of whatever in a model has no derivative
                if any(group.tokens or any(map(torch.any, group.rows.values())) for group in found.values()):
                    raise  # nothing is weighed by halves
                weights.missing = f"it cannot be differentiated: {str(error).splitlines()[0]:.200}"
            else:
                squares.update(derivatives)
                return output, inputs
        return replay.run_with_inputs(index, batch, hidden)

    def observe(batch: int, hidden: Tensor, output: Tensor, inputs: dict[str, Tensor]) -> None:
        grains.settle(inputs, squares)
        for group in block.groups:
            if group.name not in inputs:
                continue
            statistics, weights_T = found[group.name], None
            for spec in group.linears:
                if weights.rows and spec.name in squares and squares[spec.name].isfinite().all():
                    sums_O = squares[spec.name].sum(0, dtype=torch.float32)
                    statistics.rows[spec.name] += rounded(sums_O, grains.rows).to(devices[group.name])
            if weights.tokens and group.name in squares:
                weights_T = token_weights(squares[group.name])
                if group.token_aligned:
                    statistics.tokens[batch] = weights_T
            statistics.moments.update_(inputs[group.name], weights_T, grains.of(group))

    replay.pass_(index, before, outputs, observe, run=run)
    grains.settle({}, {})  # a process without a batch
    _add_up(replay, index, found, len(before))
    weights.missing = world.tell(weights.missing)
    derived = {name: {k: d for k, d in group.rows.items() if d.any()} for name, group in found.items()}
    return {name: replace(group, rows=derived[name]) for name, group in found.items()}


class _Grains:
    """By what a block's sums are rounded: known to all processes once the first batch has run, see
    `numerics.moments.grain`. Experts that see the same tokens have the same."""

    def __init__(self, block: Block, world: World, devices: Mapping[str, torch.device]) -> None:
        self._block, self._world, self._settled = block, world, False
        self._grains = {
            self._key(group): torch.ones(group.in_features, dtype=torch.float64, device=devices[group.name])
            for group in block.groups
        }
        # Of two devices the accelerator.
        device = max(devices.values(), key=lambda device: device.type != "cpu", default=torch.device("cpu"))
        self.rows = torch.ones(1, dtype=torch.float64, device=device)

    def settle(self, inputs: Mapping[str, Tensor], squares: Mapping[str, Tensor]) -> None:
        """inputs, squares: of this process's first batch; those of batch 0 count."""
        if self._settled:
            return
        self._settled = True
        if self._world.owns(0):
            for key, grain_I in self._grains.items():
                seen = [
                    inputs[g.name] for g in self._block.groups if self._key(g) == key and g.name in inputs
                ]
                if seen:
                    grain_I.copy_(grain(torch.cat([x.reshape(-1, len(grain_I)) for x in seen])))
            largest = [s.sum(0).amax() for s in squares.values() if s.isfinite().all()]
            if largest:
                self.rows.copy_(power_of_two(torch.stack(largest).amax()))
        self._world.tell_([*self._grains.values(), self.rows], self._world.owner(0))

    def of(self, group: InputGroup) -> Tensor:
        return self._grains[self._key(group)]

    def _key(self, group: InputGroup) -> str:
        return group.routed or group.name


def _add_up(replay: Replay, index: int, found: Mapping[str, GroupStatistics], batches: int) -> None:
    """What all processes have found of a block goes to its owner; weights of tokens, to all."""
    world = replay.world
    weighed = world.tell("\n".join(name for name, group in found.items() if group.tokens)).splitlines()
    for name, group in found.items():
        *sums, counts = group.moments.sums()
        world.add_([*sums, counts, *group.rows.values()], world.owner(index))
        group.moments.restore_counts_(counts)
        for batch in range(batches) if name in weighed else ():
            group.tokens[batch] = world.told(group.tokens.get(batch), world.owner(batch))


def share_among_experts(
    block: Block, statistics: Mapping[str, GroupStatistics]
) -> dict[str, GroupStatistics]:
    """Statistics of a block, those of experts that saw fewer tokens than they have inputs made up to that
    number with the mean of all experts of the block: alone they would be singular, or nothing at all.
    """
    pools: dict[str, Moments] = {}
    for group in block.groups:
        if group.routed:
            own = statistics[group.name].moments
            pools[group.routed] = pools[group.routed] + own if group.routed in pools else own
    shared = {group.name: statistics[group.name] for group in block.groups}
    for group in block.groups:
        own = statistics[group.name].moments
        missing = group.in_features - own.count
        if group.routed and missing > 0:
            moments = own + pools[group.routed].scaled(missing)
            shared[group.name] = replace(statistics[group.name], moments=moments, reached=own.count)
    return shared
