"""Divergence of two models' outputs on the same inputs."""

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

# Logits compared at once: a large vocabulary's take more than the model's blocks, several times over.
DISTANCE_VALUES = 2**21


def mean_divergence(reference_NC: Tensor, found_NC: Tensor, *, categorical: bool) -> float:
    """Mean over rows of KL(reference || found) in nats, or of half the relative squared error.

    The latter, ||found - reference||^2 / (2 ||reference||^2), is for outputs that are no logits of several
    classes: hidden states, a single number. It is what KL comes to for a small change of an output that has
    Gaussian noise.

    Args: reference_NC, found_NC: (rows, classes), of which a few rows at a time become float32; categorical:
        whether the rows are logits of several classes.
    """
    total = 0.0
    rows = rows_at_once(reference_NC)
    for references, founds in zip(reference_NC.split(rows), found_NC.split(rows), strict=True):
        reference, found = references.float(), founds.float()
        if categorical:
            first, second = log_softmax(found, -1), log_softmax(reference, -1)
            part = kl_div(first, second, reduction="sum", log_target=True)
        else:
            norms = reference.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
            part = ((found - reference).square().sum(-1) / norms).sum() / 2
        total += float(part)
    return max(total, 0.0) / len(reference_NC)


def rows_at_once(logits_NC: Tensor) -> int:
    """Rows of logits that are worked on at once: a large vocabulary takes no more memory than a small one."""
    return max(1, DISTANCE_VALUES // logits_NC.shape[-1])
