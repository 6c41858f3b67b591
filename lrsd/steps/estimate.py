"""Estimates before any expensive work: memory, disk and time, and whether they are there."""

import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from lrsd.errors import InputError
from lrsd.forms.trellis import Trellis
from lrsd.model.layout import Block, InputGroup, Layout
from lrsd.model.load import exact_device
from lrsd.model.samples import Samples
from lrsd.model.types import Model
from lrsd.numerics.divergence import DISTANCE_VALUES
from lrsd.numerics.metric import Metric
from lrsd.numerics.rounding import round_entropy_coded
from lrsd.recipe import Recipe
from lrsd.settings import parse_size
from lrsd.steps.plan import compared_rows, compared_samples, may_compare, may_propagate, needs_sensitivity
from lrsd.steps.propagate import followed
from lrsd.steps.sensitivity import probe_rows, probe_samples
from lrsd.work.process import peak_rss
from lrsd.work.residency import Residence

# Square float64 matrices of a group's width held at once while its layers are solved: G, its parts, a
# factor and an inverse; and weights in float64 or twice in float32.
_SQUARES, _WEIGHTS = 5, 4
# The same for a group that is fitted on the compressed model's activations, its own moments among them:
# moments and cross moments of two parts, those of all in both models, then factors of these and G as it
# moves; own weights, targets and steps of all its layers together.
_PAIR_SQUARES, _PAIR_WEIGHTS = 11, 8
# Of an accelerator's run, on the host: float32 halves of a block's squares on their way to disk, and of a
# layer that is rounded there, float32 weights, codes and what becomes of them, and a factor.
_STORED_SQUARES, _ROUNDED_WEIGHTS, _ROUNDED_SQUARES = 2, 16, 4
# Activations that a derivative keeps, as multiples of what goes into a block's layers and comes out of them.
_KEPT = 2
# Float32 copies of logits while two models' are compared: their log-probabilities, and what becomes of them.
_COPIES = 5
# Arrays and Python objects of a layer's menu: 387 offers of three numbers each.
_MENU = 20_000
# Streams of hidden states on disk at once: entering block 0, entering this block, leaving it; and of the
# samples that propagation follows a pair instead of one, and what the block's last layer adds to the stream.
_STREAMS, _PAIR_STREAMS = 3, 3
# Passes over the calibration text of the calibration pass and, over the samples that are followed, of a fit
# that propagates: dense, up to each group, and compressed.
_OBSERVE_PASSES, _FIT_PASSES = 1, 3
# Moments of a group's inputs that propagation takes, as multiples of those of the calibration pass: of both
# models, and across, of which there is no half to leave out.
_PAIR_MOMENTS = 3.7
# Of the products that a square of moments takes, those that its upper triangle does.
_TRIANGLE = 5 / 8
# Multiply-adds in float64 and in float32, as multiples of one product W G of every layer, of the calibration
# pass, of the fit and of what propagation adds to it, with codes and at 16 bit; of a comparison of plans.
# Counted by a dispatch mode on a Llama of 4 blocks of 576 x 1536, factorizations and eigenvalues as
# n^3 / 6 and 4.5 n^3.
_OBSERVE_PRODUCTS = {True: (1.0, 12.5), False: (8.0, 13.5)}
_FIT_PRODUCTS = {True: (3.0, 2.5), False: (7.0, 2.2)}
_PAIR_PRODUCTS = {True: (3.5, 8.2), False: (2.5, 7.6)}
_COMPARE_PRODUCTS = (0.0, 17.5)
# Time of what is solved over that of its multiply-adds in products: factorizations, eigenvalues and whatever
# goes over a matrix once are slower. Measured there, on one thread; a rough guess anywhere else.
_SLOWER = 2.6
# How often every weight is rounded to entropy-coded columns meanwhile, counted there too.
_OBSERVE_ROUNDED, _FIT_ROUNDED, _PAIR_ROUNDED = 4.0, 1.0, 0.2
# Side of the matrices by which the speed of a CPU is taken, and of an accelerator, which a smaller one would
# not fill; the layer by which that of rounding is.
_SIDES, _ROUNDED_SHAPE = {True: 1024, False: 4096}, (512, 512)
# Bytes by which the speed of copies is: the weight of a layer.
_COPIED = 2**26


