"""Pruning while a model is trained: how much is kept at a step, what a row is worth, and one threshold for
the rows of all layers.

Source: Li et al., "LoSparse", ICML 2023, section 3 and algorithm 1; the average over windows and the cubic
schedule as in Zhang et al., "PLATON", ICML 2022.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def kept_fraction(
    step: int, steps: int, *, warmup: int, final: int, first: float = 1.0, last: float = 0.0
) -> float:
    """p_t: what is kept after `step` of `steps` optimizer steps,

        p_i                                                        t < t_i
        p_f + (p_i - p_f) (1 - (t - t_i) / (T - t_i - t_f))^3      in between
        p_f                                                        t >= T - t_f

    Args: warmup, final: t_i and t_f, steps of the first and the last phase; first, last: p_i and p_f.
    Raises: ValueError if these phases leave no step in between, or below zero.
    """
    if min(warmup, final) < 0 or warmup + final >= steps:
        raise ValueError(f"phases of {warmup} and {final} steps leave nothing of {steps} in between")
    if step < warmup:
        return first
    if step >= steps - final:
        return last
    left = 1 - (step - warmup) / (steps - warmup - final)
    return last + (first - last) * left**3


def row_importance(S_OI: Tensor, gradient_OI: Tensor) -> Tensor:
    """The mean over a row's entries of |S dl/dS|: to first order what the loss would change by, were one of
    them zero. S_OI, gradient_OI: (O, I). Returns: (O,)."""
    return (S_OI * gradient_OI).abs().mean(1)


def row_magnitude(S_OI: Tensor) -> Tensor:
    """The mean over a row's entries of |S|, (O,)."""
    return S_OI.abs().mean(1)


def smoothed(average_O: Tensor, window_O: Tensor, beta: float) -> Tensor:
    """The exponential moving average one window later: beta average + (1 - beta) window.

    window_O: mean importance over the steps of the window. An average over rows may be taken before: both are
    linear.
    """
    return beta * average_O + (1 - beta) * window_O


def most_important(
    importances: Sequence[Tensor], costs: Sequence[Tensor], allowed: float
) -> tuple[list[Tensor], float]:
    """The most important rows of all layers that `allowed` bytes hold: one threshold for all of them.

    Rows are taken in the order of their importance until one does not fit, and none after that; of equals
    the first layer's first row comes first.

    Args: importances: (O,) of each layer; costs: bytes that the first, second, ... of a layer's rows adds,
        (O,) of each layer, whichever rows these are.
    Returns: bool (O,) of each layer, and the threshold: the least importance that is kept, infinite where
        none is.
    """
    sizes = [len(row) for row in importances]
    scores = torch.cat([row.detach().double().cpu() for row in importances])
    order = scores.argsort(descending=True, stable=True)
    layers = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[order]
    bytes_added = torch.empty(len(scores), dtype=torch.float64)
    for layer, added in enumerate(costs):
        bytes_added[layers == layer] = added.double().cpu()
    count = int((bytes_added.cumsum(0) <= allowed).sum())
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[order[:count]] = True
    threshold = float(scores[order[count - 1]]) if count else float("inf")
    return list(kept.split(sizes)), threshold
