"""Gradient descent on the continuous tensors of a compressed module: steps relative to each tensor's size,
and the best of what was reached by a loss on samples that were held out."""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lrsd.errors import NumericsError
from lrsd.forms.kernels import has_kernels
from lrsd.training.differentiable import as_stored

# Share of the steps in which the rate rises to its largest: Adam's first ones are of full size everywhere.
_WARM_UP = 0.05
# Adam's memory, in steps about 1 / (1 - beta): a block sees a few hundred of them.
_BETAS = (0.9, 0.99)
# Below the gradients of a relative error per entry, which 1e-8 is not.
_EPSILON = 1e-12
# Between the seeds of two epochs: more than there are blocks, whose seeds follow one another.
_EPOCH = 1_000_003
# Size that a tensor is taken to have at least: biases may begin at zero.
_LEAST_SIZE = 1e-3


@dataclass(frozen=True)
class Reached:
    """Where a descent is: steps done, and the best values so far, as stored.

    losses: on the held-out samples, of the values at the start and after every epoch. values: those of the
    least of them. masters; first, second, counts: of Adam, where it is to go on; what no token has reached
    has none of the latter.
    """

    steps: int
    losses: list[float]
    values: dict[str, Tensor]
    masters: dict[str, Tensor] = field(default_factory=dict)
    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    @property
    def before(self) -> float:
        return self.losses[0]

    @property
    def after(self) -> float:
        return min(self.losses)

    @property
    def improved(self) -> bool:
        return self.after < self.before


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long, in which steps, in which order. every: steps between two states that are kept; 0: none."""

    batches: int
    epochs: int
    rate: float
    seed: int
    every: int = 0

    @property
    def steps(self) -> int:
        return self.batches * self.epochs

    def rate_at(self, step: int) -> float:
        """Rising along a line, then falling along a cosine to zero."""
        warm = max(1, round(_WARM_UP * self.steps))
        if step < warm:
            return self.rate * (step + 1) / warm
        return self.rate * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm))) / 2

    def batch_at(self, step: int) -> int:
        """Every batch once per epoch, in an order that depends on nothing but seed and epoch."""
        epoch, place = divmod(step, self.batches)
        generator = torch.Generator().manual_seed((self.seed + _EPOCH * epoch) % 2**63)
        return int(torch.randperm(self.batches, generator=generator)[place])


def descend(
    masters: Mapping[str, nn.Parameter],
    dtypes: Mapping[str, torch.dtype],
    schedule: Schedule,
    *,
    loss: Callable[[int], float],
    held_out: Callable[[], float],
    what: str,
    start: Reached | None = None,
    keep: Callable[[Reached], None] = lambda reached: None,
    report: Callable[[str], None] = lambda text: None,
) -> Reached:
    """Minimize the mean of `loss` over batches by AdamW; a tensor of RMS s takes steps of about rate s.

    Args: masters: float32, changed in place; at the end they have the best values, as stored in `dtypes`;
        loss: of a batch, whose gradients it adds to the masters'; held_out: the loss by which values are
        chosen, of the masters as they are; what: is trained, for an error; start: what to go on from; keep:
        called with the state every so many steps; report: called after every step.
    Raises: NumericsError if a loss is not finite.
    """
    if not masters:  # codes alone: nothing is continuous
        return Reached(0, [_finite(held_out(), what, 0)], {})
    groups = [
        {"params": [m], "size": max(float(m.detach().square().mean().sqrt()), _LEAST_SIZE)}
        for m in masters.values()
    ]
    adam = torch.optim.AdamW(groups, lr=0.0, betas=_BETAS, eps=_EPSILON, weight_decay=0.0)
    if start is None:
        values = as_stored(masters, dtypes)
        reached = Reached(0, [_finite(held_out(), what, 0)], values)
    else:
        reached = start
        _resume(adam, masters, start)
    for step in range(reached.steps, schedule.steps):
        for group in adam.param_groups:
            group["lr"] = schedule.rate_at(step) * group["size"]
        adam.zero_grad()
        found = _finite(loss(schedule.batch_at(step)), what, step)
        adam.step()
        losses, values = reached.losses, reached.values
        if (step + 1) % schedule.batches == 0:
            now = as_stored(masters, dtypes)
            losses = [*losses, _finite(_held_out(masters, now, held_out), what, step)]
            values = now if losses[-1] < reached.after else values
        reached = Reached(step + 1, losses, values)
        if schedule.every and (step + 1) % schedule.every == 0 and step + 1 < schedule.steps:
            keep(_state(adam, masters, reached))
        report(f"loss {found:.4g}, held out {losses[-1]:.4g}")
    _put(masters, reached.values)
    return reached


def arithmetic(device: torch.device, stack: ExitStack) -> None:
    """Products in bfloat16 where those are fast, all else in float32; and gradients that are the same in
    every run, which the fast kernels of attention on CUDA do not give."""
    if device.type != "cpu" or has_kernels(torch.bfloat16):
        # Without its cache, which would hold the weights of the first step.
        stack.enter_context(torch.autocast(device.type, torch.bfloat16, cache_enabled=False))
    if device.type == "cuda":
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))


def _held_out(
    masters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor], held_out: Callable[[], float]
) -> float:
    """The loss of these values, the masters staying as they are."""
    before = {name: master.data for name, master in masters.items()}
    _put(masters, values)
    found = held_out()
    for name, master in masters.items():
        master.data = before[name]
    return found


def _put(masters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, master in masters.items():
        master.data = values[name].to(master.device, torch.float32, copy=True)


def _state(adam: torch.optim.Optimizer, masters: Mapping[str, nn.Parameter], reached: Reached) -> Reached:
    states = {name: adam.state[m] for name, m in masters.items() if adam.state[m]}
    first, second, counts = (
        {name: state[key] for name, state in states.items()} for key in ("exp_avg", "exp_avg_sq", "step")
    )
    values = {name: master.detach() for name, master in masters.items()}
    return replace(reached, masters=values, first=first, second=second, counts=counts)


def _resume(adam: torch.optim.Optimizer, masters: Mapping[str, nn.Parameter], start: Reached) -> None:
    _put(masters, start.masters)
    for name, master in masters.items():
        if name in start.counts:
            first, second = (part[name].to(master.device, copy=True) for part in (start.first, start.second))
            adam.state[master] = {
                "step": start.counts[name].clone(), "exp_avg": first, "exp_avg_sq": second
            }  # fmt: skip


def _finite(loss: float, what: str, step: int) -> float:
    if not math.isfinite(loss):
        raise NumericsError(
            f"the loss of {what} is {loss} at step {step}; try a rate of a third, or another text"
        )
    return loss
