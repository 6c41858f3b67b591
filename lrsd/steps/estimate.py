"""Before any expensive work: what a compression will take, and whether it is there."""

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
from lrsd.settings import CompressionSettings, parse_size
from lrsd.steps.plan import compared_rows
from lrsd.steps.sensitivity import probe_rows
from lrsd.work.process import peak_rss
from lrsd.work.residency import Residence

# Square float64 matrices of a group's width held at once while its layers are solved: G, its parts, a
# factor and an inverse; and weights in float64 or twice in float32.
_SQUARES, _WEIGHTS = 5, 4
# The same for a group that is fitted behind the compressed prefix: moments and cross moments of two parts,
# their sums, G, damped, and its factor; own weights, targets and steps of all its layers together.
_PAIR_SQUARES, _PAIR_WEIGHTS = 9, 8
# Float32 copies of logits while two models' are compared: their log-probabilities, and what becomes of them.
_COPIES = 5
# Python objects of a layer's curve.
_CURVE = 150_000
# Streams of hidden states on disk at once: entering block 0, entering this block, leaving it; with
# propagation a dense and a compressed pair, and what the block's last layer closes with.
_STREAMS = {False: 3, True: 6}
# Time as multiples of one pass over the calibration text, for the survey and for the fit behind the prefix,
# and of one product W G of every layer in float64, for codes and at 16 bit. Fitted to SmolLM2-135M on two
# cores (`scripts/bench_peer_time.py`, `scripts/bench_time.py --bits 16`): a rough guess anywhere else.
_SURVEY_PASSES, _FIT_PASSES = 1.5, 3
_PRODUCTS = {True: 55, False: 120}
# Side of the matrices by which the machine's speed is taken.
_SIDE = 1024


@dataclass(frozen=True)
class Needs:
    """Bytes that a compression will hold in memory at its worst moment, and on disk at once."""

    memory: int
    disk: int


def predict(
    model: Model,
    layout: Layout,
    samples: Samples,
    settings: CompressionSettings,
    residence: Residence,
    budget: int,
) -> Needs:
    """What the survey and the fit will take.

    Memory: what is there at rest, weights, curves, and the largest working set, that of a block's replay
    and moments, of a layer's solver, or of a probe, which widens a block and what is in none to float32.
    Hidden states, moments and finished layers are on disk.
    """
    parameters = list(model.parameters())
    value = parameters[0].element_size()
    in_blocks = {p for block in layout.blocks for p in model.get_submodule(block.name).parameters()}
    outside = sum(4 * p.numel() for p in parameters if p not in in_blocks)
    replayed, vocabulary = samples[: settings.batch].positions, _vocabulary(model)
    working = [0]
    for block in layout.blocks:
        moments = sum(8 * group.in_features**2 for group in block.groups)
        working += [moments + size for size in _solving(block, replayed, value)]
        if settings.propagate is not False:
            working += [moments + size for size in _propagating(block)]
        widened = sum(4 * p.numel() for p in model.get_submodule(block.name).parameters())
        # Of the block as it is perturbed, and of one that runs behind it; torch's and the block's own.
        working.append(moments + outside + 3 * widened + _comparing(probe_rows(samples) * vocabulary))
    kept = sum(p.nbytes for p in parameters) - sum(spec.shape.dense_bytes for spec in layout.linears.values())
    if settings.allocates_by == "auto":
        logits = compared_rows(samples) * vocabulary
        working.append(value * logits + _comparing(logits))
    working.append(min(parse_size(settings.shard_size), kept + budget))
    memory = (
        residence.at_rest()
        + residence.weights((b.name for b in layout.blocks), budget)
        + _CURVE * len(layout.linears)
        + max(working)
    )
    propagate = settings.propagate is not False
    stored = sum(2 * group.in_features**2 for group in layout.groups)
    streams = _STREAMS[propagate] * layout.stream_width
    if propagate:
        streams += max(sum(group.in_features for group in block.groups) for block in layout.blocks)
    disk = stored + value * samples.positions * streams + 2 * budget + kept
    return Needs(max(memory, peak_rss()), disk)


def _solving(block: Block, replayed: int, value: int) -> Iterator[int]:
    """Working sets of a block's replay and of its layers' solvers, beside the block's moments."""
    widths = [group.in_features for group in block.groups]
    outputs = [spec.shape.out_features for group in block.groups for spec in group.linears]
    yield replayed * (value * (sum(widths) + sum(outputs)) + 4 * max(widths, default=0))
    for group in block.groups:
        layer = group.in_features * max(spec.shape.out_features for spec in group.linears)
        yield 8 * (_SQUARES * group.in_features**2 + _WEIGHTS * layer)


def _propagating(block: Block) -> Iterator[int]:
    """Working sets of the groups that are fitted behind the compressed prefix."""
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


def foretell(layout: Layout, per_batch: float, batches: int, settings: CompressionSettings) -> float:
    """Seconds that survey and fit will take, roughly. per_batch: those of one batch through all blocks."""
    left = torch.randn(_SIDE, _SIDE, dtype=torch.float64)
    start = time.perf_counter()
    left @ left
    per_product = (time.perf_counter() - start) / _SIDE**3
    products = sum(s.shape.out_features * s.shape.in_features**2 for s in layout.linears.values())
    coded = settings.entropy_coded or bool(settings.code_widths)
    propagates = settings.propagate or (settings.propagate is None and not coded)
    passes = _SURVEY_PASSES + _FIT_PASSES * propagates
    return passes * per_batch * batches + _PRODUCTS[coded] * products * per_product


def require(needs: Needs, directory: Path, limit: int | None) -> None:
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
