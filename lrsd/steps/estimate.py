"""Estimates before any expensive work: memory, disk and time, and whether they are there."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lrsd.errors import InputError
from lrsd.model.layout import Block, Layout
from lrsd.model.samples import Samples
from lrsd.model.types import Model
from lrsd.numerics.divergence import DISTANCE_VALUES
from lrsd.recipe import Recipe
from lrsd.settings import parse_size
from lrsd.steps.plan import compared_rows, may_propagate, needs_sensitivity
from lrsd.steps.propagate import followed
from lrsd.steps.sensitivity import probe_rows
from lrsd.work.process import peak_rss
from lrsd.work.residency import Residence

# Square float64 matrices of a group's width held at once while its layers are solved: G, its parts, a
# factor and an inverse; and weights in float64 or twice in float32.
_SQUARES, _WEIGHTS = 5, 4
# The same for a group that is fitted on the compressed model's activations: moments and cross moments of two
# parts, those of all in both models, G as it moved, damped, and factors; own weights, targets and steps of
# all its layers together.
_PAIR_SQUARES, _PAIR_WEIGHTS = 15, 8
# Activations that a derivative keeps, as multiples of what goes into a block's layers and comes out of them.
_KEPT = 2
# Float32 copies of logits while two models' are compared: their log-probabilities, and what becomes of them.
_COPIES = 5
# Arrays and Python objects of a layer's menu: 387 offers of three numbers each.
_MENU = 20_000
# Streams of hidden states on disk at once: entering block 0, entering this block, leaving it; and of the
# samples that propagation follows a pair instead of one, and what the block's last layer adds to the stream.
_STREAMS, _PAIR_STREAMS = 3, 3
# Time as multiples of one pass over the calibration text, of the calibration pass and, over the samples that
# are followed, of a fit that propagates; and of one product W G of every layer in float64, with codes and at
# 16 bit, of each. Fitted to SmolLM2-135M on two cores (`scripts/bench_peer_time.py`,
# `scripts/bench_time.py --bits 16`): a rough guess anywhere else.
_OBSERVE_PASSES, _FIT_PASSES = 1.5, 3
_OBSERVE_PRODUCTS, _FIT_PRODUCTS = {True: 42, False: 48}, {True: 13, False: 72}
# Side of the matrices by which the machine's speed is taken.
_SIDE = 1024


@dataclass(frozen=True)
class ResourceEstimate:
    """Bytes that a compression will hold in memory at its worst moment, and on disk at once."""

    memory: int
    disk: int


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds of the calibration pass, of the fit, and of what propagation adds to it."""

    observe: float
    fit: float
    propagate: float

    def total(self, *, propagate: bool) -> float:
        return self.observe + self.fit + self.propagate * propagate

    def remaining(self, observed: float, *, propagate: bool) -> float:
        """The fit's, once the calibration pass is known to have taken `observed` seconds."""
        return (self.fit + self.propagate * propagate) * observed / self.observe


def estimate_resources(
    model: Model,
    layout: Layout,
    samples: Samples,
    recipe: Recipe,
    residence: Residence,
    budget: int,
) -> ResourceEstimate:
    """What the calibration pass and the fit will take.

    Memory: what is there at rest, weights, menus, and the largest working set, that of a block's replay
    and moments, of a layer's solver, or of a probe, which widens a block and what is in none to float32.
    Hidden states, moments and finished layers are on disk.
    """
    parameters = list(model.parameters())
    value = parameters[0].element_size()
    propagate = may_propagate(recipe)
    in_blocks = {p for block in layout.blocks for p in model.get_submodule(block.name).parameters()}
    outside = sum(4 * p.numel() for p in parameters if p not in in_blocks)
    replayed, vocabulary = samples[: recipe.calibration.batch].positions, _vocabulary(model)
    working = [0]
    for block in layout.blocks:
        moments = sum(8 * group.in_features**2 for group in block.groups)
        working += [moments + size for size in _solving(block, replayed, value)]
        if recipe.method.weighs_rows or recipe.method.weighs_tokens:
            working.append(moments + _differentiating(block, replayed))
        if propagate:
            working += [moments + size for size in _propagating(block)]
        if needs_sensitivity(recipe):
            widened = sum(4 * p.numel() for p in model.get_submodule(block.name).parameters())
            # Of the block as it is perturbed, and of one that runs after it; torch's and the block's own.
            working.append(moments + outside + 3 * widened + _comparing(probe_rows(samples) * vocabulary))
    kept = sum(p.nbytes for p in parameters) - sum(spec.shape.dense_bytes for spec in layout.linears.values())
    if recipe.method.allocation(recipe.budget.allocation) == "auto":
        logits = compared_rows(samples) * vocabulary
        working.append(value * logits + _comparing(logits))
    working.append(min(parse_size(recipe.run.shard_size), kept + budget))
    if recipe.run.format == "gguf":  # embedding and head, rounded beside the widened ones
        working.append(2 * outside + _comparing(probe_rows(samples) * vocabulary))
    weights = residence.weights((block.name for block in layout.blocks), budget)
    memory = residence.at_rest() + weights + _MENU * len(layout.linears) + max(working)
    stored = sum(2 * group.in_features**2 for group in layout.groups)
    hidden = samples.positions * _STREAMS * layout.stream_width
    if propagate:
        inputs = max(sum(group.in_features for group in block.groups) for block in layout.blocks)
        least = followed(rounds=recipe.method.rounds)
        positions = samples[: least + recipe.calibration.batch - 1].positions
        hidden += positions * (_PAIR_STREAMS * layout.stream_width + inputs)
    written = (
        2 if recipe.run.format == "compressed-tensors" else 1
    )  # another format is written from the first
    disk = stored + value * hidden + budget + written * (budget + kept)
    return ResourceEstimate(max(memory, peak_rss()), disk)