@dataclass(frozen=True)
class ResourceEstimate:
    """Bytes that a compression will hold in the host's memory at its worst moment, on disk at once, and on an
    accelerator: 0 without one. working: of the accelerator's those that are not for weights; widest: inputs
    of the layers that are solved there, where wider ones do not fit."""

    memory: int
    disk: int
    device: int = 0
    working: int = 0
    widest: int | None = None


@dataclass(frozen=True)
class Operations:
    """What something comes to. passes: over the calibration text, through all blocks; double, single:
    multiply-adds in float64 and float32; rounded: weights to entropy-coded columns; copied: bytes of weights
    that are brought to an accelerator, those of the passes left out; hosted: multiply-adds on the host, of
    layers that are too wide for it."""

    passes: float = 0.0
    double: float = 0.0
    single: float = 0.0
    rounded: float = 0.0
    copied: float = 0.0
    hosted: float = 0.0

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Speed:
    """Seconds per multiply-add in float64 and float32, per weight that is rounded, where each is done; and
    per byte that is brought there, and per multiply-add on the host."""

    double: float
    single: float
    rounded: float
    copied: float = 0.0
    hosted: float = 0.0

    @staticmethod
    def measured(device: torch.device, *, rounds: bool) -> "Speed":
        """device: where the model runs; rounds: whether to entropy-coded columns, whose loops are compiled
        then."""
        solver = exact_device(device)
        return Speed(
            per_product(torch.float64, solver), per_product(torch.float32, device),
            _per_rounded(solver) if rounds else 0.0, _per_copied(device),
            per_product(torch.float64, torch.device("cpu")),
        )  # fmt: skip

    def seconds(self, work: Operations, per_pass: float) -> float:
        """per_pass: of one pass."""
        products = work.double * self.double + work.single * self.single + work.hosted * self.hosted
        others = work.rounded * self.rounded + work.copied * self.copied
        return work.passes * per_pass + _SLOWER * products + others


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds of the calibration pass, of the fit, and of what propagation adds to it; of one process.

    processes: that share the calibration pass, and a fit that does not propagate. Of one that does they share
    hardly more than the passes, which is not counted on.
    """

    observe: float
    fit: float
    propagate: float
    processes: int = 1

    def total(self, *, propagate: bool) -> float:
        return self.observe / self.processes + self._rest(propagate)

    def remaining(self, observed: float, *, propagate: bool) -> float:
        """The fit's, once the calibration pass is known to have taken `observed` seconds."""
        return self._rest(propagate) * observed / (self.observe / self.processes)

    def _rest(self, propagate: bool) -> float:
        return self.fit + self.propagate if propagate else self.fit / self.processes


@dataclass(frozen=True)
class _Working:
    """Bytes of one moment's working set: on the device that the model runs on, and on the host besides; where
    these are the same, the larger of the two."""

    device: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        return max(self.device, self.host)


