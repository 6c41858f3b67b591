"""Which plan: bytes shared among layers in several ways, the best on held-out text kept."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from lrsd.errors import BudgetError
from lrsd.methods.base import Method
from lrsd.model.replay import Replay
from lrsd.model.samples import Samples, distance, logits_of, run_model
from lrsd.model.slots import weight_slot
from lrsd.numerics.allocate import (
    Allocation,
    allocate_by_weight,
    allocate_energy,
    allocate_smallest,
    allocate_uniform,
    allocated_bytes,
    dense_bytes,
)
from lrsd.numerics.menu import Choice, Menu, TiedMenu
from lrsd.progress import Progress
from lrsd.recipe import Recipe
from lrsd.steps.observe import Observation, fitted_samples, layer_problem
from lrsd.steps.statistics import GroupStatistics, Weights, block_statistics, share_among_experts
from lrsd.work.journal import Workspace
from lrsd.work.process import release_freed
from lrsd.work.streams import Leading

# KL in nats per token below which codes are not calibrated on the compressed model's activations: such a
# loss hardly shows in a perplexity. --propagate turns it on.
_SMALL_KL = 0.005
# KL below which the plan by sensitivities is not compared with equal shares: on SmolLM2-135M it was the
# better one at 1.25x and 16 bit and at every ratio with codes; at 16 bit and 2x, several nats, it need not
# be. By whether weights are rounded: with codes at 8x the comparison, on two samples, preferred equal shares,
# which ended at a KL of 0.518 instead of 0.471.
_TRUSTED_KL = {False: 0.3, True: 2.0}
# Share by which equal shares must be better in that comparison, which propagates nothing and says little of
# small differences: at 16 bit and 2x they were by 0.2 %, and ended at a KL of 1.25 instead of 0.98.
_CLEARLY = 0.05
# Samples on which plans are compared, and tokens of each: the logits of one are in memory, twice.
_COMPARED_SAMPLES, _COMPARED_TOKENS = 8, 256
# Least fraction of the average bytes that the allocation may leave a layer: sensitivities are
# local, and a layer far below the average has an error they say nothing about.
_FLOOR = 0.3
# The step's name in the journal.
PLAN_STEP = "plan"


@dataclass(frozen=True)
class Plan:
    """An offer for every layer, how it was come by, and whether it is to be fitted on the compressed model's
    activations.

    expected_kl: sum of sensitivity x error, nats per token; None where no sensitivities were measured.
    compared: held-out KL of every plan tried.
    """

    choices: dict[str, Choice]
    name: str
    expected_kl: float | None
    propagate: bool
    compared: dict[str, float] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(choice.nbytes for choice in self.choices.values())


def may_propagate(recipe: Recipe) -> bool:
    """Whether a fit may be calibrated on the compressed model's activations: as asked, or as the method does;
    then it is, unless the plan promises a loss too small for it."""
    asked = recipe.calibration.propagate
    return recipe.method.propagates if asked is None else asked


def needs_sensitivity(recipe: Recipe) -> bool:
    return recipe.method.allocation(recipe.budget.allocation) in ("auto", "kl")


def may_compare(recipe: Recipe) -> bool:
    """Whether plans may be compared on held-out text: if the one by sensitivities promises a large loss."""
    return recipe.method.allocation(recipe.budget.allocation) == "auto"


def compared_samples(samples: Samples) -> int:
    """Samples on which plans are compared, one after the other."""
    return min(_COMPARED_SAMPLES, len(samples) - fitted_samples(len(samples)))


def compared_rows(samples: Samples) -> int:
    """Rows of logits of one sample on which plans are compared."""
    return samples[:1].cut(_COMPARED_TOKENS).positions


def choose_plan(
    replay: Replay,
    observation: Observation,
    samples: Samples,
    budget: int,
    ratio: float,
    recipe: Recipe,
    progress: Progress,
    workspace: Workspace | None = None,
) -> Plan:
    """Share the budget among the layers, and decide on propagation.

    "auto" allocates by sensitivities as measured. Where these promise a small loss the promise holds:
    sensitivities are first-order. Otherwise equal shares are tried too, on held-out calibration text
    without propagation, and the better plan is kept.

    Args: ratio: of the linear weights; workspace: where the plan is kept, once made.
    """
    workspace = Workspace() if workspace is None else workspace
    if PLAN_STEP not in workspace:

        def divergence(choices: Mapping[str, Choice]) -> float:
            return _held_out_divergence(replay, samples, choices, ratio, recipe, workspace)

        tied = [[spec.name for spec in group.linears] for group in replay.layout.groups]
        plan = make_plan(observation, budget, ratio, recipe, progress, divergence, tied)
        workspace.finish(PLAN_STEP, plan if replay.world.leads else None)
    return workspace.read(PLAN_STEP, Plan)


def make_plan(
    observation: Observation,
    budget: int,
    ratio: float,
    recipe: Recipe,
    progress: Progress,
    divergence: Callable[[Mapping[str, Choice]], float],
    inputs: Sequence[Sequence[str]] = (),
) -> Plan:
    """divergence: the held-out KL of a plan, where plans are to be compared; inputs: names of the layers
    that read the same input, which some methods store alike."""
    menus, sensitivity, asked = observation.menus, observation.sensitivity, recipe.calibration.propagate
    tied: dict[str, TiedMenu] = {}
    if recipe.method.ties_inputs:
        for names in inputs:
            tied[names[0]] = TiedMenu.of({name: menus[name] for name in names}, sensitivity)
        menus, sensitivity = {name: found.menu for name, found in tied.items()}, dict.fromkeys(tied, 1.0)

    if recipe.method.has_own_rule:
        propagate = recipe.method.propagates if asked is None else asked
        return Plan(recipe.method.share(menus, budget), recipe.method_name, None, propagate)

    def plan(name: str, allocation: Allocation, compared: dict[str, float] | None = None) -> Plan:
        if tied:
            allocation = {
                layer: own
                for first, index in allocation.items()
                for layer, own in tied[first].indices[index].items()
            }
        choices = {layer: observation.menus[layer].choice(index) for layer, index in allocation.items()}
        expected = None
        if needs_sensitivity(recipe):
            expected = sum(observation.sensitivity[layer] * c.error for layer, c in choices.items())
        propagate = asked
        if propagate is None:
            small = recipe.method.rounds and expected is not None and expected < _SMALL_KL
            propagate = recipe.method.propagates and not small
        return Plan(choices, name, expected, propagate, compared or {})

    rule = recipe.method.allocation(recipe.budget.allocation)
    if rule == "smallest":
        return plan("rank", _smallest(menus, budget))
    if rule == "energy":
        return plan("energy", allocate_energy(menus, budget))
    if rule == "uniform":
        return plan("uniform", allocate_uniform(menus, budget))
    by_weight = allocate_by_weight(menus, sensitivity, budget, _FLOOR / ratio)
    first = plan("kl", by_weight)
    assert first.expected_kl is not None
    if rule == "kl" or first.expected_kl < _TRUSTED_KL[recipe.method.rounds]:
        return first
    allocations = {"kl": by_weight, "uniform": allocate_uniform(menus, budget)}
    progress.stage("compare plans", len(allocations))
    compared = {}
    for name, allocation in allocations.items():
        compared[name] = divergence(plan(name, allocation).choices)
        progress.step(name)
    best = better_plan(compared)
    return plan(best, allocations[best], compared)


def better_plan(compared: Mapping[str, float]) -> str:
    """compared: held-out KL of the plans "kl" and "uniform"."""
    return "uniform" if compared["uniform"] < (1 - _CLEARLY) * compared["kl"] else "kl"


def _smallest(menus: Mapping[str, Menu], budget: int) -> Allocation:
    """The one offer that there is of every layer, at a rank that the user has set."""
    taken = allocated_bytes(menus, dict.fromkeys(menus, 0))
    if taken > budget:
        raise BudgetError(
            f"the rank asked for takes {taken:,} bytes, a ratio of {dense_bytes(menus) / taken:.3g}x; "
            "lower the rank or the ratio"
        )
    return allocate_smallest(menus, budget)


def _held_out_divergence(
    replay: Replay,
    samples: Samples,
    choices: Mapping[str, Choice],
    ratio: float,
    recipe: Recipe,
    workspace: Workspace,
) -> float:
    """KL(dense || planned) per token on the held-out samples, all layers fitted to the others, without
    propagation.

    The others' moments are not kept, so that this takes a pass over them: the moments observed are of all
    samples, and would favour the plan that has more to fit to the held-out ones with.
    """
    model, method, world = replay.model, recipe.method, replay.world
    fitted = fitted_samples(len(samples))
    held_out = list(samples[fitted:][:_COMPARED_SAMPLES].cut(_COMPARED_TOKENS).split(1))
    batches = sum(end <= fitted for end in accumulate(replay.batch_sizes))
    weights = Weights(method.weighs_rows, method.weighs_tokens)
    # Where fitted weights are among these, after the dense logits.
    place = {name: len(held_out) + number for number, name in enumerate(replay.layout.linears)}
    aside, passing = workspace.new_stream("approximations"), workspace.new_stream("passing")
    with ExitStack() as undone:
        if world.leads:
            undone.callback(aside.drop)
            undone.callback(passing.drop)
        for number in world.share(len(held_out)):
            aside.put(number, logits_of(run_model(model, held_out[number])))
        for wave in replay.waves():
            found = {}
            for index in wave:
                block = replay.layout.blocks[index]
                before = Leading(replay.inputs[block.stack] if block.is_first else passing, batches)
                seen = block_statistics(replay, index, before, passing, replace(weights))
                if world.owns(index):
                    found[index] = share_among_experts(block, seen)
            for index, statistics in found.items():
                for name, W_OI in _quick(replay, index, statistics, choices, ratio, method):
                    aside.put(place[name], W_OI)
            for index in wave:
                for spec in (spec for group in replay.layout.blocks[index].groups for spec in group.linears):
                    if not choices[spec.name].is_dense:
                        slot, number = weight_slot(model, spec.name), place[spec.name]
                        undone.enter_context(slot.paged(lambda number=number: aside[number]))  # type: ignore[misc]
                replay.finished(replay.block(index))
        world.wait()
        distances = torch.zeros(len(held_out), dtype=torch.float64)
        for number in world.share(len(held_out)):
            distances[number] = distance(model, aside[number], logits_of(run_model(model, held_out[number])))
        world.add_([distances], 0)
        world.tell_([distances], 0)
        return sum(distances.tolist()) / len(held_out)


def _quick(
    replay: Replay,
    index: int,
    statistics: Mapping[str, GroupStatistics],
    choices: Mapping[str, Choice],
    ratio: float,
    method: Method,
) -> Iterator[tuple[str, Tensor]]:
    """Weights that a block's layers would have. Columns and rows as observed: to improve them here would take
    most of the time."""
    for group in replay.layout.blocks[index].groups:
        own = statistics[group.name]
        metric = method.metric(own.moments)
        for spec in group.linears:
            if not choices[spec.name].is_dense:
                rows_O = own.exponents(spec.name)
                problem = layer_problem(replay, spec.name, metric, ratio, rows_O).single()
                yield (
                    spec.name,
                    method.solve(problem, choices[spec.name], quick=True).W_OI.to(replay.model.dtype),
                )
        release_freed()