def _solving(block: Block, replayed: int, value: int) -> Iterator[int]:
    """Working sets of a block's replay and of its layers' solvers, on top of the block's moments."""
    widths = [group.in_features for group in block.groups]
    outputs = [spec.shape.out_features for group in block.groups for spec in group.linears]
    yield replayed * (value * (sum(widths) + sum(outputs)) + 4 * max(widths, default=0))
    for group in block.groups:
        layer = group.in_features * max(spec.shape.out_features for spec in group.linears)
        yield 8 * (_SQUARES * group.in_features**2 + _WEIGHTS * layer)


def _differentiating(block: Block, replayed: int) -> int:
    """What a block's derivative keeps of its pass, in float32 where products are widened: weights, and inputs
    and outputs of layers and of what is between them."""
    specs = [spec for group in block.groups for spec in group.linears]
    weights = sum(spec.shape.out_features * spec.shape.in_features for spec in specs)
    widths = sum(spec.shape.out_features + spec.shape.in_features for spec in specs)
    return 4 * (weights + _KEPT * replayed * widths)


def _propagating(block: Block) -> Iterator[int]:
    """Working sets of the groups that are fitted on the compressed model's activations."""
    for group in block.groups:
        rows = sum(spec.shape.out_features for spec in group.linears)
        squares, weights = _PAIR_SQUARES * group.in_features**2, _PAIR_WEIGHTS * rows * group.in_features
        yield 8 * (squares + weights)


def _comparing(logits: int) -> int:
    """Bytes while so many logits of one model are compared with another's."""
    return 4 * (2 * logits + _COPIES * min(logits, DISTANCE_VALUES))


def _vocabulary(model: Model) -> int:
    head = model.get_output_embeddings()
    return head.weight.shape[0] if head is not None else 0


def estimate_time(
    layout: Layout, per_batch: float, batches: int, propagated: int, *, rounds: bool
) -> TimeEstimate:
    """Roughly. per_batch: seconds of one batch through all blocks; propagated: batches that are followed;
    rounds: whether to integers."""
    left = torch.randn(_SIDE, _SIDE, dtype=torch.float64)
    start = time.perf_counter()
    left @ left
    per_product = (time.perf_counter() - start) / _SIDE**3
    products = per_product * sum(
        s.shape.out_features * s.shape.in_features**2 for s in layout.linears.values()
    )
    return TimeEstimate(
        _OBSERVE_PASSES * per_batch * batches + _OBSERVE_PRODUCTS[rounds] * products,
        _FIT_PRODUCTS[rounds] * products,
        _FIT_PASSES * per_batch * propagated,
    )


def check_resources(needs: ResourceEstimate, directory: Path, limit: int | None) -> None:
    """Raises: InputError if the disk or the memory that a compression needs is not there.

    Args: directory: where finished work goes; limit: bytes of memory allowed.
    """
    if limit is not None and needs.memory > limit:
        raise InputError(
            f"this needs about {needs.memory / 1e9:.2f} GB of memory, {limit / 1e9:.2f} GB are allowed; "
            "lower --batch, --seqlen or --shard-size, or allow more with --memory"
        )
    done = sum(path.stat().st_size for path in directory.rglob("*"))
    free = shutil.disk_usage(directory).free + done
    if needs.disk > free:
        raise InputError(
            f"this needs about {needs.disk / 1e9:.2f} GB of disk, {directory} has {free / 1e9:.2f} GB; "
            "choose an output directory on a larger disk, or lower --samples"
        )