def estimate_resources(
    model: Model,
    layout: Layout,
    samples: Samples,
    recipe: Recipe,
    residence: Residence,
    budget: int,
    processes: int = 1,
) -> ResourceEstimate:
    """What the calibration pass and the fit will take, of the disk by all processes, of memory by each.

    Memory: what is there at rest, weights, menus, and the largest working set, that of a block's replay
    and moments, of a layer's solver, or of a probe, which widens a block and what is in none to float32. With
    an accelerator: the largest block, what is in none, and the largest working set there; where that is more
    than it has, the squares of the widest layers are on the host.
    Hidden states, moments and finished layers are on disk.
    """
    parameters = list(model.parameters())
    value = parameters[0].element_size()
    kept = sum(p.nbytes for p in parameters) - sum(spec.shape.dense_bytes for spec in layout.linears.values())
    onloading = residence.onloading
    weights = residence.weights((block.name for block in layout.blocks), budget)
    memory = residence.at_rest() + weights + _MENU * len(layout.linears)
    disk = _disk(model, layout, samples, recipe, value, budget, kept, processes)
    if onloading is None:
        sets = list(_working_sets(model, layout, samples, recipe, kept + budget, processes=processes))
        alone = max(w.total for w in sets)
        return ResourceEstimate(max(memory + alone, peak_rss()), disk)
    widths = sorted({group.in_features for group in layout.groups}, reverse=True)
    if exact_device(onloading.device) != onloading.device:
        widths = [0]
    for widest in (*widths, 0):
        sets = list(_working_sets(model, layout, samples, recipe, kept + budget, widest, processes))
        working = max(w.device for w in sets)
        if onloading.limit is None or onloading.least + working <= onloading.limit:
            break
    memory = max(memory + max(w.host for w in sets), peak_rss())
    told = None if widest == widths[0] else widest
    return ResourceEstimate(memory, disk, onloading.least + working, working, told)


