"""What each layer is fitted to: its own weight in the metric of its inputs, or one that makes up for their
errors in the compressed model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lrsd.methods.base import LayerProblem, Method
from lrsd.model.layout import InputGroup
from lrsd.model.replay import Replay
from lrsd.model.slots import weight_slot
from lrsd.numerics.moments import Moments
from lrsd.numerics.solver import propagated_target
from lrsd.numerics.weights import row_scales
from lrsd.steps.observe import layer_problem
from lrsd.steps.propagate import Pair, Way
from lrsd.steps.statistics import GroupStatistics


@dataclass(frozen=True)
class Target:
    """What one layer is fitted to, and how that was come by. interpolation: weight of the target that makes
    up for its inputs' errors, 0 to 1; damping: of the target's own solution, where the usual one did not do.
    """

    problem: LayerProblem
    interpolation: float = 0.0
    damping: float = 0.0


def dense_targets(
    replay: Replay, group: InputGroup, statistics: GroupStatistics, method: Method
) -> dict[str, Target]:
    """The layers' own weights, in the dense model's statistics. Raises: SolverError."""
    metric, mean_I = method.metric(statistics.moments), statistics.moments.mean
    targets = {}
    for spec in group.linears:
        own = layer_problem(replay, spec.name, metric, math.inf)
        problem = replace(own, input_mean_I=mean_I, target_mean_O=own.W_OI @ mean_I)
        targets[spec.name] = Target(problem.weighted(statistics.exponents(spec.name)))
    return targets


def weights_of(replay: Replay, group: InputGroup) -> Tensor:
    """Those of all layers of a group, one below the other, (O, I) float64."""
    return torch.cat([weight_slot(replay.model, spec.name).read().double() for spec in group.linears])


@dataclass(frozen=True)
class PropagatedTargets:
    """Weights between W and W*, which makes up for the errors of its inputs, as far as held-out text agrees.

    The held-out error is quadratic along W + b (W* - W), so that each layer's best b has a closed form; of
    several ridges, each with its W*, the one is taken that leaves least of it. The layers of a group share
    the metric, so that their rows are solved for together.
    """

    group: InputGroup
    pair: Pair
    statistics: GroupStatistics
    moments: Moments
    problems: Mapping[str, LayerProblem]

    @staticmethod
    def of(
        replay: Replay, group: InputGroup, pair: Pair, statistics: GroupStatistics, method: Method
    ) -> "PropagatedTargets":
        """Raises: SolverError."""
        moments = pair.moments_(statistics.moments)
        metric = method.metric(moments)
        own = {spec.name: layer_problem(replay, spec.name, metric, math.inf) for spec in group.linears}
        return PropagatedTargets(group, pair, statistics, moments, own)

    def along(self, ways: Sequence[Way]) -> dict[str, Target]:
        """Raises: SolverError."""
        pair, moments = self.pair, self.moments
        W_OI = torch.cat([problem.W_OI for problem in self.problems.values()])
        cross = pair.fit_missing + pair.held_out_missing
        missing_OI = pair.missing(W_OI, cross)
        metric = self.problems[self.group.name].metric
        solving_II = (pair.fit + pair.held_out).gram if pair.writes_residual else metric.gram
        full: dict[float, tuple[Tensor, float]] = {}
        mean_O = W_OI @ moments.mean + pair.missing_mean(W_OI, cross)
        targets, end = {}, 0
        for spec in self.group.linears:
            start, end = end, end + spec.shape.out_features
            rows_O = self.statistics.exponents(spec.name)
            importances_O = torch.ones_like(W_OI[start:end, 0])
            if rows_O is not None:
                importances_O = row_scales(rows_O).to(importances_O) ** -2
            _, weight, ridge = max(way.best(slice(start, end), importances_O) for way in ways)
            own_OI = W_OI[start:end]
            # Of a layer without weights the plan knows the step of nothing only.
            weight = weight if own_OI.any() else 0.0
            if ridge not in full:
                full[ridge] = propagated_target(W_OI, solving_II, missing_OI, damping=ridge)
            full_OI, damping = full[ridge]
            W_target_OI = own_OI + weight * (full_OI[start:end] - own_OI)
            problem = replace(
                self.problems[spec.name],
                W_OI=W_target_OI,
                input_mean_I=moments.mean,
                target_mean_O=mean_O[start:end],
            )
            targets[spec.name] = Target(problem.weighted(rows_O), weight, damping)
        return targets