def _disk(
    model: Model,
    layout: Layout,
    samples: Samples,
    recipe: Recipe,
    value: int,
    budget: int,
    kept: int,
    processes: int,
) -> int:
    """The larger of what plans are compared with, dense approximations and logits, and of what is fitted and
    written. kept: bytes of weights that are not compressed."""
    stored = sum(2 * group.in_features**2 for group in layout.groups)
    # Of as many blocks as there are processes to observe them.
    hidden = samples.positions * (_STREAMS + processes - 1) * layout.stream_width
    compared = 0
    if may_compare(recipe):
        weights = sum(spec.shape.dense_bytes // 2 for spec in layout.linears.values())
        compared = value * weights + 4 * compared_samples(samples) * compared_rows(samples) * _vocabulary(
            model
        )
    paired = 0
    if may_propagate(recipe):
        inputs = max(sum(group.in_features for group in block.groups) for block in layout.blocks)
        least = followed(rounds=recipe.method.rounds)
        positions = samples[: least + recipe.calibration.batch - 1].positions
        paired = positions * (_PAIR_STREAMS * layout.stream_width + inputs)
    written = (
        2 if recipe.run.format == "compressed-tensors" else 1
    )  # another format is written from the first
    fitted = value * paired + budget + written * (budget + kept)
    return stored + value * hidden + max(compared, fitted)


def _working_sets(
    model: Model,
    layout: Layout,
    samples: Samples,
    recipe: Recipe,
    stored: int,
    widest: float = math.inf,
    processes: int = 1,
) -> Iterator[_Working]:
    """stored: bytes of the result; widest: inputs of the layers that are solved where the model runs."""
    parameters = list(model.parameters())
    value = parameters[0].element_size()
    in_blocks = {p for block in layout.blocks for p in model.get_submodule(block.name).parameters()}
    outside = sum(4 * p.numel() for p in parameters if p not in in_blocks)
    replayed, vocabulary = samples[: recipe.calibration.batch].positions, _vocabulary(model)
    probed, reach = _comparing(probe_rows(samples) * vocabulary), _Reach(model, layout)
    for block in layout.blocks:
        here = [group for group in block.groups if group.in_features <= widest]
        moments = sum(8 * group.in_features**2 for group in here)
        saved = sum(_STORED_SQUARES * group.in_features**2 for group in block.groups)
        elsewhere = sum(8 * group.in_features**2 for group in block.groups) - moments
        # Of several processes each has the block that it owns to wait for, beside the one that is run.
        waiting = min(processes, 2)
        replaying = waiting * moments + _replaying(block, replayed, value, reach)
        yield _Working(replaying, waiting * elsewhere + saved)
        for group in block.groups:
            square = group.in_features**2
            layer = group.in_features * max(spec.shape.out_features for spec in group.linears)
            solving = 8 * (_SQUARES * square + _WEIGHTS * layer)
            if group in here:
                rounding = _ROUNDED_SQUARES * square + _ROUNDED_WEIGHTS * layer
                yield _Working(moments + solving, elsewhere + rounding)
            else:
                yield _Working(moments, elsewhere + solving)
            if may_propagate(recipe):
                rows = sum(spec.shape.out_features for spec in group.linears)
                pair = 8 * (_PAIR_SQUARES * square + _PAIR_WEIGHTS * rows * group.in_features)
                yield _Working(pair) if group in here else _Working(host=pair)
        if recipe.method.weighs_rows or recipe.method.weighs_tokens:
            yield _Working(waiting * moments + _differentiating(block, replayed, reach), waiting * elsewhere)
        if needs_sensitivity(recipe):
            widened = sum(4 * p.numel() for p in model.get_submodule(block.name).parameters())
            # Of the block as it is perturbed, and of one that runs after it; torch's and the block's own.
            yield _Working(moments + outside + 3 * widened + probed, elsewhere)
    if may_compare(recipe):
        logits = compared_rows(samples) * vocabulary
        yield _Working(value * logits + _comparing(logits))
    yield _Working(host=min(parse_size(recipe.run.shard_size), stored))
    if recipe.run.format == "gguf":  # embedding and head, rounded beside the widened ones
        yield _Working(2 * outside + probed, 2 * outside)


def _replaying(block: Block, replayed: int, value: int, reach: "_Reach") -> int:
    """What goes into a block's layers and comes out of them, and one of them widened."""
    widest = max((group.in_features for group in block.groups), default=0)
    return value * _values(block, replayed, reach) + 4 * replayed * widest


def _differentiating(block: Block, replayed: int, reach: "_Reach") -> int:
    """What a block's derivative keeps of its pass, in float32 where products are widened: weights, and inputs
    and outputs of layers and of what is between them."""
    specs = [spec for group in block.groups for spec in group.linears]
    weights = sum(spec.shape.out_features * spec.shape.in_features for spec in specs)
    return 4 * (weights + _KEPT * _values(block, replayed, reach))


def _values(block: Block, replayed: int, reach: "_Reach") -> int:
    """Inputs and outputs of all layers of a block, an expert's of those tokens only that reach it."""
    counts = (
        reach(g, replayed) * (len(g.linears) * g.in_features + sum(s.shape.out_features for s in g.linears))
        for g in block.groups
    )
    return int(sum(counts))


def _comparing(logits: int) -> int:
    """Bytes while so many logits of one model are compared with another's."""
    return 4 * (2 * logits + _COPIES * min(logits, DISTANCE_VALUES))


def _vocabulary(model: Model) -> int:
    head = model.get_output_embeddings()
    return head.weight.shape[0] if head is not None else 0


@dataclass(frozen=True)
class Division:
    """What of the work is not done on an accelerator with all that it takes at hand. brought: share of the
    weights that there is no room for, and that every pass brings; widest: as in `ResourceEstimate`."""

    brought: float = 0.0
    widest: int | None = None

    @staticmethod
    def of(model: Model, needs: ResourceEstimate, limit: int | None) -> "Division":
        """limit: bytes of an accelerator allowed."""
        total = sum(parameter.nbytes for parameter in model.parameters())
        room = total if limit is None or not needs.device else limit - needs.working
        return Division(max(0.0, 1 - room / total), needs.widest)


def count_observing(
    model: Model, layout: Layout, samples: Samples, recipe: Recipe, division: Division
) -> Operations:
    """Of the calibration pass: derivatives, moments, menus and probes."""
    found = _solving(layout, _OBSERVE_PRODUCTS[recipe.method.rounds], division)
    # Back through every block too, where tokens are weighed.
    passes = _OBSERVE_PASSES + 2 * recipe.method.weighs_tokens
    single, copied = _of_moments(model, layout, samples.positions), 0.0
    if needs_sensitivity(recipe):
        # A probe of a block runs all that follow it, and the head.
        probed = probe_samples(samples).positions
        blocks = [_of_pass(model, [block], probed) for block in layout.blocks]
        single += sum(number * block for number, block in enumerate(blocks, 1))
        single += len(blocks) * probe_rows(samples) * _vocabulary(model) * layout.stream_width
        sizes = (sum(p.nbytes for p in model.get_submodule(b.name).parameters()) for b in layout.blocks)
        copied = division.brought * sum(number * size for number, size in enumerate(sizes, 1))
    rounded = _OBSERVE_ROUNDED * _rounded(layout, recipe)
    return found + Operations(passes, single=single, rounded=rounded, copied=copied)


def count_fitting(layout: Layout, recipe: Recipe, division: Division) -> Operations:
    """Of the fit without propagation, and of the comparison of plans, where it is likely."""
    found = _solving(layout, _FIT_PRODUCTS[recipe.method.rounds], division)
    found += Operations(rounded=_FIT_ROUNDED * _rounded(layout, recipe))
    if may_compare(recipe) and not recipe.method.rounds:
        found += Operations(passes=2) + _solving(layout, _COMPARE_PRODUCTS, division)
    return found


def count_propagating(
    model: Model, layout: Layout, samples: Samples, recipe: Recipe, division: Division
) -> Operations:
    """Of what propagation adds to it."""
    least = min(followed(rounds=recipe.method.rounds), len(samples))
    part = samples[:least].positions
    passes = _FIT_PASSES * part / samples.positions
    single = _PAIR_MOMENTS * _of_moments(model, layout, part)
    rounded = _PAIR_ROUNDED * _rounded(layout, recipe)
    solving = _solving(layout, _PAIR_PRODUCTS[recipe.method.rounds], division)
    return solving + Operations(passes, single=single, rounded=rounded)


def count_pass(model: Model, layout: Layout, samples: Samples) -> int:
    """Multiply-adds of one pass through all blocks, attention's own left out."""
    return int(_of_pass(model, layout.blocks, samples.positions))


def estimate_time(
    model: Model,
    layout: Layout,
    samples: Samples,
    recipe: Recipe,
    speed: Speed,
    per_pass: float,
    division: Division | None = None,
    processes: int = 1,
) -> TimeEstimate:
    """Roughly. per_pass: seconds of one pass over all samples, through all blocks, in one process."""
    division = division or Division()
    counted = (
        count_observing(model, layout, samples, recipe, division),
        count_fitting(layout, recipe, division),
        count_propagating(model, layout, samples, recipe, division),
    )
    observe, fit, propagate = (speed.seconds(work, per_pass) for work in counted)
    return TimeEstimate(observe, fit, propagate, processes)


def _solving(layout: Layout, times: tuple[float, float], division: Division) -> Operations:
    """Multiply-adds in float64 and float32, as multiples of one product W G of every layer."""
    here = hosted = 0
    for spec in layout.linears.values():
        product = spec.shape.out_features * spec.shape.in_features**2
        if division.widest is None or spec.shape.in_features <= division.widest:
            here += product
        else:
            hosted += product
    return Operations(double=times[0] * here, single=times[1] * here, hosted=sum(times) * hosted)


def is_entropy_coded(recipe: Recipe) -> bool:
    """Whether weights are rounded to entropy-coded columns, by loops on the host."""
    return bool(getattr(recipe.method, "entropy_coded", False))


def _rounded(layout: Layout, recipe: Recipe) -> int:
    if not is_entropy_coded(recipe):
        return 0
    return sum(spec.shape.out_features * spec.shape.in_features for spec in layout.linears.values())


def _of_moments(model: Model, layout: Layout, tokens: int) -> float:
    reach = _Reach(model, layout)
    return sum(_TRIANGLE * reach(group, tokens) * group.in_features**2 for group in layout.groups)


def _of_pass(model: Model, blocks: list[Block] | tuple[Block, ...], tokens: int) -> float:
    reach = _Reach(model, Layout(tuple(blocks), 0))
    return sum(
        reach(group, tokens) * group.in_features * spec.shape.out_features
        for block in blocks
        for group in block.groups
        for spec in group.linears
    )


class _Reach:
    """How many of so many tokens reach a group: all, or an expert's share."""

    def __init__(self, model: Model, layout: Layout) -> None:
        config = model.config.get_text_config()
        self._chosen = getattr(config, "num_experts_per_tok", None) or 1
        self._experts: dict[str, int] = {}
        for group in layout.groups:
            if group.routed:
                self._experts[group.routed] = self._experts.get(group.routed, 0) + 1

    def __call__(self, group: InputGroup, tokens: int) -> float:
        return tokens * min(1.0, self._chosen / self._experts[group.routed]) if group.routed else tokens


def per_product(dtype: torch.dtype, device: torch.device) -> float:
    """Seconds per multiply-add, where that is done."""
    side = _SIDES[device.type == "cpu"]
    left = torch.randn(side, side, dtype=dtype).to(device)
    float((left @ left)[0, 0])  # libraries are loaded, and clocks raised
    start = time.perf_counter()
    float((left @ left)[0, 0])  # a value to wait for
    return (time.perf_counter() - start) / side**3


def _per_copied(device: torch.device) -> float:
    """Seconds per byte of what is brought to a device; 0 where nothing has to be."""
    if device.type == "cpu":
        return 0.0
    host = torch.zeros(_COPIED, dtype=torch.uint8)
    float(host.to(device)[0])
    start = time.perf_counter()
    float(host.to(device)[0])
    return (time.perf_counter() - start) / _COPIED


def _per_rounded(device: torch.device) -> float:
    """Seconds per weight that is rounded and coded, on all cores."""
    generator = torch.Generator().manual_seed(0)
    W_OI = torch.randn(_ROUNDED_SHAPE, generator=generator).to(device)
    factor = Metric(torch.eye(_ROUNDED_SHAPE[1], dtype=torch.float64, device=device)).factor
    Trellis.of(round_entropy_coded(W_OI[:8], factor, 0.1))  # compiled now
    start = time.perf_counter()
    Trellis.of(round_entropy_coded(W_OI, factor, 0.1))
    return (time.perf_counter() - start) / W_OI.numel()


def check_resources(
    needs: ResourceEstimate, directory: Path, limit: int | None, device_limit: int | None = None
) -> None:
    """Raises: InputError if the disk or the memory that a compression needs is not there.

    Args: directory: where finished work goes; limit, device_limit: bytes of the host's and of the
        accelerator's memory allowed.
    """
    if limit is not None and needs.memory > limit:
        raise InputError(
            f"this needs about {needs.memory / 1e9:.2f} GB of memory, {limit / 1e9:.2f} GB are allowed; "
            "lower --batch, --seqlen or --shard-size, or allow more with --memory"
        )
    if device_limit is not None and needs.device > device_limit:
        raise InputError(
            f"this needs about {needs.device / 1e9:.2f} GB of device memory, {device_limit / 1e9:.2f} GB are "
            "allowed; lower --batch or --seqlen, leave the widest layers dense with --exclude, allow more "
            "with --device-memory, or take --device cpu"
        )
    done = sum(path.stat().st_size for path in directory.rglob("*"))
    free = shutil.disk_usage(directory).free + done
    if needs.disk > free:
        raise InputError(
            f"this needs about {needs.disk / 1e9:.2f} GB of disk, {directory} has {free / 1e9:.2f} GB; "
            "choose an output directory on a larger disk, or lower --samples or --seqlen"
        )
